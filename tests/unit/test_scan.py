"""Registration's pass over a file: checksums, counts, chunks, and the faults of a file as a whole."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import sys
import tempfile
import tracemalloc
from pathlib import Path

import dnaio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fasta_files import BGZIP_END, compress, messy_fasta, read_naively, valid_records, write_records
from virnucpro_core.errors import ArtifactError, InputChangedError, InputError, NucleotideInputError
from virnucpro_core.sequences import chunks as chunks_module
from virnucpro_core.sequences import compression as compression_module
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.fasta import parse_records
from virnucpro_core.sequences.residues import ENCODE
from virnucpro_core.sequences.scan import ScannedInput, read_range, scan_input

pytestmark = pytest.mark.unit

SMALL = b">a one\nMKLV\nMK\n>b\nLLL*\n>c\nVV\n"


def scan_bytes(
    data: bytes, folder: Path, *, chunk_tokens: int = 1000, truncation: int = 1024
) -> ScannedInput:
    path = folder / "input.fasta"
    path.write_bytes(data)
    return scan_input(
        path,
        chunk_tokens=chunk_tokens,
        truncation=truncation,
        spool_root=folder / "spool",
        allow_nucleotides=True,
    )


def read_chunks(scanned: ScannedInput) -> list[bytes]:
    return [read_range(scanned.location, scanned.compression, chunk) for chunk in scanned.chunks]


def test_a_small_file(tmp_path: Path) -> None:
    scanned = scan_bytes(SMALL, tmp_path, chunk_tokens=13)
    assert scanned.path == scanned.location == str(tmp_path / "input.fasta")
    assert (scanned.sha256, scanned.size) == (hashlib.sha256(SMALL).hexdigest(), len(SMALL))
    assert (scanned.compression, scanned.records, scanned.residues) == (Compression.PLAIN, 3, 11)
    first, second = scanned.chunks
    # 6 + 2 and 3 + 2 tokens fill 13 exactly.
    assert (first.ordinal, first.first_record, first.records, first.residues) == (0, 1, 2, 9)
    assert (second.ordinal, second.first_record, second.records, second.residues) == (1, 3, 1, 2)
    assert (first.byte_start, first.byte_end, second.byte_end) == (0, second.byte_start, len(SMALL))
    assert first.virtual_start is None
    assert first.sha256 == hashlib.sha256(SMALL[: first.byte_end]).hexdigest()


def test_truncated_residues_cost_no_tokens(tmp_path: Path) -> None:
    data = b">a\n" + b"M" * 100 + b"\n>b\n" + b"K" * 100
    assert len(scan_bytes(data, tmp_path, chunk_tokens=24, truncation=10).chunks) == 1
    assert len(scan_bytes(data, tmp_path, chunk_tokens=23, truncation=10).chunks) == 2


def test_a_record_over_the_budget_is_a_chunk_alone(tmp_path: Path) -> None:
    data = b">a\nMK\n>long\n" + b"M" * 50 + b"\n>b\nMK\n>c\nMK\n"
    scanned = scan_bytes(data, tmp_path, chunk_tokens=10)
    assert [chunk.records for chunk in scanned.chunks] == [1, 1, 2]


def test_bytes_bound_a_chunk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 12)
    monkeypatch.setattr(compression_module, "BLOCK_BYTES", 5)
    data = b">a\nMK\n>b\nMK\n>c\nMK\n>long\n" + b"M" * 50 + b"\n>d\nMK\n"
    scanned = scan_bytes(data, tmp_path)
    assert [chunk.records for chunk in scanned.chunks] == [2, 1, 1, 1]
    assert b"".join(read_chunks(scanned)) == data


@pytest.mark.parametrize("compression", Compression)
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b">some\nMKLVMKLVMKLV\n" * 400_000, id="many records"),
        pytest.param(b">small\nMK\n>giant\n" + b"MKLV" * 2_000_000, id="a giant record"),
        pytest.param(b">small\nMK\n>" + b"header " * 1_200_000, id="a giant header"),
    ],
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, compression: Compression
) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 1 << 19)
    monkeypatch.setattr(compression_module, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "input.fasta"
    path.write_bytes(compress(data, compression, 60_000))
    tracemalloc.start()
    try:
        scan_input(path, chunk_tokens=10_000, spool_root=tmp_path / "spool")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(data) // 2


def test_blank_lines_before_the_first_header_belong_to_no_chunk(tmp_path: Path) -> None:
    scanned = scan_bytes(b"\n \r\n>a\nMK\n", tmp_path)
    assert read_chunks(scanned) == [b">a\nMK\n"]


@given(
    records=valid_records,
    width=st.sampled_from([7, 60, 1000]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    compression=st.sampled_from(Compression),
    chunk_tokens=st.integers(1, 300),
    block=st.sampled_from([1, 10, 1 << 20]),
)
def test_scan_read_and_parse_give_what_dnaio_reads(
    records: list[tuple[str, str, str]],
    width: int,
    line_end: str,
    compression: Compression,
    chunk_tokens: int,
    block: int,
) -> None:
    data = write_records(records, width=width, line_end=line_end)
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(compression_module, "BLOCK_BYTES", block)
        scanned = scan_bytes(compress(data, compression), Path(folder), chunk_tokens=chunk_tokens)
        ranges = read_chunks(scanned)
    assert scanned.compression is compression
    assert b"".join(ranges) == data
    batches = [
        parse_records(part, first_record=chunk.first_record)
        for part, chunk in zip(ranges, scanned.chunks, strict=True)
    ]
    with dnaio.open(io.BytesIO(data), fileformat="fasta") as reader:
        expected = [(record.id, record.sequence) for record in reader]
    assert [record_id for batch in batches for record_id in batch.ids] == [
        record_id for record_id, _ in expected
    ]
    residues = "".join(sequence for _, sequence in expected)
    assert b"".join(batch.tokens.tobytes() for batch in batches) == residues.encode().translate(
        ENCODE.tobytes()
    )
    assert scanned.residues == len(residues)


@given(
    data=messy_fasta,
    chunk_tokens=st.integers(1, 40),
    chunk_bytes=st.integers(1, 60),
    block=st.integers(1, 40),
)
def test_any_budget_and_any_block_keep_every_record(
    data: bytes, chunk_tokens: int, chunk_bytes: int, block: int
) -> None:
    data = b">first\n" + data
    expected = [len(residues) for _, residues in read_naively(data)]
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(chunks_module, "CHUNK_BYTES", chunk_bytes)
        whole = scan_bytes(data + b"\n", Path(folder), chunk_tokens=chunk_tokens, truncation=9)
        monkeypatch.setattr(compression_module, "BLOCK_BYTES", block)
        scanned = scan_bytes(data + b"\n", Path(folder), chunk_tokens=chunk_tokens, truncation=9)
        assert b"".join(read_chunks(scanned)) == data + b"\n"
    assert scanned == whole
    assert (scanned.records, scanned.residues) == (len(expected), sum(expected))
    done = 0
    for ordinal, chunk in enumerate(scanned.chunks):
        lengths = expected[done : done + chunk.records]
        assert (chunk.ordinal, chunk.first_record, chunk.residues) == (ordinal, done + 1, sum(lengths))
        tokens = sum(min(length, 9) + 2 for length in lengths)
        size = chunk.byte_end - chunk.byte_start
        assert chunk.records == 1 or (tokens <= chunk_tokens and size <= chunk_bytes)
        done += chunk.records
    assert done == len(expected)


def test_bgzip_ranges_are_read_in_place(tmp_path: Path) -> None:
    data = b"".join(b">%d\nMKLVMKLVMKLV\n" % i for i in range(50))
    scanned = scan_bytes(compress(data, Compression.BGZIP, 33), tmp_path, chunk_tokens=60)
    assert scanned.location == scanned.path
    assert all(chunk.virtual_start is not None for chunk in scanned.chunks)
    assert b"".join(read_chunks(scanned)) == data
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_gzip_and_zstd_are_spooled_once_by_content(tmp_path: Path, compression: Compression) -> None:
    raw = compress(SMALL, compression)
    scanned = scan_bytes(raw, tmp_path)
    name = f"{hashlib.sha256(raw).hexdigest()}.fasta"
    assert scanned.location == str(tmp_path / "spool" / name)
    assert Path(scanned.location).read_bytes() == SMALL
    assert scan_bytes(raw, tmp_path) == scanned
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [name]


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.BGZIP, Compression.ZSTD])
def test_a_cut_off_file_names_line_and_byte_and_leaves_nothing(
    tmp_path: Path, compression: Compression
) -> None:
    # The first two pieces end in line 5; of the third only five bytes are left.
    whole = len(compress(SMALL[:20], compression, 10)) - (
        len(BGZIP_END) if compression is Compression.BGZIP else 0
    )
    with pytest.raises(InputError, match="cut off") as caught:
        scan_bytes(compress(SMALL, compression, 10)[: whole + 5], tmp_path)
    byte = whole if compression is Compression.BGZIP else whole + 5
    assert caught.value.where == f"{tmp_path / 'input.fasta'}, line 5, byte {byte} of the file"
    assert not list(tmp_path.glob("spool/*"))


def test_progress_ends_at_the_size_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_module, "BLOCK_BYTES", 10)
    path = tmp_path / "a.gz"
    path.write_bytes(compress(SMALL, Compression.GZIP))
    seen: list[int] = []
    scan_input(path, chunk_tokens=100, spool_root=tmp_path / "spool", on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == path.stat().st_size


NUCLEOTIDES = b">read\nACGTACGTTTGACCANNACGTAGGACCTTAGACCAGT\n"


@pytest.mark.parametrize(
    ("data", "message", "line"),
    [
        pytest.param(b"", "is empty", 1, id="empty"),
        pytest.param(compress(b"", Compression.GZIP), "is empty", 1, id="empty gzip"),
        pytest.param(b"\n \n\n", "no FASTA", 4, id="blank"),
        pytest.param(b"\nhello\nworld\n", "no FASTA", 2, id="text"),
        pytest.param(b"@read\nMK\n+\nII\n", "FASTQ", 1, id="FASTQ"),
        pytest.param(b"PK\x03\x04\0\0\0>\n>", "binary", 1, id="zip"),
        pytest.param(">a\nMK\n".encode("utf-16"), "binary", 1, id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf>a\nMK\n", "byte-order mark", 1, id="byte-order mark"),
        pytest.param(b"\n\nMKLV\n>a\nMK\n", "before the first header", 3, id="sequence first"),
        pytest.param(b"\n >a\nMK\n", "white space before the first header", 2, id="an indented header"),
        pytest.param(b">a\rMK\r>b\rMK\r", "carriage returns", 1, id="CR alone"),
        pytest.param(b"\n" + NUCLEOTIDES, "nucleotides", 2, id="nucleotides"),
        pytest.param(b"\n" + NUCLEOTIDES.lower(), "nucleotides", 2, id="nucleotides in lower case"),
    ],
)
def test_faults_of_the_file_name_it_and_the_line(
    tmp_path: Path, data: bytes, message: str, line: int
) -> None:
    path = tmp_path / "input.fasta"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        scan_input(path, chunk_tokens=100, spool_root=tmp_path / "spool")
    assert caught.value.where == f"{path}, line {line}"
    assert caught.value.todo
    assert not list(tmp_path.glob("spool/*"))


def test_nucleotides_pass_when_allowed_and_few_letters_prove_nothing(tmp_path: Path) -> None:
    path = tmp_path / "input.fasta"
    path.write_bytes(NUCLEOTIDES)
    with pytest.raises(NucleotideInputError):
        scan_input(path, chunk_tokens=100, spool_root=tmp_path)
    assert scan_input(path, chunk_tokens=100, spool_root=tmp_path, allow_nucleotides=True).records == 1
    path.write_bytes(b">peptide\nGGCAGGTAC\n")
    assert scan_input(path, chunk_tokens=100, spool_root=tmp_path).records == 1
    path.write_bytes(b">a protein\n" + b"MKLVWEDRSPQ" * 3 + b"ACGT" * 60 + b"\n")
    assert scan_input(path, chunk_tokens=100, spool_root=tmp_path).records == 1


def test_no_file_a_folder_a_pipe_and_a_loop(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / os.fsdecode(b"latin-\xe9")).touch()
    for name, message in [
        ("missing", "no such file"),
        (".", "folder"),
        ("pipe", "not a regular file"),
        ("loop", "cannot be opened"),
        (os.fsdecode(b"latin-\xe9"), "not UTF-8"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            scan_input(tmp_path / name, chunk_tokens=100, spool_root=tmp_path)
        assert str(tmp_path) in caught.value.where


def test_a_spool_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    with pytest.raises(ArtifactError, match="spool cannot be written") as caught:
        scan_bytes(compress(SMALL, Compression.GZIP), tmp_path)
    assert caught.value.where == str(tmp_path / "spool")


def test_a_full_disk_leaves_no_copy(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ArtifactError, match="spool cannot be written"):
            scan_bytes(compress(b">a\n" + b"M" * 100_000, Compression.GZIP, 100_000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list((tmp_path / "spool").iterdir())


def test_a_file_written_to_during_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "input.fasta"
    path.write_bytes(SMALL)

    def append(_: int) -> None:
        if path.stat().st_size == len(SMALL):
            with path.open("ab") as file:
                file.write(b">d\nMK\n")

    with pytest.raises(InputChangedError, match="written to during the scan"):
        scan_input(path, chunk_tokens=100, spool_root=tmp_path, on_progress=append)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file whose first byte cannot be read")
def test_a_disk_that_fails_at_the_first_byte_is_named_with_the_file() -> None:
    with pytest.raises(InputError, match="cannot be read: Input/output error") as caught:
        scan_input("/proc/self/mem", chunk_tokens=100, spool_root=None)
    assert caught.value.where == "/proc/self/mem, line 1"


@pytest.mark.parametrize("compression", Compression)
def test_a_range_that_changed_is_noticed(tmp_path: Path, compression: Compression) -> None:
    scanned = scan_bytes(compress(SMALL, compression), tmp_path, chunk_tokens=8)
    path = Path(scanned.location)
    spooled = compression in (Compression.GZIP, Compression.ZSTD)
    changed = SMALL.replace(b"LLL", b"LLK")
    path.write_bytes(changed if spooled else compress(changed, compression))
    assert read_range(path, compression, scanned.chunks[0]) == SMALL[: scanned.chunks[0].byte_end]
    with pytest.raises(InputChangedError) as caught:
        read_range(path, compression, scanned.chunks[1])
    assert "records 2 to 2" in caught.value.where
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(InputChangedError):
        read_range(path, compression, scanned.chunks[0])
    path.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file") as missing:
        read_range(path, compression, scanned.chunks[0])
    assert not isinstance(missing.value, InputChangedError)
