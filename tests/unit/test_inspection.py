"""What an input's records will come to, counted while it streams by."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from virnucpro_core.recipe import ResiduePolicy
from virnucpro_core.sequences.fasta import parse_records
from virnucpro_core.sequences.inspection import RecordInspector
from virnucpro_core.sequences.scan import scan_input

pytestmark = pytest.mark.unit

MIXED = (
    b"\n>a one\nMKV\nLAG*\n>b\r\nMJ>V\r\n>\nMK\n>empty\n>digits\nMK1V\n>cut\n"
    + b"MKVLAGIC" * 4
    + b"\n>\xff\nMK\n>z\nMJJ"
)


@pytest.mark.parametrize("residues", ["unknown", "strict"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_counts_do_not_depend_on_blocks(residues: ResiduePolicy, size: int) -> None:
    inspector = RecordInspector(residues=residues, truncation=20)
    for start in range(0, len(MIXED), size):
        inspector.feed(MIXED[start : start + size])
    inspector.finish()
    whole = parse_records(MIXED, first_record=1, residues=residues, truncation=20)
    assert inspector.records == len(whole.ids) == 8
    assert inspector.embeddings == len(whole.rows)
    assert sorted(inspector.rejects.elements()) == sorted(failure.reason for failure in whole.failures)
    assert (inspector.truncated, inspector.unknown) == (whole.truncated, whole.unknown)
    assert inspector.truncated == 1
    assert inspector.tokens == len(whole.tokens) + 2 * len(whole.rows)
    assert inspector.id_bytes == sum(len(whole.ids[row]) for row in whole.rows)
    assert inspector.bytes == len(MIXED)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.fasta"
    letters = random.Random(3)
    record = "".join(letters.choices("ACDEFGHIKLMNPQRSTVWY", k=20_000))
    peaks = []
    for copies in (300, 1200):
        path.write_text("".join(f">r{k}\n{record}\n" for k in range(copies)))
        inspector = RecordInspector(residues="unknown", truncation=1024)
        tracemalloc.start()
        scan_input(path, chunk_tokens=10_000, spool_root=None, on_block=inspector.feed)
        inspector.finish()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (inspector.records, inspector.truncated) == (copies, copies)
    assert peaks[1] < 1.2 * peaks[0] + 2_000_000
    assert peaks[1] < path.stat().st_size
