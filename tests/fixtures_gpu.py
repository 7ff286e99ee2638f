"""Models under each kernel plan of a GPU, and a cap on its memory, as a plugin (`-p tests.fixtures_gpu`)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from virnucpro_core.embedding.checkpoint import inspect_checkpoint
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.loading import build_model, explain_missing, open_weights
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.recipe import Dtype

CUDA = torch.device("cuda")

PACKED: list[tuple[Dtype, KernelPlan]] = [
    ("float16", KernelPlan.PACKED_FUSED),
    ("float16", KernelPlan.PACKED_VARLEN),
    ("fp8", KernelPlan.PACKED_FP8),
]
BFLOAT16: list[tuple[Dtype, KernelPlan]] = [
    ("bfloat16", KernelPlan.PACKED_FUSED),
    ("bfloat16", KernelPlan.PACKED_VARLEN),
]


def load_under(folder: Path, dtype: Dtype, plan: KernelPlan) -> FastEsm:
    """A checkpoint on the GPU under a given plan; skips the test where that does not run."""
    if plan.fused and (missing := explain_missing(CUDA)):
        pytest.skip(missing)
    return build_model(open_weights(inspect_checkpoint(folder)), CUDA, dtype, plan)


@pytest.fixture(params=PACKED, ids="-".join)
def packed_model(demo_checkpoint: Path, request: pytest.FixtureRequest) -> FastEsm:
    """The demonstration checkpoint under each packed plan."""
    return load_under(demo_checkpoint, *request.param)


@pytest.fixture(params=[*PACKED, *BFLOAT16], ids="-".join)
def any_packed_model(demo_checkpoint: Path, request: pytest.FixtureRequest) -> FastEsm:
    """The same, and in bfloat16."""
    return load_under(demo_checkpoint, *request.param)


@pytest.fixture
def limit_memory() -> Iterator[Callable[[int], None]]:
    """Caps what this process may allocate beyond what it holds, in bytes; undone afterwards."""

    def limit(more: int) -> None:
        torch.cuda.synchronize()
        gc.collect()  # an EsmModel refers to itself: what it holds would be room later
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(CUDA).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
