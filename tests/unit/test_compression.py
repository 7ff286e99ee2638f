"""Compressed streams."""

from __future__ import annotations

import gzip
import io
import struct
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fasta_files import BGZIP_END, bgzip_block, compress
from virnucpro_core.errors import InputError
from virnucpro_core.sequences import compression as module
from virnucpro_core.sequences.compression import (
    BgzipDecoder,
    Compression,
    detect_compression,
    make_decoder,
    read_blocks,
)

pytestmark = pytest.mark.unit

COMPRESSED = [Compression.GZIP, Compression.BGZIP, Compression.ZSTD]


def decode(raw: bytes, compression: Compression) -> bytes:
    """Decodes a whole file, and checks on the way that the raw bytes are all reported."""
    reported: list[bytes] = []
    decoded = b"".join(read_blocks(io.BytesIO(raw), make_decoder(compression), reported.append))
    assert b"".join(reported) == raw
    return decoded


@pytest.mark.parametrize("compression", Compression)
@settings(deadline=None)
@given(data=st.binary(max_size=300), piece=st.integers(1, 300))
def test_what_was_compressed_comes_back(compression: Compression, data: bytes, piece: int) -> None:
    assert decode(compress(data, compression, piece), compression) == data


@pytest.mark.parametrize("compression", Compression)
def test_compression_is_told_by_magic_bytes(compression: Compression) -> None:
    assert detect_compression(compress(b">a\nMK\n", compression)) is compression


@pytest.mark.parametrize("head", [b"", b"\x1f", b"(", b">a\nMK\n", b"(\xb5/"])
def test_anything_else_is_plain(head: bytes) -> None:
    assert detect_compression(head) is Compression.PLAIN


def test_a_skippable_frame_begins_zstd() -> None:
    raw = struct.pack("<2I", 0x184D2A5E, 3) + b"abc" + zstandard.compress(b">a\nMK\n")
    assert detect_compression(raw) is Compression.ZSTD
    assert decode(raw, Compression.ZSTD) == b">a\nMK\n"


def test_zeros_behind_gzip_are_padding() -> None:
    assert decode(gzip.compress(b"MK") + bytes(100), Compression.GZIP) == b"MK"


@pytest.mark.parametrize("compression", COMPRESSED)
def test_blocks_are_large_and_bounded_however_small_or_large_the_pieces(
    compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    for piece in (3, 60_000):
        raw = compress(bytes(120_000), compression, piece)
        sizes = [
            len(block) for block in read_blocks(io.BytesIO(raw), make_decoder(compression), lambda _: None)
        ]
        assert sum(sizes) == 120_000
        assert min(sizes[:-1]) >= 1000
        # A block of bgzip is at most 64 KiB, a block of zstd at most 128 KiB.
        assert max(sizes) <= 1000 + (1 << 17)


def find_fault(raw: bytes, compression: Compression) -> InputError | None:
    try:
        decode(raw, compression)
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("compression", COMPRESSED)
def test_every_cut_is_noticed(compression: Compression) -> None:
    raw = compress(b">a\nMKLV\n>b\nMK\n", compression, 8)
    faults = [find_fault(raw[:cut], compression) for cut in range(1, len(raw))]
    # Between two members of gzip or frames of zstd a file may end; bgzip's end marker tells even that.
    assert faults.count(None) == (0 if compression is Compression.BGZIP else 1)
    assert all("cut off" in fault.what and fault.where.startswith("byte ") for fault in faults if fault)


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.BGZIP])
def test_no_flipped_bit_gives_other_data(compression: Compression) -> None:
    data = bytes(range(64))
    raw = compress(data, compression, 30)
    noticed = 0
    for position in range(2, len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 0x10
        fault = find_fault(bytes(damaged), compression)
        noticed += fault is not None
        # A header has fields, and a stream has padding, that change nothing.
        assert fault is not None or decode(bytes(damaged), compression) == data
        assert fault is None or fault.where.startswith("byte ")
    assert noticed > len(raw) // 2


@pytest.mark.parametrize("compression", COMPRESSED)
def test_garbage_behind_the_stream_is_an_error(compression: Compression) -> None:
    with pytest.raises(InputError, match="corrupt"):
        decode(compress(b">a\nMK\n", compression) + b"garbage of more than 18 bytes", compression)


def test_damaged_zstd_with_a_checksum_is_noticed() -> None:
    raw = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b"MK" * 500 + bytes(range(200))))
    raw[-20] ^= 1
    with pytest.raises(InputError, match="zstd stream is corrupt"):
        decode(bytes(raw), Compression.ZSTD)


def test_a_bgzip_block_larger_than_it_may_be_is_corrupt() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = deflate.compress(bytes(70_000)) + deflate.flush()
    header = struct.pack("<4BI2BH2s2H", 31, 139, 8, 4, 0, 0, 255, 6, b"BC", 2, len(payload) + 25)
    block = header + payload + struct.pack("<2I", zlib.crc32(bytes(70_000)), 70_000)
    with pytest.raises(InputError, match="bgzip stream is corrupt"):
        decode(block + BGZIP_END, Compression.BGZIP)


def test_virtual_offsets_lead_back_to_the_byte() -> None:
    pieces = [b"first", b"", b"second", b"third"]
    blocks = [bgzip_block(piece) for piece in pieces]
    decoder = BgzipDecoder()
    data = b"".join(read_blocks(io.BytesIO(b"".join(blocks) + BGZIP_END), decoder, lambda _: None))
    for position in range(len(data)):
        virtual = decoder.find_virtual_offset(position)
        raw = b"".join(blocks)[virtual >> 16 :] + BGZIP_END
        assert decode(raw, Compression.BGZIP)[virtual & 0xFFFF :] == data[position:]
