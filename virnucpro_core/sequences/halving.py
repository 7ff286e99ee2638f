"""Halving: a chunk cut in two between records, to find the one that workers do not survive."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from virnucpro_core.roots import ANYWHERE, open_below
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import BgzipDecoder, Compression, read_blocks
from virnucpro_core.sequences.fasta import find_records
from virnucpro_core.sequences.scan import read_range


def halve(
    location: str | Path, compression: Compression, chunk: ChunkRange, *, roots: Sequence[Path] = ANYWHERE
) -> tuple[ChunkRange, ChunkRange]:
    """The two halves of a chunk that has several records. Both keep its ordinal.

    Args and errors are those of `read_range`.
    """
    data = read_range(location, compression, chunk, roots=roots)
    # As when it was cut and is parsed: the end of the range ends its last line.
    layout = find_records(np.frombuffer(data + b"\n", np.uint8), line_start=True, in_header=False)
    residues = layout.residues[1:] - layout.stars[1:]
    middle = chunk.records // 2
    cut = int(layout.starts[middle])
    virtual_start = chunk.virtual_start
    if virtual_start is not None:
        virtual_start = find_virtual_start(Path(location), virtual_start, cut, roots)
    first = replace(
        chunk,
        byte_end=chunk.byte_start + cut,
        records=middle,
        residues=int(residues[:middle].sum()),
        sha256=hashlib.sha256(data[:cut]).hexdigest(),
    )
    second = replace(
        chunk,
        byte_start=chunk.byte_start + cut,
        virtual_start=virtual_start,
        first_record=chunk.first_record + middle,
        records=chunk.records - middle,
        residues=int(residues[middle:].sum()),
        sha256=hashlib.sha256(data[cut:]).hexdigest(),
    )
    return first, second


def find_virtual_start(path: Path, virtual_start: int, position: int, roots: Sequence[Path]) -> int:
    """bgzip's virtual offset of the byte that lies `position` decoded bytes behind `virtual_start`."""
    first_block, within = divmod(virtual_start, 1 << 16)
    decoder = BgzipDecoder(first_block)
    decoded = 0
    with open_below(path, roots) as file:
        file.seek(first_block)
        for block in read_blocks(file, decoder, lambda _: None):
            decoded += len(block)
            if decoded > within + position:
                break
    return decoder.find_virtual_offset(within + position)
