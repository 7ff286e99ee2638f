"""A file's merged matrix, made in chunks of any size and order: none of that may show in its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from virnucpro_core.embedding.extraction import InputRange, extract
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.features.matrices import write_matrix
from virnucpro_core.features.merging import merge_chunks
from virnucpro_core.sequences.scan import ChunkRange, scan_input

Order = Callable[[tuple[ChunkRange, ...]], Iterable[ChunkRange]]

WAYS: dict[str, tuple[int, Order, int | None]] = {
    "one chunk": (10**9, tuple, None),
    "a chunk per record": (1, tuple, None),
    "small chunks, last first": (1000, reversed, None),
    "small chunks and packs": (3000, tuple, 512),
}
"""Tokens of a chunk, the order in which chunks are computed, and tokens of a pack."""


def write_proteins(path: Path, sequences: list[str]) -> Path:
    """Writes a FASTA file in which each record has an id of its own."""
    path.write_text("".join(f">protein_{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    return path


def merge_file(fasta: Path, folder: Path, model: FastEsm, way: str = "one chunk") -> str:
    """sha256 of the matrix that a file's chunks merge to.

    Args:
        fasta: the file.
        folder: a new folder for all that is written.
        model: what computes.
        way: a key of `WAYS`.
    """
    chunk_tokens, order, toks_per_batch = WAYS[way]
    folder.mkdir()
    scanned = scan_input(fasta, chunk_tokens=chunk_tokens, spool_root=folder)
    parts = {}
    for chunk in order(scanned.chunks):
        source = InputRange(scanned.location, scanned.compression, chunk)
        done = extract(source, model, toks_per_batch=toks_per_batch)
        path = folder / f"{chunk.ordinal}.safetensors"
        written = write_matrix(
            path, done.ids, done.records, done.embeddings, {"input_sha256": scanned.sha256}
        )
        parts[chunk.ordinal] = (path, written.sha256)
    return merge_chunks([parts[ordinal] for ordinal in sorted(parts)], folder / "merged.safetensors").sha256
