"""The fastest kernel plan that runs is chosen, and the log says why when a slower one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from virnucpro_core.embedding import loading
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.loading import choose_plan, explain_missing, load_fast_esm
from virnucpro_core.errors import ExecutionError

pytestmark = pytest.mark.unit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a Hopper GPU, Triton, a C compiler and Python's headers; the folder of the latter two."""
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(loading, "find_spec", lambda _: object())
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


@pytest.mark.usefixtures("hopper")
def test_half_precision_on_a_hopper_gpu_is_fused() -> None:
    with capture_logs() as logs:
        assert choose_plan(CUDA, "float16") is choose_plan(CUDA, "bfloat16") is KernelPlan.PACKED_FUSED
        assert choose_plan(CUDA, "float32") is choose_plan(CPU, "float32") is KernelPlan.SINGLE_SDPA
    assert logs == []


@pytest.mark.parametrize(
    ("capability", "plan"), [((8, 0), KernelPlan.PACKED_VARLEN), ((7, 5), KernelPlan.SINGLE_SDPA)]
)
@pytest.mark.usefixtures("hopper")
def test_other_gpus_take_a_slower_plan_that_the_log_names(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], plan: KernelPlan
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    with capture_logs() as logs:
        assert choose_plan(CUDA, "float16") is plan
    [entry] = logs
    assert (entry["event"], entry["log_level"], entry["plan"]) == ("fused_kernels_missing", "warning", plan)
    assert "Hopper" in entry["reason"]


@pytest.mark.usefixtures("hopper")
def test_fp8_has_one_plan_and_no_slower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_plan(CUDA, "fp8") is KernelPlan.PACKED_FP8
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 9))
    with pytest.raises(ExecutionError, match="FP8 does not run here: they are made for Hopper"):
        choose_plan(CUDA, "fp8")


def test_fp8_is_refused_to_a_cpu(demo_checkpoint: Path) -> None:
    with pytest.raises(ExecutionError, match="a CPU does not compute in fp8"):
        load_fast_esm(demo_checkpoint, device="cpu", dtype="fp8")


def test_what_is_missing_is_named(hopper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain_missing(CUDA) is None
    (hopper / "Python.h").unlink()
    assert "headers" in (explain_missing(CUDA) or "")
    (hopper / "gcc").unlink()
    assert "C compiler" in (explain_missing(CUDA) or "")
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    assert "Triton is missing" in (explain_missing(CUDA) or "")
