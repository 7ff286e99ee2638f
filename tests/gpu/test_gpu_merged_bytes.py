"""On a GPU the merged file has the same bytes however its records were cut, ordered, packed and split."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.merged_bytes import WAYS, merge_file, write_proteins
from virnucpro_core.embedding.model import FastEsm

pytestmark = pytest.mark.gpu

IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from tests.fixtures_gpu import load_under
from tests.merged_bytes import merge_file
from virnucpro_core.embedding.execution import KernelPlan

checkpoint, dtype, plan, fasta, folder = sys.argv[1:]
model = load_under(Path(checkpoint), dtype, KernelPlan(plan))
print(merge_file(Path(fasta), Path(folder), model))
"""


@pytest.fixture
def fasta(make_proteins: Callable[..., list[str]], tmp_path: Path) -> Path:
    lengths = (1, 2, 20, 50, 51, 127, 128, 165, 166, 333, 777, 1024) * 10
    return write_proteins(tmp_path / "proteins.fasta", make_proteins(*lengths))


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_cutting_changes_a_byte(
    any_packed_model: FastEsm, fasta: Path, tmp_path: Path, way: str
) -> None:
    expected = merge_file(fasta, tmp_path / "expected", any_packed_model)
    assert merge_file(fasta, tmp_path / "other", any_packed_model, way) == expected


def test_packs_that_were_halved_change_no_byte(
    any_packed_model: FastEsm, fasta: Path, tmp_path: Path, limit_memory: Callable[[int], None]
) -> None:
    expected = merge_file(fasta, tmp_path / "expected", any_packed_model)
    limit_memory(100 << 20)
    assert merge_file(fasta, tmp_path / "other", any_packed_model) == expected
    assert any_packed_model.fitting_tokens is not None


def test_another_process_makes_the_same_bytes(
    demo_checkpoint: Path, packed_model: FastEsm, fasta: Path, tmp_path: Path
) -> None:
    expected = merge_file(fasta, tmp_path / "expected", packed_model)
    kind = packed_model.dtype, str(packed_model.plan)
    arguments = [str(demo_checkpoint), *kind, str(fasta), str(tmp_path / "other")]
    ended = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, text=True, check=True
    )
    assert ended.stdout.split()[-1] == expected
