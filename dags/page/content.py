"""What the page shows of jobs, read from the ledger."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from io import StringIO

from sqlalchemy import Connection, Engine

from virnucpro_core.failures import Failure
from virnucpro_core.ledger.overview import (
    JobOverview,
    WorkerOverview,
    list_job_overviews,
    list_worker_overviews,
)
from virnucpro_core.ledger.queries import ArtifactRow, artifacts_of, failure_batches, failures_of, get_job
from virnucpro_core.ledger.transitions import MERGE, VALIDATE
from virnucpro_core.status import JobStatus, read_status

JOBS_SHOWN = 50
FAILURES_SHOWN = 100
CHUNKS_SHOWN = 500
CSV_COLUMNS = ("record", "id", "reason", "detail")
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """All that is shown of one job.

    Attributes:
        files: what merge and validate made, in the current generation.
    """

    overview: JobOverview
    status: JobStatus
    files: list[ArtifactRow]

    @property
    def version(self) -> str:
        """Changes when what a person has had shown of its files and failures may not be true any more."""
        ended = self.overview.finished_at
        return f"{self.overview.generation}-{self.overview.state}-{ended.timestamp() if ended else 0:.0f}"

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
    status = read_status(tx, job_id)
    [overview] = list_job_overviews(tx, jobs=[job_id])
    files = [*artifacts_of(tx, job_id, stage=MERGE), *artifacts_of(tx, job_id, stage=VALIDATE)]
    return JobPage(overview=overview, status=status, files=files)


def read_failures(tx: Connection, job_id: int, *, reason: str | None, after: int) -> list[Failure]:
    """The next failures of a job: one more than are shown, if there are more.

    Raises:
        JobError: there is no such job.
    """
    get_job(tx, job_id)
    return list(failures_of(tx, job_id, limit=FAILURES_SHOWN + 1, after=after, reason=reason))


def write_csv(ledger: Engine, job_id: int, *, reason: str | None) -> Iterator[str]:
    """A job's failures as CSV, for a spreadsheet: whatever it would take for a formula has a ' before it."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for batch in failure_batches(ledger, job_id, reason=reason):
        writer.writerows(map(disarm, astuple(failure)) for failure in batch)
        yield text.getvalue()
        text.seek(0)
        text.truncate()


def disarm(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula. Whoever made the input chose a record's id."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_SIGNS) else cell
