"""Halving a chunk: what is cut is read again, record for record, down to single ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fasta_files import compress, messy_fasta, valid_records, write_records
from virnucpro_core.errors import InputChangedError, InputError
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.halving import halve
from virnucpro_core.sequences.scan import ScannedInput, read_range, scan_input

pytestmark = pytest.mark.unit

fasta = st.one_of(
    st.builds(write_records, valid_records, width=st.just(7), line_end=st.sampled_from(["\n", "\r\n"])),
    messy_fasta.map(lambda data: b">first\nMKV\n" + data),
)


def read(scanned: ScannedInput, chunk: ChunkRange) -> RecordBatch:
    data = read_range(scanned.location, scanned.compression, chunk)
    return parse_records(data, first_record=chunk.first_record)


def single_records(scanned: ScannedInput, chunk: ChunkRange) -> Iterator[ChunkRange]:
    if chunk.records == 1:
        yield chunk
        return
    first, second = halve(scanned.location, scanned.compression, chunk)
    assert first.byte_start == chunk.byte_start
    assert first.byte_end == second.byte_start
    assert second.byte_end == chunk.byte_end
    assert (first.first_record, second.first_record) == (
        chunk.first_record,
        chunk.first_record + first.records,
    )
    assert first.records + second.records == chunk.records
    assert abs(first.records - second.records) <= 1
    assert first.residues + second.residues == chunk.residues
    yield from single_records(scanned, first)
    yield from single_records(scanned, second)


@given(fasta, st.sampled_from([Compression.PLAIN, Compression.GZIP, Compression.BGZIP]), st.integers(20, 400))
def test_halves_hold_what_the_whole_holds(data: bytes, compression: Compression, chunk_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.fasta")
        path.write_bytes(compress(data, compression))
        scanned = scan_input(path, chunk_tokens=chunk_tokens, spool_root=Path(folder), allow_nucleotides=True)
        for chunk in scanned.chunks:
            whole = read(scanned, chunk)
            parts = [read(scanned, part) for part in single_records(scanned, chunk)]
            assert [name for part in parts for name in part.ids] == whole.ids
            assert [failure for part in parts for failure in part.failures] == whole.failures
            assert b"".join(part.tokens.tobytes() for part in parts) == whole.tokens.tobytes()
            assert sum(part.residues for part in parts) == whole.residues


def test_changed_input_is_not_halved(tmp_path: Path) -> None:
    path = tmp_path / "in.fasta"
    path.write_bytes(b">a\nMKV\n>b\nMKVL\n")
    (chunk,) = scan_input(path, chunk_tokens=1000, spool_root=tmp_path).chunks
    path.write_bytes(b">a\nMKV\n>b\nMKVV\n")
    with pytest.raises(InputChangedError):
        halve(path, Compression.PLAIN, chunk)
    path.unlink()
    with pytest.raises(InputError):
        halve(path, Compression.PLAIN, chunk)
