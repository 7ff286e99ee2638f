"""Pinning: which GPUs there are, which of them we may use, and a lock for each, held by one node."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from virnucpro_core.errors import ExecutionError, SettingsError

LOCK_FOLDER = Path(tempfile.gettempdir()) / "virnucpro-locks"
"""One for the host, whoever runs the launcher: two users must not pin the same GPU."""


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


def list_gpus() -> list[Gpu]:
    """The host's GPUs in PCI order, a GPU in MIG mode as its instances; empty without an NVIDIA driver.

    Asks NVML, never CUDA: a process that has touched CUDA cannot fork children that use it.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found: list[Gpu] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            parent = pynvml.nvmlDeviceGetUUID(device)
            uuids = _mig_uuids(device) or [parent]
            found.extend(Gpu(uuid, index, parent) for uuid in uuids)
        return found
    finally:
        pynvml.nvmlShutdown()


def _mig_uuids(device: object) -> list[str]:
    import pynvml

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

    As CUDA does it: entries are indices or (beginnings of) UUIDs, and the first that names nothing ends the
    list. Two differences: indices count in PCI order whatever CUDA_DEVICE_ORDER says, and a whole GPU in MIG
    mode stands for all of its instances, where CUDA would take the first.

    Args:
        mask: the variable's value; None if it is not set, which leaves all.
    """
    if mask is None:
        return list(gpus)
    left: list[Gpu] = []
    for entry in (part.strip() for part in mask.split(",")):
        named = [gpu for gpu in gpus if _is_named(gpu, entry)]
        if not named:
            break
        left.extend(gpu for gpu in named if gpu not in left)
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


@dataclass(frozen=True, slots=True)
class Lock:
    """A name that nobody else on this host has.

    It belongs to the open file: every process that inherits `descriptor` keeps it, and the kernel drops it
    when the last of them ends, however it ends. So a GPU stays locked while an orphan still uses it.
    """

    descriptor: int

    def release(self) -> None:
        """Give up this process's part of it."""
        os.close(self.descriptor)


def try_lock(name: str, folder: Path = LOCK_FOLDER) -> Lock | None:
    """Lock a name on this host; None if a living process has it.

    Raises:
        ExecutionError: the lock folder cannot be used.
    """
    try:
        folder.mkdir(mode=0o1777, parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ExecutionError(
            f"locks cannot be kept: {error.strerror}",
            where=str(folder),
            todo="Make it writable for this user.",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return Lock(descriptor)
