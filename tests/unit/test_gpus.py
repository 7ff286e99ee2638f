"""Which GPUs a process may use, without a GPU."""

from __future__ import annotations

import pynvml
import pytest

from virnucpro_core.gpus import MASK, Gpu, apply_mask, list_gpus
from virnucpro_core.stack.composition import choose_gpus

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
        ("0,7,1", [A]),
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


def test_host_without_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("mask", "asked", "chosen"),
    [(None, "all", "all"), ("1", "all", "all"), ("", "all", "none"), ("", "0", "0"), ("", "none", "none")],
)
def test_a_stack_computes_on_the_cpu_where_the_mask_hides_every_gpu(
    mask: str | None, asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virnucpro_core.gpus.list_gpus", lambda: GPUS)
    monkeypatch.delenv(MASK, raising=False)
    if mask is not None:
        monkeypatch.setenv(MASK, mask)
    assert choose_gpus(asked) == chosen
