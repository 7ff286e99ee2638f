"""On a GPU the merged file has the same bytes however its records were cut, ordered, packed and split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.merged_bytes import WAYS, merge_file, write_proteins
from virnucpro_core.embedding.model import FastEsm

pytestmark = pytest.mark.gpu


@pytest.fixture
def fasta(make_proteins: Callable[..., list[str]], tmp_path: Path) -> Path:
    lengths = (1, 2, 20, 50, 51, 127, 128, 165, 166, 333, 777, 1024) * 10
    return write_proteins(tmp_path / "proteins.fasta", make_proteins(*lengths))


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_cutting_changes_a_byte(
    any_half_model: FastEsm, fasta: Path, tmp_path: Path, way: str
) -> None:
    expected = merge_file(fasta, tmp_path / "expected", any_half_model)
    assert merge_file(fasta, tmp_path / "other", any_half_model, way) == expected


def test_packs_that_were_halved_change_no_byte(
    any_half_model: FastEsm, fasta: Path, tmp_path: Path, limit_memory: Callable[[int], None]
) -> None:
    expected = merge_file(fasta, tmp_path / "expected", any_half_model)
    limit_memory(100 << 20)
    assert merge_file(fasta, tmp_path / "other", any_half_model) == expected
    assert any_half_model.fitting_tokens is not None
