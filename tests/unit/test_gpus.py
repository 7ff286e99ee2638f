"""Which GPUs a process may use, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pynvml
import pytest
from structlog.testing import capture_logs

from virnucpro_core.errors import ExecutionError, SettingsError
from virnucpro_core.gpus import (
    AGAIN_SECONDS,
    MASK,
    Gpu,
    GpuMeter,
    GpuUse,
    apply_mask,
    choose_gpus,
    list_gpus,
    visible_gpus,
)
from virnucpro_core.stack.composition import gpus_or_cpu

pytestmark = pytest.mark.unit

A = Gpu("GPU-aaaa1111", 0, "GPU-aaaa1111")
B = Gpu("GPU-bbbb2222", 1, "GPU-bbbb2222")
C1 = Gpu("MIG-cccc3331", 2, "GPU-cccc3333")
C2 = Gpu("MIG-cccc3332", 2, "GPU-cccc3333")
GPUS = [A, B, C1, C2]


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        (None, GPUS),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,0", [B, A]),
        ("0,7,1", [A, B]),
        ("0,-1,1", [A]),
        ("0,0", [A]),
        ("GPU-bbbb2222", [B]),
        ("GPU-bb, GPU-aa", [B, A]),
        ("MIG-cccc3332", [C2]),
        ("2", [C1, C2]),
        ("GPU-cccc3333", [C1, C2]),
        ("GPU-dddd", []),
    ],
)
def test_inherited_mask_is_obeyed(mask: str | None, left: list[Gpu]) -> None:
    assert apply_mask(GPUS, mask) == left


@pytest.mark.parametrize(
    ("wanted", "chosen"), [("none", []), ("all", [B, A]), ("0", [B]), ("1,0", [A, B]), (" 1 ", [A])]
)
def test_numbers_count_within_the_mask(wanted: str, chosen: list[Gpu]) -> None:
    assert choose_gpus(wanted, [B, A]) == chosen


@pytest.mark.parametrize("wanted", ["", "some", "0,", "0,0", "-1", "GPU-aaaa1111"])
def test_other_choices_are_refused(wanted: str) -> None:
    with pytest.raises(SettingsError, match="--gpus cannot be"):
        choose_gpus(wanted, GPUS)


def test_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ExecutionError, match="there is no GPU 2"):
        choose_gpus("0,2", [A, B])
    with pytest.raises(ExecutionError, match="no GPU is visible"):
        choose_gpus("all", [])


def test_host_without_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("mask", "asked", "chosen"),
    [(None, "all", "all"), ("1", "all", "all"), ("", "all", "none"), ("1", "0", "0"), ("", "none", "none")],
)
def test_a_stack_computes_on_the_cpu_where_the_mask_hides_every_gpu(
    mask: str | None, asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virnucpro_core.gpus.list_gpus", lambda: GPUS)
    monkeypatch.delenv(MASK, raising=False)
    if mask is not None:
        monkeypatch.setenv(MASK, mask)
    assert gpus_or_cpu(asked) == chosen


@pytest.mark.parametrize(("asked", "error"), [("0", ExecutionError), ("some", SettingsError)])
def test_a_stack_refuses_what_its_workers_would(
    asked: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MASK, "")
    with pytest.raises(error):
        gpus_or_cpu(asked)


class Memory:
    used, total = 40 << 30, 139 << 30


class Rates:
    gpu = 93


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A driver of one GPU; it counts what it is asked."""
    asked: dict[str, int] = {}

    def answer(name: str, value: object) -> None:
        def ask(*_: object) -> object:
            asked[name] = asked.get(name, 0) + 1
            return value

        monkeypatch.setattr(pynvml, name, ask)

    answer("nvmlInit", None)
    answer("nvmlDeviceGetHandleByUUID", "handle")
    answer("nvmlDeviceGetMemoryInfo", Memory)
    answer("nvmlDeviceGetUtilizationRates", Rates)
    return asked


def test_meter_tells_how_busy_a_gpu_is_and_opens_it_once(driver: dict[str, int]) -> None:
    meter = GpuMeter("GPU-aaaa1111")
    assert [meter.read() for _ in range(2)] == [GpuUse(0.93, 40 << 30, 139 << 30)] * 2
    assert driver["nvmlInit"] == driver["nvmlDeviceGetHandleByUUID"] == 1


def raising(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise pynvml.NVMLError(code)

    return fail


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_NO_PERMISSION])
def test_gpu_that_cannot_be_asked_is_left_out(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has fallen off the bus must not keep all others idle; one of another's container is not ours."""

    def handle(index: int) -> Gpu:
        if index == 0:
            raising(code)()
        return GPUS[index]

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
        "nvmlDeviceGetMigMode": raising(pynvml.NVML_ERROR_NOT_SUPPORTED),
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    with capture_logs() as logs:
        assert list_gpus() == [B]
    assert [(entry["event"], entry["index"]) for entry in logs] == [("gpu_left_out", 0)]
    for mask in (None, "0,1", "1,0", "GPU-aaaa1111,GPU-bbbb2222"):
        assert visible_gpus({} if mask is None else {MASK: mask}) == [B]
    assert visible_gpus({MASK: "0"}) == []


def test_meter_of_an_instance_knows_its_memory_alone(
    driver: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", raising(pynvml.NVML_ERROR_NOT_SUPPORTED))
    assert GpuMeter("MIG-cccc3331").read() == GpuUse(None, 40 << 30, 139 << 30)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NO_DATA])
def test_memory_is_told_whatever_prevents_the_utilization(
    code: int, driver: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", raising(code))
    assert GpuMeter("GPU-aaaa1111").read() == GpuUse(None, 40 << 30, 139 << 30)


def test_meter_that_fails_is_asked_again_after_a_while(
    driver: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat must not stumble over a driver, nor forget a GPU because of one error."""
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr("virnucpro_core.gpus.time", clock)
    meter = GpuMeter("GPU-aaaa1111")
    with monkeypatch.context() as broken:
        broken.setattr(pynvml, "nvmlDeviceGetMemoryInfo", raising(pynvml.NVML_ERROR_TIMEOUT))
        assert [meter.read() for _ in range(3)] == [None] * 3
        assert driver["nvmlDeviceGetHandleByUUID"] == 1
    assert meter.read() is None
    clock.monotonic = lambda: 1000.0 + AGAIN_SECONDS
    assert meter.read() == GpuUse(0.93, 40 << 30, 139 << 30)
    assert driver["nvmlDeviceGetHandleByUUID"] == 2


@pytest.mark.parametrize("device", ["cpu", "0", ""])
def test_what_is_no_uuid_has_no_meter(driver: dict[str, int], device: str) -> None:
    assert GpuMeter(device).read() is None
    assert driver == {}


def test_names_tell_numbers_and_instances_apart() -> None:
    assert [gpu.name for gpu in GPUS] == ["gpu0-aaaa1111", "gpu1-bbbb2222", "gpu2-cccc3331", "gpu2-cccc3332"]
