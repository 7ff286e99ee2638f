"""Extraction: records in, embeddings and failures out, in input order and the same bytes every time."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from pathlib import Path

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from virnucpro_core.embedding.execution import ExecutionClass
from virnucpro_core.embedding.loading import ModelSource, build_model, load_fast_esm
from virnucpro_core.embedding.memory import FREE_MEMORY, is_full
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.embedding.packing import (
    EXTRA_TOKENS,
    LEAST_PACK_TOKENS,
    PACK_TOKENS,
    build_pack,
    plan_batches,
)
from virnucpro_core.errors import ExecutionError, SettingsError
from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.features.manifests import Counts
from virnucpro_core.recipe import EMBEDDING_WIDTH, TRUNCATION, ResiduePolicy
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.scan import ChunkRange, read_range, scan_input
from virnucpro_core.sizes import CHUNK_TOKENS

log = structlog.get_logger()

NOT_FINITE = "the embedding holds NaN or Inf, in float32 too"
NO_ROOM_FOR_FLOAT32 = "the embedding holds NaN or Inf, and there is no memory to compute it in float32"

OnProgress = Callable[[int], None]
"""Called with the number of records that are done since the last call, embedded or failed."""


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
        WeightsError, ExecutionError: as `load_fast_esm` does.
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
    run = _Run(model, batch.tokens, batch.offsets, pack_tokens, on_progress or (lambda _: None))
    run.on_progress(len(batch.failures))
    run.embed_all()
    run.repair()
    failed = [
        Failure(record=batch.first_record + row, id=batch.ids[row], reason=reason, detail=detail)
        for row, (reason, detail) in ((int(batch.rows[index]), fault) for index, fault in run.faults.items())
    ]
    good = np.ones(len(batch.rows), dtype=np.bool_)
    good[list(run.faults)] = False
    rows = batch.rows[good]
    failures = sorted([*batch.failures, *failed], key=lambda failure: failure.record)
    return Extraction(
        ids=[batch.ids[row] for row in rows.tolist()],
        records=batch.first_record + rows,
        embeddings=run.embeddings if good.all() else run.embeddings[good],
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
        repaired=len(set(run.non_finite) - set(run.faults)),
        positions=run.positions,
        peak_bytes=torch.cuda.max_memory_reserved(model.device) if model.device.type == "cuda" else 0,
        execution=model.execution(pack_tokens),
        input_sha256="",
        seconds=time.perf_counter() - started,
    )


@dataclass(slots=True)
class _Transfer:
    """Rows on their way from the device: valid once `done` has happened."""

    members: NDArray[np.int64]
    rows: Tensor
    done: torch.cuda.Event | None


@dataclass(slots=True)
class _Run:
    """The sequences of one `embed` call: `embeddings` fills up, `faults` tells which rows stay without."""

    model: FastEsm
    tokens: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    pack_tokens: int
    on_progress: OnProgress
    embeddings: NDArray[np.float32] = field(init=False)
    faults: dict[int, tuple[FailureReason, str]] = field(default_factory=dict)
    non_finite: list[int] = field(default_factory=list)
    positions: int = 0

    def __post_init__(self) -> None:
        self.embeddings = np.empty((len(self.offsets) - 1, EMBEDDING_WIDTH), dtype=np.float32)

    def embed_all(self) -> None:
        """Embeds every sequence; one pack is computed while the rows of the one before are copied out."""
        batches = deque(self._plan(np.arange(len(self.embeddings))))
        ahead: _Transfer | None = None
        while batches:
            members = batches.popleft()
            transfer = self._start(members)
            if ahead is not None:
                self._finish(ahead)
            ahead = transfer
            if transfer is None and self._shrink(members):
                batches = deque(self._plan(np.concatenate((members, *batches))))
        if ahead is not None:
            self._finish(ahead)

    def repair(self) -> None:
        """Computes the rows that are not finite again, each alone and in float32."""
        if not self.non_finite:
            return
        log.warning("rows_not_finite", rows=len(self.non_finite), dtype=self.model.dtype)
        if self.model.dtype == "float32":
            self.faults |= dict.fromkeys(self.non_finite, (FailureReason.NON_FINITE, NOT_FINITE))
            return
        try:
            wide = build_model(self.model.weights, self.model.device, "float32")
            for index in self.non_finite:
                self._recompute(index, wide)
        except RuntimeError as error:
            if not is_full(error):
                raise
            rest = [index for index in self.non_finite if not np.isfinite(self.embeddings[index]).all()]
            for index in rest:
                self.faults.setdefault(index, (FailureReason.NON_FINITE, NO_ROOM_FOR_FLOAT32))

    def _recompute(self, index: int, wide: FastEsm) -> None:
        pack = build_pack(self.tokens, self.offsets, np.array([index]))
        self.positions += len(pack.tokens)
        self.embeddings[index] = wide.embed_pack(pack)[0].cpu().numpy()
        if not np.isfinite(self.embeddings[index]).all():
            self.faults[index] = (FailureReason.NON_FINITE, NOT_FINITE)

    def _size(self) -> int:
        """Rows of a full pack, as far as memory allows."""
        return min(self.pack_tokens, self.model.fitting_tokens or self.pack_tokens)

    def _plan(self, members: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        if not self.model.plan.packed:
            return [members[place : place + 1] for place in range(len(members))]
        lengths = np.diff(self.offsets)[members]
        return [members[batch] for batch in plan_batches(lengths, self._size())]

    def _start(self, members: NDArray[np.int64]) -> _Transfer | None:
        """Starts one pack, or returns None where memory does not suffice."""
        rows = self._size() if self.model.plan.packed else None
        pack = build_pack(self.tokens, self.offsets, members, rows)
        self.positions += len(pack.tokens)
        try:
            pooled = self.model.embed_pack(pack)
            if self.model.device.type != "cuda":
                return _Transfer(members, pooled, None)
            host = torch.empty(pooled.shape, dtype=pooled.dtype, pin_memory=True)
            host.copy_(pooled, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.model.device))
            return _Transfer(members, host, done)
        except RuntimeError as error:
            if not is_full(error):
                raise
            return None

    def _finish(self, transfer: _Transfer) -> None:
        if transfer.done is not None:
            transfer.done.synchronize()
        rows = transfer.rows.numpy()
        self.embeddings[transfer.members] = rows
        self.non_finite += transfer.members[~np.isfinite(rows).all(axis=1)].tolist()
        self.on_progress(len(transfer.members))

    def _shrink(self, members: NDArray[np.int64]) -> bool:
        """Makes room after `members` did not fit: smaller packs (True), or without them (False).

        Raises:
            ExecutionError: there is no room for what had room when the model was loaded.
        """
        torch.cuda.empty_cache()
        tokens = np.diff(self.offsets)[members] + EXTRA_TOKENS
        size = self._size()
        if self.model.plan.packed and size > max(LEAST_PACK_TOKENS, tokens.max()):
            self.model.fitting_tokens = max(size // 2, LEAST_PACK_TOKENS)
            log.warning("gpu_memory_full", pack_tokens=size, now=self.model.fitting_tokens)
            return True
        if tokens.max() <= LEAST_PACK_TOKENS:
            raise ExecutionError(
                "another program has taken the memory that the model had",
                where=str(self.model.device),
                todo=FREE_MEMORY,
            )
        for index, count in zip(members.tolist(), tokens.tolist(), strict=True):
            self.faults[index] = (FailureReason.OOM, f"the GPU has no memory for its {count} tokens")
        self.on_progress(len(members))
        return False


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
