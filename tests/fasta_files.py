"""FASTA for tests: a slow and obvious reader to compare with, and writers for each compression."""

from __future__ import annotations

import gzip
import struct
import zlib

import zstandard
from hypothesis import strategies as st

from virnucpro_core.sequences.compression import Compression

WHITESPACE = b" \t\n\v\f\r"
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def read_naively(data: bytes) -> list[tuple[bytes, bytes]]:
    """Returns header and residues (whitespace and one final `*` dropped) of each record, line by line."""
    records: list[list[bytes]] = []
    for line in data.split(b"\n"):
        if line.startswith(b">"):
            records.append([line[1:], b""])
        elif records:
            records[-1][1] += line.translate(None, WHITESPACE)
    return [(header, residues.removesuffix(b"*")) for header, residues in records]


def bgzip_block(data: bytes) -> bytes:
    """Returns one block of bgzip, as the SAM specification's section 4.1 lays it out."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    payload = deflate.compress(data) + deflate.flush()
    size = len(payload) + 26
    header = struct.pack("<4BI2BH2s2H", 31, 139, 8, 4, 0, 0, 255, 6, b"BC", 2, size - 1)
    return header + payload + struct.pack("<2I", zlib.crc32(data), len(data))


def compress(data: bytes, compression: Compression, piece: int = 40) -> bytes:
    """Compresses in several blocks, members or frames of `piece` bytes each."""
    pieces = [data[i : i + piece] for i in range(0, len(data), piece)] or [b""]
    match compression:
        case Compression.PLAIN:
            return data
        case Compression.GZIP:
            return b"".join(gzip.compress(p, mtime=0) for p in pieces)
        case Compression.BGZIP:
            return b"".join(map(bgzip_block, pieces)) + BGZIP_END
        case Compression.ZSTD:
            return b"".join(map(zstandard.compress, pieces))


AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"

valid_records = st.lists(
    st.tuples(
        st.text("abcXYZ019_|./-", min_size=1, max_size=12),
        st.text("ab =", max_size=6),
        st.text(AMINO_ACIDS + AMINO_ACIDS.lower() + "XBUZO", min_size=1, max_size=90),
    ),
    min_size=1,
    max_size=12,
)
"""Records as (id, description, residues) that every reader of FASTA takes."""


def write_records(
    records: list[tuple[str, str, str]], *, width: int, line_end: str, final: bool = True
) -> bytes:
    """Writes records in lines of `width` residues; without `final` the last line is not ended."""
    lines = []
    for record_id, description, residues in records:
        lines.append(f">{record_id} {description}" if description else f">{record_id}")
        lines += [residues[i : i + width] for i in range(0, len(residues), width)]
    return (line_end.join(lines) + (line_end if final else "")).encode()


messy_fasta = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b">",
                b"\n",
                b"\r",
                b"\r\n",
                b"\n>",
                b"\n>id",
                b"*",
                b"**\n",
                b" ",
                b"\t",
                b"J",
                b"\0",
                b"7",
                b"\xff",
            ]
        ),
        st.sampled_from(
            [
                b"MKLV",
                b"mk",
                b"\n\n\n",
                b"*\n>",
                b"*\r\n \n>x y",
                b">\xc3\xa9",
                b"\n>\xe9",
                b"\x0b\x1f",
                b"acgt",
            ]
        ),
    ),
    max_size=40,
).map(b"".join)
"""Bytes with every oddity that FASTA comes with, header or not."""
