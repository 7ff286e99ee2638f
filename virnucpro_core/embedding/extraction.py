"""Extraction: records in, embeddings and failures out, in input order and the same bytes every time."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from virnucpro_core.embedding.execution import ExecutionClass
from virnucpro_core.embedding.loading import ModelSource, load_fast_esm
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.embedding.packing import EXTRA_TOKENS, LEAST_PACK_TOKENS, PACK_TOKENS
from virnucpro_core.embedding.passes import OnProgress, Passes
from virnucpro_core.errors import SettingsError
from virnucpro_core.failures import Failure
from virnucpro_core.features.manifests import Counts
from virnucpro_core.recipe import TRUNCATION, ResiduePolicy
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.scan import ChunkRange, read_range, scan_input
from virnucpro_core.sizes import CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class InputRange:
    """One chunk of a registered input.

    Attributes:
        location: the file to read from: the input itself, or its spooled copy.
        compression: of the input as it was registered.
        chunk: where the records lie, and their checksum.
    """

    location: str
    compression: Compression
    chunk: ChunkRange


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """What came of some consecutive records of an input.

    Attributes:
        ids: ids of the embedded records, in input order; duplicates are kept.
        records: int64 (m,), their numbers in the input, counted from 1.
        embeddings: float32 (m, 1280), all finite.
        failures: the records without an embedding, in input order.
        counts: what became of all of them.
        repaired: embeddings that were not finite at first and were computed again, alone and in float32.
        positions: tokens that the model took in, with padding and what was computed again.
        peak_bytes: the most memory that this process has had of the GPU; 0 on a CPU.
        execution: how the embeddings were computed.
        input_sha256: of the file, or of the range's bytes, that was read; empty where tokens were given.
        seconds: time that it took.
    """

    ids: list[str]
    records: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    failures: list[Failure]
    counts: Counts
    repaired: int
    positions: int
    peak_bytes: int
    execution: ExecutionClass
    input_sha256: str
    seconds: float


def extract(
    source: str | PathLike[str] | InputRange | RecordBatch,
    model: ModelSource,
    *,
    residues: ResiduePolicy = "unknown",
    truncation: int = TRUNCATION,
    toks_per_batch: int | None = None,
    allow_nucleotides: bool = False,
    on_progress: OnProgress | None = None,
) -> Extraction:
    """Embeds the proteins of a FASTA file, of a byte range of one, or of records that have been read.

    Args:
        source: a file (plain, gzip, bgzip or zstd), one chunk of a registered input, or its records, read
            ahead under the residue policy and truncation that they carry.
        model: as `load_fast_esm` takes it.
        residues: `unknown` turns letters outside the vocabulary into `<unk>`; `strict` fails the record.
        truncation: residues kept of each record.
        toks_per_batch: tokens in a pack on a GPU; a CPU computes each record alone.
        allow_nucleotides: take nucleotides for proteins; a range was judged when it was registered.
        on_progress: told as records get done.

    Raises:
        InputError: the file cannot be used as a whole; a bad record is a failure instead.
        WeightsError, ExecutionError: as `load_fast_esm` does; others took the GPU's memory since.
        SettingsError: the truncation leaves no residue.
    """
    started = time.perf_counter()
    if truncation < 1:
        raise SettingsError(f"records cannot be cut to {truncation} residues", todo="Keep at least one.")
    loaded = load_fast_esm(model)

    def embed_range(location: str, compression: Compression, chunk: ChunkRange) -> Extraction:
        buffer = read_range(location, compression, chunk)
        batch = parse_records(
            buffer, first_record=chunk.first_record, residues=residues, truncation=truncation
        )
        return embed(loaded, batch, toks_per_batch=toks_per_batch, on_progress=on_progress)

    if isinstance(source, RecordBatch):
        return embed(loaded, source, toks_per_batch=toks_per_batch, on_progress=on_progress)
    if isinstance(source, InputRange):
        parts = [embed_range(source.location, source.compression, source.chunk)]
        return _join(parts, source.chunk.sha256, started)
    with tempfile.TemporaryDirectory(prefix="virnucpro-") as spool:
        scanned = scan_input(
            Path(source),
            chunk_tokens=CHUNK_TOKENS,
            spool_root=Path(spool),
            truncation=truncation,
            allow_nucleotides=allow_nucleotides,
        )
        parts = [embed_range(scanned.location, scanned.compression, chunk) for chunk in scanned.chunks]
    return _join(parts, scanned.sha256, started)


def embed(
    model: FastEsm,
    batch: RecordBatch,
    *,
    toks_per_batch: int | None = None,
    on_progress: OnProgress | None = None,
) -> Extraction:
    """Embeds records that are tokens already.

    A row depends on its own sequence alone: not on the other records, their order, or the memory there was.
    A record whose row is not finite is computed again alone in float32, and fails if that does not help.
    When a GPU's memory runs out, packs are halved until they fit, and stay so for this model; a record that
    does not fit by itself fails.

    Args:
        model: what computes.
        batch: records as `parse_records` returns them.
        toks_per_batch: tokens in a pack on a GPU, at least 512.
        on_progress: told as records get done.

    Raises:
        ExecutionError: not even the smallest pack fits, which did when the model was loaded.
    """
    started = time.perf_counter()
    pack_tokens = max(toks_per_batch or PACK_TOKENS, LEAST_PACK_TOKENS)
    passes = Passes(model, batch.tokens, batch.offsets, pack_tokens, on_progress or (lambda _: None))
    passes.on_progress(len(batch.failures))
    passes.embed_all()
    passes.repair()
    failed = [
        Failure(record=batch.first_record + row, id=batch.ids[row], reason=reason, detail=detail)
        for row, (reason, detail) in (
            (int(batch.rows[index]), fault) for index, fault in passes.faults.items()
        )
    ]
    good = np.ones(len(batch.rows), dtype=np.bool_)
    good[list(passes.faults)] = False
    rows = batch.rows[good]
    failures = sorted([*batch.failures, *failed], key=lambda failure: failure.record)
    return Extraction(
        ids=[batch.ids[row] for row in rows.tolist()],
        records=batch.first_record + rows,
        embeddings=passes.embeddings if good.all() else passes.embeddings[good],
        failures=failures,
        counts=Counts(
            records=len(batch.ids),
            embeddings=len(rows),
            failures=dict(Counter(failure.reason for failure in failures)),
            residues=batch.residues,
            tokens=len(batch.tokens) + EXTRA_TOKENS * len(batch.rows),
            truncated=batch.truncated,
            unknown=batch.unknown,
        ),
        repaired=len(set(passes.non_finite) - set(passes.faults)),
        positions=passes.positions,
        peak_bytes=torch.cuda.max_memory_reserved(model.device) if model.device.type == "cuda" else 0,
        execution=model.execution(pack_tokens),
        input_sha256="",
        seconds=time.perf_counter() - started,
    )


def _join(parts: Sequence[Extraction], input_sha256: str, started: float) -> Extraction:
    """The extractions of consecutive ranges as one."""
    failures = [failure for part in parts for failure in part.failures]
    counts = [part.counts for part in parts]
    return Extraction(
        ids=list(chain.from_iterable(part.ids for part in parts)),
        records=np.concatenate([part.records for part in parts]),
        embeddings=parts[0].embeddings
        if len(parts) == 1
        else np.concatenate([part.embeddings for part in parts]),
        failures=failures,
        counts=Counts(
            records=sum(count.records for count in counts),
            embeddings=sum(count.embeddings for count in counts),
            failures=dict(Counter(failure.reason for failure in failures)),
            residues=sum(count.residues for count in counts),
            tokens=sum(count.tokens for count in counts),
            truncated=sum(count.truncated for count in counts),
            unknown=sum(count.unknown for count in counts),
        ),
        repaired=sum(part.repaired for part in parts),
        positions=sum(part.positions for part in parts),
        peak_bytes=max(part.peak_bytes for part in parts),
        execution=parts[0].execution,
        input_sha256=input_sha256,
        seconds=time.perf_counter() - started,
    )
