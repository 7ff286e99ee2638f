"""On a GPU whose memory others hold, a model that does not fit says so, whatever part of CUDA noticed first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures_gpu import CUDA
from tests.merged_bytes import write_proteins
from virnucpro_core.embedding.loading import choose_plan, load_fast_esm
from virnucpro_core.errors import ExecutionError
from virnucpro_core.recipe import Dtype

pytestmark = pytest.mark.gpu

MIB = 1 << 20

IN_ANOTHER_PROCESS = """
import sys
from virnucpro_core.embedding.extraction import extract
from virnucpro_core.embedding.loading import load_fast_esm
from virnucpro_core.errors import ExecutionError

checkpoint, dtype, fasta = sys.argv[1:]
try:
    model = load_fast_esm(checkpoint, device="cuda", dtype=dtype)
except ExecutionError as error:
    print(error)
    sys.exit(5)
print(model.plan, len(extract(fasta, model).failures))
"""


@pytest.fixture
def fasta(make_proteins: Callable[..., list[str]], tmp_path: Path) -> Path:
    return write_proteins(tmp_path / "proteins.fasta", make_proteins(50, 166, 510))


@pytest.fixture
def leave_memory() -> Iterator[Callable[[int], None]]:
    """Takes the GPU's memory but for so many bytes; given back afterwards."""
    held: list[torch.Tensor] = []

    def leave(left: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(CUDA)
        while free > left + 2 * MIB:
            held.append(torch.empty((free - left) // MIB // 2 * 2 * MIB, dtype=torch.uint8, device=CUDA))
            free, _ = torch.cuda.mem_get_info(CUDA)

    yield leave
    held.clear()
    torch.cuda.empty_cache()


def test_a_model_that_exceeds_the_cap_is_refused_and_leaves_nothing(
    demo_checkpoint: Path, limit_memory: Callable[[int], None]
) -> None:
    limit_memory(20 * MIB)
    before = torch.cuda.memory_allocated()
    with pytest.raises(ExecutionError, match=r"no memory for the model: .* \[cuda"):
        load_fast_esm(demo_checkpoint, device="cuda")
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    ("dtype", "left", "missing"),
    [
        ("float16", 16, "CUDA's context"),
        ("float16", 560, "the weights"),
        ("float16", 660, "the kernels' code"),
        ("float16", 760, "cuBLAS's workspace"),
        ("float32", 740, "the kernels' code"),
        ("float32", 800, "cuBLAS's workspace"),
    ],
)
def test_a_full_gpu_is_said_in_words_and_never_changes_the_plan(
    demo_checkpoint: Path,
    fasta: Path,
    leave_memory: Callable[[int], None],
    dtype: Dtype,
    left: int,
    missing: str,
) -> None:
    """How many MiB leave room for what depends on the driver; then all of it may fit, and the plan is the usual one."""
    usual = choose_plan(CUDA, dtype)
    leave_memory(left * MIB)
    ended = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(demo_checkpoint), dtype, str(fasta)],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode == 0:
        assert left > 500, f"there cannot have been room for {missing}"
        assert ended.stdout.split()[-2:] == [usual, "0"]
    else:
        assert ended.returncode == 5, ended.stderr
        assert "there is no memory for the model" in ended.stdout
        assert "End what else uses this GPU" in ended.stdout
