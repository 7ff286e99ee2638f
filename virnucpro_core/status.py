"""A job's status: all that `virnucpro status JOB` and the page tell of it, read from the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from virnucpro_core.ledger.queries import (
    SubmissionRow,
    artifacts_of,
    failure_counts,
    find_setback,
    get_job,
    submissions_of,
)
from virnucpro_core.ledger.transitions import VALIDATE
from virnucpro_core.ledger.work import REPORT, SUFFIXES, file_name


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmissionStatus:
    """One submission of a job.

    Attributes:
        too_many_failed: whether more of the job's records failed than it allows.
        folder: where its result is published, relative to the output root.
        published: whether that has been done in this generation.
        report: its path, relative to the output root; None if there is none.
        error: why its nucleotides were not merged.
    """

    path: str
    stem: str
    label: str
    nucleotide_path: str
    requested_by: str
    max_failed_share: float
    too_many_failed: bool
    folder: str
    published: bool
    report: str | None
    error: str | None
    submitted_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """What is known of a job.

    Attributes:
        state: running, succeeded, failed or cancelled.
        error: why it failed.
        setback: why a chunk that waits has not run yet, or how its last attempt ended.
        failures: records without an embedding, by reason, the most frequent first.
        truncated: records that were cut.
        unknown: residues that became <unk>.
        tokens_per_second: of one worker on average: tokens over the seconds of all chunks, which ran side by side
            on several workers; None before the first chunk is done.
        chunks_left: of the current stage.
        submissions: who asked for it, and with which files.
    """

    job: int
    stem: str
    state: str
    stage: str
    generation: int
    error: str | None
    setback: str | None
    model: str
    demonstration: bool
    input_sha256: str
    records: int
    embeddings: int
    failed: int
    failures: dict[str, int]
    truncated: int
    unknown: int
    tokens: int
    tokens_per_second: float | None
    chunks_left: int
    chunks_total: int
    execution: dict[str, Any] | None
    created_at: datetime
    finished_at: datetime | None
    submissions: tuple[SubmissionStatus, ...]

    @property
    def failed_share(self) -> float:
        """Of the job's records."""
        return self.failed / self.records


def read_status(tx: Connection, job_id: int) -> JobStatus:
    """All that is known of a job.

    Raises:
        JobError: there is no such job.
    """
    job = get_job(tx, job_id)
    made = {Path(artifact.path).name for artifact in artifacts_of(tx, job_id, stage=VALIDATE)}

    def find_report(submission: SubmissionRow) -> str | None:
        if submission.published_generation != job.generation or file_name(REPORT, submission.id) not in made:
            return None
        return f"{submission.folder(job.input_sha256, job.recipe_sha256)}/{submission.stem}{SUFFIXES[REPORT]}"

    return JobStatus(
        job=job.id,
        stem=job.stem,
        state=job.state,
        stage=job.stage,
        generation=job.generation,
        error=job.error,
        setback=find_setback(tx, job_id),
        model=job.model,
        demonstration=job.recipe["demonstration"],
        input_sha256=job.input_sha256,
        records=job.records,
        embeddings=job.embeddings,
        failed=job.failed,
        failures=failure_counts(tx, job_id),
        truncated=job.truncated,
        unknown=job.unknown,
        tokens=job.tokens,
        tokens_per_second=job.tokens / job.seconds if job.seconds else None,
        chunks_left=job.chunks_left,
        chunks_total=job.chunks_total,
        execution=job.execution,
        created_at=job.created_at,
        finished_at=job.finished_at,
        submissions=tuple(
            SubmissionStatus(
                path=submission.path,
                stem=submission.stem,
                label=submission.label,
                nucleotide_path=submission.nucleotide_path,
                requested_by=submission.requested_by,
                max_failed_share=submission.max_failed_share,
                too_many_failed=job.failed / job.records > submission.max_failed_share,
                folder=submission.folder(job.input_sha256, job.recipe_sha256),
                error=submission.error,
                submitted_at=submission.submitted_at,
                published=submission.published_generation == job.generation,
                report=find_report(submission),
            )
            for submission in submissions_of(tx, job_id)
        ),
    )
