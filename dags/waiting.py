"""Waiting for a stage of the jobs of a mapped task, without holding a slot.

A wait reads everything anew from the ledger, whenever it runs: what a trigger or an earlier attempt saw is a
hint. It looks first, and defers only if there is something to wait for.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypedDict

import structlog
from airflow.sdk import BaseOperator
from airflow.sdk.definitions.context import Context
from airflow.triggers.base import BaseTrigger, TriggerEvent
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from dags.connections import open_dag_ledger, share_async_ledger
from dags.links import JobLink
from virnucpro_core.errors import JobError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import resume
from virnucpro_core.ledger.queries import (
    PROGRESS,
    Progress,
    progress_from_rows,
    progress_of,
    stage_positions,
)
from virnucpro_core.ledger.waiters import add_waiter, name_waiter, remove_waiter
from virnucpro_core.settings import load_settings
from virnucpro_core.verification import look_at_job

PAUSE = 8.0
"""Seconds before each look at the ledger, give or take a fifth: the first one, too.

Airflow may notice only 5 s after a task deferred that its process has ended (`[workers] min_heartbeat_interval`). A
task that is resumed before is taken for one that broke off while it was queued, and is retried.
"""

PATIENCE = 900.0  # seconds that the ledger may be silent before the task is told

log = structlog.get_logger()


class SubmittedFile(TypedDict):
    """What `register` hands on: a file and its job, or why it has none."""

    path: str
    job: int | None
    refused: str


def jobs_of(files: Sequence[SubmittedFile]) -> list[int]:
    """The jobs of a mapped task's files, in one order: locks are taken in it. Equal files share a job."""
    return sorted({file["job"] for file in files if file["job"] is not None})


def is_settled(progress: Progress, position: int) -> bool:
    """Whether a job has passed the stage at that position, or will not pass it by itself."""
    return progress.state != "running" or progress.has_passed(position)


class StageTrigger(BaseTrigger):
    """Fires when each of the jobs has passed a stage or has ended.

    Args:
        jobs: their ids.
        position: the stage's place in the order of stages.
        token: the waiters' rows that belong to this wait.
    """

    def __init__(self, jobs: list[int], position: int, token: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.jobs = jobs
        self.position = position
        self.token = token

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"jobs": self.jobs, "position": self.position, "token": self.token},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        clock = asyncio.get_running_loop().time
        answered = clock()
        while True:
            await asyncio.sleep(PAUSE * random.uniform(0.8, 1.2))
            try:
                unsettled = await self.count_unsettled()
                answered = clock()
            except SQLAlchemyError as error:
                silent = clock() - answered
                for job in self.jobs:
                    log.warning(
                        "the ledger does not answer", job=job, reason=str(error), seconds=round(silent)
                    )
                # after that the task looks for itself, and fails with an error that says what is wrong
                unsettled = len(self.jobs) if silent < PATIENCE else 0
            if not unsettled:
                yield TriggerEvent(None)  # type: ignore[no-untyped-call]
                return

    async def count_unsettled(self) -> int:
        async with share_async_ledger().connect() as connection:
            rows = (await connection.execute(PROGRESS, {"jobs": self.jobs})).all()
        return sum(not is_settled(progress, self.position) for progress in progress_from_rows(rows))

    async def on_kill(self) -> None:
        """Strike off this wait and no other: after a Clear, the next attempt has its own rows by now.

        Airflow cancels a trigger again in each second that it takes to end: where many are killed at once, that must
        not take one out of the queue for a thread.
        """
        await asyncio.shield(asyncio.to_thread(strike_off, self.jobs, self.token))


def strike_off(jobs: Sequence[int], token: str) -> None:
    """Remove a wait's rows; the setting says whether a job is cancelled when nobody waits for it any more."""
    cancel_unwatched = load_settings().cancel_unwatched
    with open_dag_ledger() as ledger:
        for job in jobs:
            cancelled = in_transaction(ledger, remove_waiter, job, token, cancel_unwatched=cancel_unwatched)
            log.info("wait was killed", job=job, waiter=token, job_cancelled=cancelled)


class WaitForStage(BaseOperator):
    """Waits until the jobs of its files have passed a stage.

    First it reconciles the ledger with storage: what is lost is computed again, and after a Clear what failed
    or was cancelled is resumed. It fails if none of its jobs can go on; one that cannot stops no other.

    Args:
        stage: the stage to wait for.
        files: what `register` returned.
    """

    template_fields = ("files",)
    operator_extra_links = (JobLink(),)

    def __init__(self, *, stage: str, files: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage
        self.files = files

    def execute(self, context: Context) -> None:
        with open_dag_ledger() as ledger:
            # Airflow tries a task again by itself, too: only a Clear grants it more tries than it began with.
            cleared = context["ti"].max_tries > (self.retries or 0)
            for job in jobs_of(self.files):
                mend(ledger, job, again=cleared)
            self.wait(ledger, context)

    def resume_waiting(self, context: Context, event: object) -> None:  # noqa: ARG002 - the ledger knows better
        token = name_waiter(name_wait(context), context["ti"].try_number)
        with open_dag_ledger() as ledger:
            for job in jobs_of(self.files):
                in_transaction(ledger, remove_waiter, job, token)
            self.wait(ledger, context)

    def wait(self, ledger: Engine, context: Context) -> None:
        """Return if there is nothing to wait for, else enter this run as a waiter and defer."""
        jobs = jobs_of(self.files)
        position, progress = in_transaction(ledger, look, jobs, self.stage)
        if all(is_settled(one, position) for one in progress):
            conclude(self.stage, position, progress)
            return
        wait, attempt = name_wait(context), context["ti"].try_number
        in_transaction(ledger, enter_waiters, jobs, wait, attempt)
        for one in progress:
            if not is_settled(one, position):
                log.info(
                    "%s of %s chunks are done: waiting",
                    one.chunks_total - one.chunks_left,
                    one.chunks_total,
                    job=one.id,
                    stage=one.stage,
                    until=self.stage,
                )
        self.defer(
            trigger=StageTrigger(jobs, position, name_waiter(wait, attempt)),
            method_name=self.resume_waiting.__name__,
        )


def name_wait(context: Context) -> str:
    """What all attempts of one task instance have in common."""
    ti = context["ti"]
    return f"{ti.dag_id} {ti.run_id} {ti.task_id} [{ti.map_index}]"


def mend(ledger: Engine, job: int, *, again: bool) -> None:
    """Have a job do what storage has lost and, if `again`, what failed or was cancelled; nothing else."""
    [progress] = in_transaction(ledger, find_progress, [job])
    found = look_at_job(ledger, load_settings().output_root, job)
    for fault in found.faults:
        log.warning("a file is lost", job=job, path=fault.path, fault=fault.what)
    if not found.lost and not (again and progress.state in ("failed", "cancelled")):
        log.info(
            "all %s files are there: nothing to mend",
            found.files,
            job=job,
            state=progress.state,
            stage=progress.stage,
        )
        return
    resumed = in_transaction(ledger, resume, job, found.lost)
    log.info(
        "%s of %s chunks were missing; %s kept",
        resumed.chunks - resumed.kept,
        resumed.chunks,
        resumed.kept,
        job=job,
        was=progress.state,
        files_lost=resumed.lost,
        chunks_to_run=resumed.waiting,
    )


def look(tx: Connection, jobs: Sequence[int], stage: str) -> tuple[int, list[Progress]]:
    """A stage's position and how far the jobs are."""
    return stage_positions(tx)[stage], find_progress(tx, jobs)


def find_progress(tx: Connection, jobs: Sequence[int]) -> list[Progress]:
    """How far the jobs are.

    Raises:
        JobError: if one of them does not exist.
    """
    progress = progress_of(tx, jobs)
    unknown = set(jobs) - {one.id for one in progress}
    if unknown:
        raise JobError(
            f"the ledger does not know these jobs: {sorted(unknown)}",
            todo="Clear `register`, which enters them anew.",
        )
    return progress


def enter_waiters(tx: Connection, jobs: Sequence[int], wait: str, attempt: int) -> None:
    for job in jobs:
        add_waiter(tx, job, wait, attempt)


def conclude(stage: str, position: int, progress: Sequence[Progress]) -> None:
    """Log how far the settled jobs came.

    Raises:
        JobError: if none of them has passed the stage.
    """
    stopped = []
    for one in progress:
        if one.has_passed(position):
            log.info(
                "%s is done: %s of %s records embedded, %s failed",
                stage,
                one.embeddings,
                one.records,
                one.failed,
                job=one.id,
                state=one.state,
            )
        else:
            stopped.append(f"job {one.id} {one.state}" + (f": {one.error}" if one.error else ""))
            log.error("%s will not be done", stage, job=one.id, state=one.state, error=one.error)
    if len(stopped) == len(progress):
        raise JobError(
            "; ".join(stopped),
            where=stage,
            todo="Mend the cause, then clear this task: it resumes what is left.",
        )
