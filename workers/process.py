"""The life of a Celery child: it registers, loads a model once, and takes chunks from claim to commit.

While a chunk is computed, the next ones are read and the last one is written and committed, each in a thread.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import psutil
import structlog
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_when_event_set,
    wait_random_exponential,
)

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
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.outbox import send_again
from virnucpro_core.ledger.queries import live_workers
from virnucpro_core.ledger.transitions import (
    EXTRACT,
    MERGE,
    VALIDATE,
    Declined,
    claim,
    complete,
    describe,
    fail,
)
from virnucpro_core.ledger.work import Claim, Work
from virnucpro_core.settings import Settings
from workers.cleaning import remove_expired, sweep
from workers.heartbeat import Heartbeat
from workers.reading import LookAhead
from workers.stages import Outcome, Stage, find_damaged, keep_extraction, merge, validate

if TYPE_CHECKING:
    from virnucpro_core.embedding.execution import ExecutionClass
    from virnucpro_core.embedding.extraction import Extraction
    from virnucpro_core.embedding.model import FastEsm

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

WHOLE_INPUT_STAGES: dict[str, Stage] = {MERGE: merge, VALIDATE: validate}

PERMANENT = (InputChangedError, MismatchError)
"""Errors that another attempt would only repeat."""

SEND_AGAIN_SECONDS = 2.0
OFFER_AGAIN_SECONDS = 10.0  # for a chunk that this process cannot run at all
FLUSH_SECONDS = 30.0
LONGEST_PAUSE = 5.0  # seconds between attempts to reach the database
UNFIT = 71  # exit code of a child that should not go on


class WorkerProcess:
    """One Celery child.

    Args:
        node: the Celery node's name, unique among live workers.
        queue: the queue that it takes messages from.
    """

    def __init__(self, settings: Settings, *, node: str, queue: str) -> None:
        self.settings = settings
        self.ledger = open_ledger(settings.database_url_for("worker"))
        self.records_done = 0
        self.heartbeat = Heartbeat(
            self.ledger,
            settings,
            node=node,
            queue=queue,
            device=os.environ.get("CUDA_VISIBLE_DEVICES") or "cpu",
            count_progress=self.count_progress,
        )
        self.look_ahead = LookAhead(self.ledger, queue)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self.writing: Future[None] | None = None
        self.closing = Event()
        self.model: FastEsm | None = None
        self.others_idle: Counter[int] = Counter()  # by chunk, how often in a row

    def count_progress(self) -> int:
        """Records embedded, and MiB read and written (in MiB, as asking reads some bytes, too)."""
        counters = psutil.Process().io_counters()
        return self.records_done + (counters.read_chars + counters.write_chars >> 20)

    def run(self, stage: str, chunk_id: int) -> None:
        """Run a chunk, unless the ledger says that it is not there to be run.

        Raises:
            ServiceError: the database is away; the relay sends the message again.
            SystemExit: after an error that nobody foresaw. What broke may be the process itself (a CUDA error
                sticks to it), so a fresh one takes over. Likewise when a claim's answer was lost.
        """
        try:
            self._run(stage, chunk_id, self.heartbeat.wait_for_worker())
        except VirnucproError:
            raise
        except Exception as error:
            log.exception("process_given_up", chunk=chunk_id)
            raise SystemExit(UNFIT) from error

    def _run(self, stage: str, chunk_id: int, worker_id: int) -> None:
        if self.writing is not None and self.writing.done():
            self._finish_writing()
        work = in_transaction(self.ledger, describe, chunk_id)
        if isinstance(work, Declined):
            log.info("message_declined", chunk=chunk_id, reason=work.reason)
        elif work.stage != stage:
            log.error(
                "message_rejected", chunk=chunk_id, stage=stage, reason=f"the chunk's stage is {work.stage}"
            )
        elif stage == EXTRACT:
            self._extract(work, worker_id)
        else:
            self._run_whole_input(work, worker_id)

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
            model = self._load_model(work)
        except (WeightsError, ExecutionError) as error:
            if self._leave_to_others(work, worker_id, error):
                return
            # Claimed without a class, so that the job is not pinned to a worker that cannot run it.
            claimed = self._claim(work, worker_id)
            if isinstance(claimed, Claim):
                self._fail(claimed, error)
            return
        execution = model.execution()
        claimed = self._claim(work, worker_id, execution)
        if isinstance(claimed, Declined):
            log.warning("claim_declined", chunk=work.title, reason=claimed.reason, execution=str(execution))
            in_transaction(
                self.ledger,
                send_again,
                work.chunk_id,
                delay=SEND_AGAIN_SECONDS,
                reason=f"{claimed.reason}; declined by one of {execution}",
            )
            return
        log.info("claimed", chunk=work.title, attempt=claimed.attempt)
        self.look_ahead.start()
        extraction: Extraction | None = None
        with self._attempt(claimed):
            from virnucpro_core.embedding.extraction import extract

            extraction = extract(self.look_ahead.take(work), model, on_progress=self._count_records)
        if extraction is not None:
            self._finish_writing()
            self.writing = self.writer.submit(self._write, claimed, extraction)

    def _leave_to_others(self, work: Work, worker_id: int, error: VirnucproError) -> bool:
        """Have a chunk that this process cannot run sent again for another worker; False if no other can take it.

        A busy worker may come to it. One that is idle may still be loading the model; but if all others have been
        found idle as often as a chunk has attempts, they cannot run it either.
        """
        live = in_transaction(self.ledger, live_workers)
        others = [other for other in live if other.queue == self.heartbeat.queue and other.id != worker_id]
        if any(other.chunk_id is not None for other in others):
            del self.others_idle[work.chunk_id]
        else:
            self.others_idle[work.chunk_id] += 1
        if not others or self.others_idle[work.chunk_id] > self.settings.max_attempts:
            return False
        in_transaction(
            self.ledger,
            send_again,
            work.chunk_id,
            delay=OFFER_AGAIN_SECONDS,
            reason=f"a worker said: {error}",
        )
        log.error("chunk_left_to_others", chunk=work.title, others=len(others), reason=str(error))
        return True

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
            return in_transaction(
                self.ledger,
                claim,
                work,
                worker_id,
                execution_class=None if execution is None else execution.sha256,
                execution=None if execution is None else execution.to_json(),
            )
        except ServiceError as error:
            # We may hold the chunk without knowing: it is freed when this process is replaced.
            log.warning("claim_unknown", chunk=work.title, reason=str(error))
            raise SystemExit(UNFIT) from error

    def _write(self, claimed: Claim, extraction: Extraction) -> None:
        with self._attempt(claimed):
            self._commit(claimed, keep_extraction(claimed.work, extraction, self.settings))

    def _run_whole_input(self, work: Work, worker_id: int) -> None:
        claimed = self._claim(work, worker_id)
        if isinstance(claimed, Declined):
            log.info("claim_declined", chunk=work.title, reason=claimed.reason)
            return
        log.info("claimed", chunk=work.title, attempt=claimed.attempt)
        with self._attempt(claimed):
            try:
                outcome = WHOLE_INPUT_STAGES[work.stage](self.ledger, work, self.settings)
            except (ArtifactError, MismatchError):
                if self._mend(work):
                    return
                raise
            self._commit(claimed, outcome)
            if work.stage == VALIDATE:
                sweep(work, outcome.publications, self.settings)
                remove_expired(self.ledger, self.settings)

    def _mend(self, work: Work) -> bool:
        """Have damaged artifacts made again, if there are any; the stage that met them then begins anew."""
        damaged = find_damaged(self.ledger, work, self.settings)
        if not damaged:
            return False
        resumed = self._persist(resume, work.job_id, damaged)
        log.warning("artifacts_made_again", job=work.job_id, damaged=len(damaged), chunks=resumed.lost)
        return True

    def _load_model(self, work: Work) -> FastEsm:
        """The model for a recipe: the one that is loaded, or another in its place.

        Raises:
            WeightsError: the model is missing here, or is not the one that was registered.
            ExecutionError: this device cannot compute in the recipe's dtype.
        """
        from virnucpro_core.embedding.loading import load_fast_esm

        recipe = work.recipe
        if self.model is None or not self._fits(self.model, work):
            self.model = None  # its memory first
            self.model = load_fast_esm(self.settings.model_root / work.model_path, dtype=recipe.dtype)
            log.info("model_loaded", model=work.model, execution=str(self.model.execution()))
        if not self._fits(self.model, work):
            self.model = None
            raise WeightsError(
                f"the model {work.model!r} is not the one that was registered",
                where=work.model_path,
                todo="Put the registered weights there again, or register these under another name.",
            )
        return self.model

    @staticmethod
    def _fits(model: FastEsm, work: Work) -> bool:
        recipe = work.recipe
        return model.recipe(truncation=recipe.truncation, residues=recipe.residues) == recipe

    def _count_records(self, records: int) -> None:
        self.records_done += records

    @contextmanager
    def _attempt(self, claimed: Claim) -> Iterator[None]:
        """Ends the claim's attempt in the ledger if the block fails; what nobody foresaw is raised on."""
        try:
            yield
        except StaleLeaseError as error:
            log.warning("result_dropped", reason=str(error))
        except (VirnucproError, SoftTimeLimitExceeded) as error:
            self._fail(claimed, error)
        except Exception as error:
            log.exception("chunk_failed_unexpectedly", chunk=claimed.work.title)
            self._fail(claimed, error)
            raise

    def _fail(self, claimed: Claim, error: Exception) -> None:
        said = str(error) if isinstance(error, VirnucproError) else f"{type(error).__name__}: {error}"
        said = said.replace("\0", "\\0")  # PostgreSQL takes no NUL
        try:
            state = self._persist(
                fail,
                claimed,
                said,
                max_attempts=self.settings.max_attempts,
                permanent=isinstance(error, PERMANENT),
            )
        except StaleLeaseError as stale:
            log.warning("failure_dropped", reason=str(stale), error=said)
        else:
            log.error(
                "chunk_failed", chunk=claimed.work.title, attempt=claimed.attempt, error=said, now=state
            )

    def _commit(self, claimed: Claim, outcome: Outcome) -> None:
        state = self._persist(commit, claimed, outcome)
        result = outcome.result
        log.info("committed", chunk=claimed.work.title, job_state=state, seconds=round(result.seconds, 3))

    def _persist(
        self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a transaction that is worth waiting for: again while the database is away, until we close."""

        def warn(state: RetryCallState) -> None:
            reason = state.outcome.exception() if state.outcome else None
            log.warning(
                "ledger_away", step=function.__name__, attempts=state.attempt_number, reason=str(reason)
            )

        retrying = Retrying(
            retry=retry_if_exception_type(ServiceError),
            wait=wait_random_exponential(multiplier=0.1, max=LONGEST_PAUSE),
            stop=stop_when_event_set(self.closing),
            before_sleep=warn,
            reraise=True,
        )
        return retrying(partial(in_transaction, self.ledger, function), *args, **kwargs)


def commit(tx: Connection, claimed: Claim, outcome: Outcome) -> str:
    """Complete a chunk and publish what it made, both or neither as far as readers of the ledger can tell.

    Completing comes first: it checks the lease and locks the job, so that nothing of an older generation is
    published over a newer one.
    """
    state = complete(tx, claimed, outcome.result)
    for publication in outcome.publications:
        publication.publish()
    return state
