"""What the page shows, read from the ledger and from Airflow."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from airflow.models.xcom import XComModel
from sqlalchemy import Connection, Engine

from dags.links import DAG_ID
from virnucpro_core.failures import Failure
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.overview import (
    JobOverview,
    WorkerOverview,
    list_job_overviews,
    list_worker_overviews,
)
from virnucpro_core.ledger.queries import ArtifactRow, artifacts_of, failures_of, get_job
from virnucpro_core.ledger.transitions import MERGE, VALIDATE
from virnucpro_core.reports import JobReport, report_job

if TYPE_CHECKING:
    from dags.waiting import SubmittedFile

JOBS_SHOWN = 50
FAILURES_SHOWN = 100
CHUNKS_SHOWN = 500
CSV_RECORDS = 5000  # failures read at a time: a slow reader must not keep a transaction open
CSV_COLUMNS = ("record", "id", "reason", "detail")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """All that is shown of one job.

    Attributes:
        files: what merge and validate made, in the current generation.
    """

    overview: JobOverview
    report: JobReport
    files: list[ArtifactRow]

    @property
    def can_retry(self) -> bool:
        return self.overview.state != "running"

    @property
    def can_cancel(self) -> bool:
        return self.overview.state == "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobList:
    """The newest jobs that were asked for, and the live workers.

    Attributes:
        older: the job that older ones come before; None if there are none.
    """

    jobs: list[JobOverview]
    workers: Sequence[WorkerOverview]
    older: int | None


def read_jobs(tx: Connection, *, state: str, named: str, before: int | None) -> JobList:
    found = list_job_overviews(tx, limit=JOBS_SHOWN + 1, state=state or None, named=named, before=before)
    jobs = found[:JOBS_SHOWN]
    return JobList(
        jobs=jobs,
        workers=list_worker_overviews(tx),
        older=jobs[-1].id if len(found) > JOBS_SHOWN else None,
    )


def read_job(tx: Connection, job_id: int) -> JobPage:
    """What is known of a job.

    Raises:
        JobError: there is no such job.
    """
    report = report_job(tx, job_id)
    [overview] = list_job_overviews(tx, jobs=[job_id])
    files = [*artifacts_of(tx, job_id, stage=MERGE), *artifacts_of(tx, job_id, stage=VALIDATE)]
    return JobPage(overview=overview, report=report, files=files)


def read_failures(tx: Connection, job_id: int, *, reason: str | None, after: int) -> list[Failure]:
    """The next failures of a job: one more than are shown, if there are more.

    Raises:
        JobError: there is no such job.
    """
    get_job(tx, job_id)
    return list(failures_of(tx, job_id, limit=FAILURES_SHOWN + 1, after=after, reason=reason))


def write_csv(ledger: Engine, job_id: int) -> Iterator[str]:
    """A job's failures as CSV, as `virnucpro failures JOB --csv` prints them."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    after = 0
    while True:
        read = in_transaction(ledger, read_batch, job_id, after=after)
        writer.writerows(astuple(failure) for failure in read)
        yield text.getvalue()
        text.seek(0)
        text.truncate()
        if len(read) < CSV_RECORDS:
            return
        after = read[-1].record


def read_batch(tx: Connection, job_id: int, *, after: int) -> list[Failure]:
    return list(failures_of(tx, job_id, limit=CSV_RECORDS, after=after))


def read_run(tx: Connection, files: Sequence[SubmittedFile]) -> dict[int, JobOverview]:
    """The jobs of a run's files, by id."""
    ids = {file["job"] for file in files if file["job"] is not None}
    return {job.id: job for job in list_job_overviews(tx, limit=len(ids), jobs=sorted(ids))}


def files_of_run(session: Any, run_id: str) -> list[SubmittedFile]:
    """What a run's `register` tasks handed on, in order.

    Args:
        session: of Airflow's own database. The ledger alone does not know: it remembers the last run that
            submitted a file.
    """
    query = (
        XComModel.get_many(dag_ids=DAG_ID, run_id=run_id, task_ids="register", key="return_value")
        .order_by(None)
        .order_by(XComModel.map_index)
    )
    return [file for row in session.scalars(query) for file in XComModel.deserialize_value(row)]
