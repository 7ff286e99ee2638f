"""Compressed inputs that unpack to far more than they are: stopped by a stated limit, in bounded memory."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from tests.fasta_files import BGZIP_END, bgzip_block, compress
from virnucpro_core.errors import InputError
from virnucpro_core.sequences import scan as module
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.scan import ScannedInput, scan_input

pytestmark = pytest.mark.unit

COMPRESSED = [Compression.GZIP, Compression.BGZIP, Compression.ZSTD]
MEBIBYTE = 1 << 20


def make_bomb(compression: Compression) -> bytes:
    """A record of more than a gigabyte, in about a megabyte or less."""
    match compression:
        case Compression.GZIP:
            return gzip.compress(b">a\n") + gzip.compress(b"M" * (16 << 20), 9) * 70
        case Compression.BGZIP:
            return bgzip_block(b">a\n") + bgzip_block(b"M" * 65_280) * 17_000 + BGZIP_END
        case _:
            return zstandard.compress(b">a\n") + zstandard.compress(b"M" * (64 << 20)) * 17


def scan(content: bytes, folder: Path, **options: float) -> ScannedInput:
    (folder / "input").write_bytes(content)
    return scan_input(
        folder / "input",
        chunk_tokens=1000,
        spool_root=folder / "spool",
        max_expansion=options.get("limit", 250),
    )


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_bomb_is_stopped_long_before_its_end(tmp_path: Path, compression: Compression) -> None:
    bomb = make_bomb(compression)
    assert len(bomb) < 3 * MEBIBYTE
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="unpacks to more than") as caught:
            scan(bomb, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 * MEBIBYTE  # a chunk, and twice what a kilobyte of zstd unpacks to
    assert "VIRNUCPRO_MAX_EXPANSION" in caught.value.todo
    assert str(tmp_path / "input") in caught.value.where
    assert not list((tmp_path / "spool").glob("*"))


@pytest.mark.parametrize("compression", COMPRESSED)
def test_the_limit_is_a_multiple_of_the_files_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Compression
) -> None:
    monkeypatch.setattr(module, "FREE_BYTES", 0)
    data = b">a\n" + b"M" * 10_000
    content = compress(data, compression, len(data))
    share = len(data) / len(content)
    assert scan(content, tmp_path, limit=share + 0.01).residues == 10_000
    with pytest.raises(InputError, match="unpacks to more than"):
        scan(content, tmp_path, limit=share - 0.01)


def test_what_is_compressible_at_its_start_alone_is_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FREE_BYTES", 0)
    even, odd = b">a\n" + b"M" * 100_000 + b"\n", b">b\n" + bytes(65 + (k * k) % 23 for k in range(100_000))
    content = gzip.compress(even) + gzip.compress(odd, 0)
    assert len(even) > 100 * len(gzip.compress(even))
    assert scan(content, tmp_path, limit=3).records == 2


@pytest.mark.parametrize("compression", COMPRESSED)
def test_a_small_file_may_unpack_as_far_as_it_likes(tmp_path: Path, compression: Compression) -> None:
    data = b">a\n" + b"M" * (module.FREE_BYTES // 8)
    content = compress(data, compression, 60_000 if compression is Compression.BGZIP else len(data))
    assert len(data) > 250 * len(content)
    assert scan(content, tmp_path).residues == module.FREE_BYTES // 8


def frame_with_window(exponent: int) -> bytes:
    """A zstd frame that asks for a window of 2^(10 + exponent) bytes, with one block of a letter many times."""
    block = (1 << 1 | 100_000 << 3 | 1).to_bytes(3, "little")  # last, run-length, 100,000 bytes
    return struct.pack("<IBB", 0xFD2FB528, 0, exponent << 3) + block + b"M"


def test_zstd_windows(tmp_path: Path) -> None:
    header = zstandard.compress(b">a\n")
    assert scan(header + frame_with_window(17), tmp_path).residues == 100_000  # 128 MiB, `zstd --long=27`
    for exponent in (18, 21, 31):  # 256 MiB, 2 GiB, 2 TiB
        with pytest.raises(InputError, match="window of more than 128 MiB") as caught:
            scan(header + frame_with_window(exponent), tmp_path)
        assert "--long" in caught.value.todo


def test_a_long_window_as_the_tool_makes_it(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    file = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(file, closefd=False) as writer:
        writer.write(b">a\n" + b"MKLV" * 1000)
    with pytest.raises(InputError, match="window of more than 128 MiB"):
        scan(file.getvalue(), tmp_path)
