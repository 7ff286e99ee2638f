"""What a file's results are named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from virnucpro_core.ledger.submissions import STEM_BYTES, name_stem


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("proteins.fasta", "proteins"),
        ("proteins.FAA.gz", "proteins"),
        ("a.b.fa.zst", "a.b"),
        ("proteins.txt", "proteins.txt"),
        (".fasta", ".fasta"),
        ("..fasta", "..fasta"),
        ("..faa.gz", "..faa"),
        ("é" * 200 + ".fasta", "é" * (STEM_BYTES // 2)),
    ],
)
def test_a_stem_is_the_name_without_suffixes_and_always_the_name_of_a_file(name: str, stem: str) -> None:
    assert name_stem(Path(name)) == stem
    assert Path(stem).name == stem
