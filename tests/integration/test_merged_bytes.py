"""On a CPU the merged file has the same bytes however its records were cut into chunks and ordered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.merged_bytes import WAYS, merge_file, write_proteins
from virnucpro_core.embedding.model import FastEsm

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_cutting_changes_a_byte(
    demo_model: FastEsm, make_proteins: Callable[..., list[str]], tmp_path: Path, way: str
) -> None:
    fasta = write_proteins(
        tmp_path / "proteins.fasta", make_proteins(*(1, 2, 7, 50, 130, 166, 400, 1024) * 3)
    )
    expected = merge_file(fasta, tmp_path / "expected", demo_model)
    assert merge_file(fasta, tmp_path / "other", demo_model, way) == expected
