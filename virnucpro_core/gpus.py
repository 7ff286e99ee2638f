"""GPUs: which ones this host has, which of them an inherited mask leaves us, how busy one is. Never touches CUDA."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pynvml
import structlog

from virnucpro_core.errors import ExecutionError, SettingsError

log = structlog.get_logger()

AGAIN_SECONDS = 300.0  # until a GPU that could not be asked is asked again
MASK = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG instance of one.

    Attributes:
        uuid: `GPU-…` or `MIG-…`, as CUDA_VISIBLE_DEVICES takes it.
        index: place of the whole GPU in PCI order, the order in which nvidia-smi counts.
        parent: UUID of the whole GPU; the same as `uuid` without MIG.
    """

    uuid: str
    index: int
    parent: str

    @property
    def name(self) -> str:
        """What people read: its number, and enough of the UUID to tell instances apart, as in `gpu0-1a2b3c4d`."""
        return f"gpu{self.index}-{self.uuid.removeprefix('GPU-').removeprefix('MIG-')[:8]}"


@dataclass(frozen=True, slots=True)
class GpuUse:
    """How busy a GPU is, whoever uses it.

    Attributes:
        utilization: share of the last moments in which it computed anything; None if NVML cannot tell, as of a
            MIG instance.
        memory_used, memory_total: in bytes.
    """

    utilization: float | None
    memory_used: int
    memory_total: int


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that this process may use, in the order of its mask."""
    return apply_mask(list_gpus(), environment.get(MASK))


def list_gpus() -> list[Gpu]:
    """The host's GPUs in PCI order, a GPU in MIG mode as its instances; empty without an NVIDIA driver.

    Asks NVML, never CUDA: a process that has touched CUDA cannot fork children that use it.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found: list[Gpu] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                device = pynvml.nvmlDeviceGetHandleByIndex(index)
                parent = pynvml.nvmlDeviceGetUUID(device)
                uuids = _mig_uuids(device) or [parent]
            except pynvml.NVMLError as error:
                # It has fallen off the bus, or another container has it: the others are there nevertheless.
                log.warning("gpu_left_out", index=index, reason=str(error))
                continue
            found.extend(Gpu(uuid, index, parent) for uuid in uuids)
        return found
    finally:
        pynvml.nvmlShutdown()


def _mig_uuids(device: object) -> list[str]:
    try:
        enabled, _ = pynvml.nvmlDeviceGetMigMode(device)
    except pynvml.NVMLError_NotSupported:
        return []
    if enabled != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    uuids = []
    for slot in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, slot)
        except pynvml.NVMLError_NotFound:
            continue  # slots may be empty
        uuids.append(pynvml.nvmlDeviceGetUUID(instance))
    return uuids


def apply_mask(gpus: Sequence[Gpu], mask: str | None) -> list[Gpu]:
    """The GPUs that an inherited CUDA_VISIBLE_DEVICES leaves us, in its order.

    As CUDA does it: entries are indices or (beginnings of) UUIDs, and `-1` ends the list. Three differences: what
    else names nothing is passed over, where CUDA would end the list there, too: it may be a GPU that the driver has
    lost, which must not keep those behind it idle. Indices count in PCI order whatever CUDA_DEVICE_ORDER says. A
    whole GPU in MIG mode stands for all of its instances, where CUDA would take the first.

    Args:
        mask: the variable's value; None if it is not set, which leaves all.
    """
    if mask is None:
        return list(gpus)
    left: list[Gpu] = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry == "-1":
            break
        left.extend(gpu for gpu in gpus if _is_named(gpu, entry) and gpu not in left)
    return left


def _is_named(gpu: Gpu, entry: str) -> bool:
    if entry.isdecimal():
        return gpu.index == int(entry)
    return entry.startswith(("GPU-", "MIG-")) and (gpu.uuid.startswith(entry) or gpu.parent.startswith(entry))


def choose_gpus(wanted: str, visible: Sequence[Gpu]) -> list[Gpu]:
    """The GPUs that `--gpus` names.

    Args:
        wanted: `all`, `none`, or places in `visible` like `0,1`.
        visible: what the mask leaves us.

    Raises:
        SettingsError: it names anything else.
        ExecutionError: it names a GPU that is not there.
    """
    if wanted == "none":
        return []
    if wanted == "all":
        if not visible:
            raise ExecutionError(
                "no GPU is visible",
                where="--gpus all",
                todo="Use --gpus none, or look at CUDA_VISIBLE_DEVICES.",
            )
        return list(visible)
    places = [part.strip() for part in wanted.split(",")]
    if not all(place.isdecimal() for place in places) or len(set(places)) != len(places):
        raise SettingsError(
            f"--gpus cannot be {wanted!r}", where="--gpus", todo="Give all, none, or numbers such as 0,1."
        )
    missing = [place for place in places if int(place) >= len(visible)]
    if missing:
        raise ExecutionError(
            f"there is no GPU {', '.join(missing)}: {len(visible)} are visible",
            where="--gpus",
            todo="Name others, or look at CUDA_VISIBLE_DEVICES.",
        )
    return [visible[int(place)] for place in places]


class GpuMeter:
    """Asks NVML how busy one GPU is. One that cannot be asked is left alone for a while.

    Args:
        uuid: a GPU or a MIG instance; anything else (`cpu`, the number of a GPU) has no meter.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.has_meter = uuid.startswith(("GPU-", "MIG-"))
        self.due = 0.0  # on the monotonic clock
        self.handle: object = None

    def read(self) -> GpuUse | None:
        """How busy it is now; None without an answer."""
        if not self.has_meter or time.monotonic() < self.due:
            return None
        try:
            if self.handle is None:
                pynvml.nvmlInit()
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
            memory = pynvml.nvmlDeviceGetMemoryInfo(self.handle)
            return GpuUse(self._utilization(), int(memory.used), int(memory.total))
        except pynvml.NVMLError as error:
            self.handle = None
            self.due = time.monotonic() + AGAIN_SECONDS
            log.warning("gpu_not_metered", gpu=self.uuid, reason=str(error), again_in=AGAIN_SECONDS)
            return None

    def _utilization(self) -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetUtilizationRates(self.handle).gpu) / 100
        except pynvml.NVMLError:
            return None
