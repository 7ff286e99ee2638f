"""The frame of a GPU benchmark: from a FASTA file to chunk artifacts, without queue and ledger.

It does what a worker does, in the worker's threads: while a chunk is computed, the next one is read and the
last one is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from virnucpro_core.features.files import Written
from virnucpro_core.features.matrices import write_matrix
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.scan import ChunkRange, read_range, scan_input
from virnucpro_core.sizes import CHUNK_TOKENS


class Embedded(Protocol):
    """The embeddings of a chunk, as an artifact takes them; an `Extraction` is one."""

    @property
    def ids(self) -> list[str]: ...
    @property
    def records(self) -> NDArray[np.int64]: ...
    @property
    def embeddings(self) -> NDArray[np.float32]: ...


Embed = Callable[[RecordBatch], Embedded]


@dataclass(frozen=True, slots=True)
class Result:
    """What an extraction did, and how long it took.

    Attributes:
        records: in the input.
        residues: in the input.
        rows: embeddings written.
        seconds: from opening the input to the last artifact on disk.
        scan_seconds: the part of them before the first chunk was read: what registration does.
    """

    records: int
    residues: int
    rows: int
    seconds: float
    scan_seconds: float

    @property
    def residues_per_s(self) -> float:
        return self.residues / self.seconds


def extract_chunks(path: Path, folder: Path, embed: Embed, *, chunk_tokens: int = CHUNK_TOKENS) -> Result:
    """Embeds a FASTA file and writes one hashed and synced artifact a chunk, as workers do.

    Args:
        path: the input.
        folder: where the artifacts go, `00000000.safetensors` and so on.
        embed: the method, for example `functools.partial(extraction.embed, model)`.
        chunk_tokens: tokens of a chunk at most.
    """
    started = time.perf_counter()
    scanned = scan_input(path, chunk_tokens=chunk_tokens, spool_root=folder)
    scan_seconds = time.perf_counter() - started

    def read(chunk: ChunkRange) -> RecordBatch:
        data = read_range(scanned.location, scanned.compression, chunk)
        return parse_records(data, first_record=chunk.first_record)

    def write(chunk: ChunkRange, done: Embedded) -> Written:
        artifact = folder / f"{chunk.ordinal:08d}.safetensors"
        metadata = {"input_sha256": scanned.sha256}
        return write_matrix(artifact, done.ids, done.records, done.embeddings, metadata)

    rows = 0
    writing: Future[Written] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        reading = reader.submit(read, scanned.chunks[0])
        for chunk in scanned.chunks:
            batch = reading.result()
            if chunk is not scanned.chunks[-1]:
                reading = reader.submit(read, scanned.chunks[chunk.ordinal + 1])
            done = embed(batch)
            if writing is not None:
                rows += writing.result().rows
            writing = writer.submit(write, chunk, done)
        assert writing is not None
        rows += writing.result().rows
    return Result(
        records=scanned.records,
        residues=scanned.residues,
        rows=rows,
        seconds=time.perf_counter() - started,
        scan_seconds=scan_seconds,
    )
