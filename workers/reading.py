"""Reading: a chunk's records from its input, the likely next ones ahead of time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import structlog
from sqlalchemy import Engine

from virnucpro_core.errors import InputError, ServiceError
from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import next_published
from virnucpro_core.ledger.transitions import EXTRACT, Declined, describe
from virnucpro_core.ledger.work import Work
from virnucpro_core.logs import about, about_work
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.scan import read_range
from virnucpro_core.settings import Settings

log = structlog.get_logger()

CHUNKS_AHEAD = 4
"""Chunks kept ready. The next message is one of the oldest in the queue, but other workers take from it, too;
a chunk read for nothing costs tens of milliseconds of a thread that would have idled."""


def read_batch(work: Work, settings: Settings) -> RecordBatch:
    """The records of an extract chunk.

    Raises:
        InputChangedError: its bytes are not those that were registered.
        OutsideError: the ledger names a file outside the folders that inputs are read from.
        InputError: they cannot be read at the moment.
    """
    return parse_records(
        read_range(work.location, work.compression, work.range, roots=settings.input_folders),
        first_record=work.range.first_record,
        residues=work.recipe.residues,
        truncation=work.recipe.truncation,
    )


def condemn(batch: RecordBatch, detail: str) -> RecordBatch:
    """A batch whose good records are failures, too: no process has survived them."""
    poisoned = [
        Failure(
            record=batch.first_record + row, id=batch.ids[row], reason=FailureReason.POISON, detail=detail
        )
        for row in batch.rows.tolist()
    ]
    return replace(
        batch,
        tokens=batch.tokens[:0],
        offsets=batch.offsets[:1],
        rows=batch.rows[:0],
        failures=sorted([*batch.failures, *poisoned], key=lambda failure: failure.record),
        truncated=0,
        unknown=0,
    )


class LookAhead:
    """Reads chunks that are likely to come next, in a thread, while the device computes."""

    def __init__(self, ledger: Engine, settings: Settings, queue: str) -> None:
        self.ledger = ledger
        self.settings = settings
        self.queue = queue
        self.batches: dict[int, RecordBatch] = {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="look-ahead")
        self.reading: Future[None] | None = None

    def start(self, worker_id: int) -> None:
        """Begin to read, unless it is still at it."""
        if self.reading is None or self.reading.done():
            self.reading = self.thread.submit(self._read, worker_id)

    def take(self, work: Work) -> RecordBatch:
        """A chunk's records, read now if they are not here yet; raises as `read_batch` does."""
        batch = self.batches.pop(work.chunk_id, None)
        return read_batch(work, self.settings) if batch is None else batch

    def _read(self, worker_id: int) -> None:
        with about(worker=worker_id):
            try:
                likely = in_transaction(self.ledger, next_published, self.queue, CHUNKS_AHEAD)
                for chunk_id in self.batches.keys() - set(likely):
                    self.batches.pop(chunk_id, None)
                for chunk_id in likely:
                    if chunk_id not in self.batches:
                        self._read_chunk(chunk_id)
            except ServiceError as error:
                log.info("look_ahead_stopped", reason=str(error))
            except Exception:
                # What nobody foresaw may be another worker's chunk: this one's go on.
                log.exception("look_ahead_failed")

    def _read_chunk(self, chunk_id: int) -> None:
        work = in_transaction(self.ledger, describe, chunk_id)
        if isinstance(work, Declined) or work.stage != EXTRACT:
            return
        with about_work(work):
            try:
                self.batches[chunk_id] = read_batch(work, self.settings)
            except InputError as error:
                # Whoever claims the chunk meets the same error and records it.
                log.info("chunk_not_read_ahead", reason=str(error))
