"""The life of a Celery child: it registers, loads a model once, and takes chunks from claim to commit.

While a chunk is computed, the next ones are read and the last one is written and committed, each in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context
from threading import Event
from typing import TYPE_CHECKING

import psutil
import structlog
from celery.exceptions import SoftTimeLimitExceeded

from virnucpro_core.errors import (
    ArtifactError,
    ExecutionError,
    InputChangedError,
    MismatchError,
    ServiceError,
    StaleLeaseError,
    VirnucproError,
    WeightsError,
)
from virnucpro_core.gpus import MASK
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.outbox import send_again
from virnucpro_core.ledger.rejections import RejectionReason, count_rejections
from virnucpro_core.ledger.suspects import break_down, must_be_condemned, must_be_halved, split
from virnucpro_core.ledger.transitions import (
    EXTRACT,
    MERGE,
    VALIDATE,
    Declined,
    claim,
    describe,
    fail,
)
from virnucpro_core.ledger.work import Claim, Work
from virnucpro_core.ledger.workers import count_if_duplicate
from virnucpro_core.logs import about, about_attempt, about_work
from virnucpro_core.sequences.halving import halve
from virnucpro_core.settings import Settings
from workers.cleaning import remove_expired, sweep
from workers.heartbeat import Heartbeat
from workers.merging import merge
from workers.models import ModelKeeper
from workers.others import Others
from workers.persistence import Persistence, commit
from workers.reading import LookAhead, condemn
from workers.stages import Outcome, Stage, find_damaged, keep_extraction, validate

if TYPE_CHECKING:
    from virnucpro_core.embedding.execution import ExecutionClass
    from virnucpro_core.embedding.extraction import Extraction

log = structlog.get_logger()

WHOLE_INPUT_STAGES: dict[str, Stage] = {MERGE: merge, VALIDATE: validate}

PERMANENT = (InputChangedError, MismatchError)
"""Errors that another attempt would only repeat."""

SEND_AGAIN_SECONDS = 2.0
FLUSH_SECONDS = 30.0
UNFIT = 71  # exit code of a child that should not go on


@contextmanager
def giving_up() -> Iterator[None]:
    """Ends the process after an error that nobody foresaw; within `about…`, so that the line names its subject."""
    try:
        yield
    except VirnucproError:
        raise
    except Exception as error:
        log.exception("process_given_up")
        raise SystemExit(UNFIT) from error


class WorkerProcess:
    """One Celery child.

    Args:
        node: the Celery node's name, unique among live workers.
        queue: the queue that it takes messages from.
    """

    def __init__(self, settings: Settings, *, node: str, queue: str) -> None:
        self.settings = settings
        self.ledger = open_ledger(settings.database_url_for("worker"))
        self.queue = queue
        self.busy = False
        self.records_done = 0
        self.look_ahead = LookAhead(self.ledger, settings, queue)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.writing: Future[None] | None = None
        self.closing = Event()
        self.persist = Persistence(self.ledger, self.closing)
        self.models = ModelKeeper(settings.model_root)
        self.others = Others(self.ledger, settings, queue, self.closing)
        self.heartbeat = Heartbeat(
            self.ledger,
            settings,
            node=node,
            queue=queue,
            device=os.environ.get(MASK) or "cpu",
            count_progress=self.count_progress,
            held=lambda: list(self.persist.held),
        )

    def is_idle(self) -> bool:
        """Whether no chunk is computed or written."""
        return not self.busy and (self.writing is None or self.writing.done())

    def count_progress(self) -> int | None:
        """Records embedded, and MiB read and written (in MiB, as asking reads some bytes, too); None if idle."""
        if self.is_idle():
            return None
        counters = psutil.Process().io_counters()
        return self.records_done + (counters.read_chars + counters.write_chars >> 20)

    def run(self, stage: str, chunk_id: int) -> None:
        """Run a chunk, unless the ledger says that it is not there to be run.

        Raises:
            ServiceError: the database went away before the chunk was claimed; the relay sends the message again.
            SystemExit: after an error that nobody foresaw. What broke may be the process itself (a CUDA error
                sticks to it), so a fresh one takes over. Likewise when a claim's answer was lost.
        """
        self.busy = True
        try:
            worker_id = self.heartbeat.wait_for_worker()
            with about(chunk=chunk_id, stage=stage, worker=worker_id), giving_up():
                self._run(stage, chunk_id, worker_id)
        finally:
            self.busy = False

    def _run(self, stage: str, chunk_id: int, worker_id: int) -> None:
        if self.writing is not None and self.writing.done():
            self._finish_writing()
        work = self.persist(describe, chunk_id)
        if isinstance(work, Declined):
            log.info("message_declined", job=work.job_id, reason=work.reason)
        elif work.stage != stage:
            log.error("message_rejected", job=work.job_id, reason=f"the chunk's stage is {work.stage}")
            in_transaction(self.ledger, count_rejections, {RejectionReason.STAGE: 1})
        else:
            with about_work(work), giving_up():
                (self._extract if stage == EXTRACT else self._run_whole_input)(work, worker_id)

    def close(self) -> None:
        """Finish what is being written, then retire. A chunk that was interrupted is handed back."""
        self.closing.set()
        try:
            self._finish_writing(FLUSH_SECONDS)
        except TimeoutError:
            log.warning("writing_not_finished", waited=FLUSH_SECONDS)
        finally:
            self.heartbeat.stop()
            self.ledger.dispose()

    def _extract(self, work: Work, worker_id: int) -> None:
        try:
            model = self.models.load(work)
        except (WeightsError, ExecutionError) as error:
            if self.others.take(work, worker_id, error):
                return
            # Claimed without a class, so that the job is not pinned to a worker that cannot run it.
            claimed = self._claim(work, worker_id)
            if isinstance(claimed, Claim):
                with about_attempt(claimed):
                    self._fail(claimed, error)
            return
        execution = model.execution()
        claimed = self._claim(work, worker_id, execution)
        if isinstance(claimed, Declined):
            log.warning("claim_declined", reason=claimed.reason, execution=str(execution))
            in_transaction(
                self.ledger,
                send_again,
                work.chunk_id,
                delay=SEND_AGAIN_SECONDS,
                reason=f"{claimed.reason}; declined by one of {execution}",
            )
            return
        if claimed.is_suspect:
            self._finish_writing()  # if we die of it, nothing else shall die with it
        if must_be_halved(claimed):
            self._halve(claimed)
            return
        self.look_ahead.start(worker_id)
        extraction: Extraction | None = None
        with self._attempt(claimed):
            from virnucpro_core.embedding.extraction import extract

            batch = self.look_ahead.take(work)
            if must_be_condemned(claimed):
                batch = condemn(batch, f"{claimed.deaths} processes ended while they embedded it")
                log.error("record_condemned", ids=batch.ids, setback=claimed.setback)
            try:
                extraction = extract(batch, model, on_progress=self._count_records)
            except ExecutionError:
                # Whether this device can still compute shows when the model is loaded: if not, others get the chunk.
                self.models.forget()
                raise
        if extraction is not None:
            self.heartbeat.gpu_memory_peak = extraction.peak_bytes
            self._finish_writing()
            self.writing = self.writer.submit(self._write, claimed, extraction)
        if claimed.is_suspect:
            self._finish_writing()

    def _halve(self, claimed: Claim) -> None:
        """Have the halves of a chunk computed in its place: its records kill, or one of them does."""
        work = claimed.work
        with self._attempt(claimed):
            halves = halve(work.location, work.compression, work.range, roots=self.settings.input_folders)
            self.persist.end(split, claimed, halves)
            log.warning("chunk_halved", deaths=claimed.deaths, setback=claimed.setback)

    def _finish_writing(self, timeout: float | None = None) -> None:
        """Wait for the chunk that is being written, if there is one.

        Raises:
            TimeoutError: it is not finished within so many seconds.
            Exception: what nobody foresaw; its chunk has been dealt with, but this process should not go on.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result(timeout)

    def _claim(self, work: Work, worker_id: int, execution: ExecutionClass | None = None) -> Claim | Declined:
        try:
            claimed = in_transaction(
                self.ledger,
                claim,
                work,
                worker_id,
                execution_class=None if execution is None else execution.sha256,
                execution=None if execution is None else execution.to_json(),
            )
        except ServiceError as error:
            # We may hold the chunk without knowing: it is freed when this process is replaced.
            log.warning("claim_unknown", reason=str(error))
            raise SystemExit(UNFIT) from error
        if isinstance(claimed, Claim):
            self.persist.held.add(claimed.token)
            log.info("claimed", attempt=claimed.attempt, deaths=claimed.deaths)
        return claimed

    def _write(self, claimed: Claim, extraction: Extraction) -> None:
        with self._attempt(claimed):
            self._commit(claimed, keep_extraction(claimed.work, extraction, self.settings))

    def _run_whole_input(self, work: Work, worker_id: int) -> None:
        claimed = self._claim(work, worker_id)
        if isinstance(claimed, Declined):
            log.info("claim_declined", reason=claimed.reason)
            return
        with self._attempt(claimed):
            try:
                outcome = WHOLE_INPUT_STAGES[work.stage](self.ledger, work, self.settings)
            except (ArtifactError, MismatchError):
                if self._mend(work):
                    return
                raise
            if work.stage == VALIDATE:
                sweep(self.ledger, work, outcome.publications, self.settings)
            self._commit(claimed, outcome)
            if work.stage == VALIDATE:
                # In a context of its own: it is about other jobs.
                Context().run(remove_expired, self.ledger, self.settings)

    def _mend(self, work: Work) -> bool:
        """Have damaged artifacts made again, if there are any; the stage that met them then begins anew."""
        damaged = find_damaged(self.ledger, work, self.settings)
        if not damaged:
            return False
        resumed = self.persist(resume, work.job_id, damaged)
        log.warning("artifacts_made_again", damaged=len(damaged), chunks=resumed.lost)
        return True

    def _count_records(self, records: int) -> None:
        self.records_done += records

    @contextmanager
    def _attempt(self, claimed: Claim) -> Iterator[None]:
        """Ends the claim's attempt in the ledger if the block fails; what nobody foresaw is raised on."""
        with about_attempt(claimed):
            try:
                yield
            except StaleLeaseError as error:
                log.warning("result_dropped", reason=str(error), duplicate=self._count_duplicate(claimed))
            except (VirnucproError, SoftTimeLimitExceeded) as error:
                self._fail(claimed, error)
            except Exception as error:
                log.exception("chunk_failed_unexpectedly")
                self._fail(claimed, error, fatal=True)
                raise

    def _count_duplicate(self, claimed: Claim) -> bool | None:
        """Whether another worker has the chunk of a dropped result; None if the ledger cannot be asked."""
        try:
            return in_transaction(self.ledger, count_if_duplicate, claimed)
        except ServiceError as error:
            log.warning("duplicate_not_counted", reason=str(error))
            return None

    def _fail(self, claimed: Claim, error: Exception, *, fatal: bool = False) -> None:
        said = str(error) if isinstance(error, VirnucproError) else f"{type(error).__name__}: {error}"
        said = said.replace("\0", "\\0")  # PostgreSQL takes no NUL
        try:
            if fatal:
                state = self.persist.end(break_down, claimed, said, max_attempts=self.settings.max_attempts)
            else:
                state = self.persist.end(
                    fail,
                    claimed,
                    said,
                    max_attempts=self.settings.max_attempts,
                    permanent=isinstance(error, PERMANENT),
                )
        except StaleLeaseError as stale:
            log.warning("failure_dropped", reason=str(stale), error=said)
        else:
            log.error("chunk_failed", error=said, now=state)

    def _commit(self, claimed: Claim, outcome: Outcome) -> None:
        state = self.persist.end(commit, claimed, outcome)
        log.info("committed", job_state=state, seconds=round(outcome.result.seconds, 3))
