"""What people and programs ask of the ledger. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, text

from virnucpro_core.errors import JobError, ServiceError
from virnucpro_core.failures import Failure, FailureReason
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.work import result_folder
from virnucpro_core.sequences.chunks import ChunkRange

BATCH_RECORDS = 5000  # failures read at a time
UNREADABLE_ADVICE = "Mend the file system or its permissions, then ask again: nothing was changed."

PROGRESS = text("""
    SELECT j.id, j.state, j.stage, s.position, j.generation, j.chunks_total, j.chunks_left, j.records, j.embeddings,
           j.failed, j.error
      FROM jobs j JOIN stages s ON s.name = j.stage
     WHERE j.id = ANY(:jobs) ORDER BY j.id
""")
"""How far jobs are; the one indexed query that waiting costs, also on an asynchronous connection."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one job is.

    Attributes:
        state: running, succeeded, failed or cancelled.
        stage: the stage it is in; `position` is that stage's place in the order.
        records, embeddings, failed: records in all, embedded so far, failed so far.
    """

    id: int
    state: str
    stage: str
    position: int
    generation: int
    chunks_total: int
    chunks_left: int
    records: int
    embeddings: int
    failed: int
    error: str | None

    def has_passed(self, stage_position: int) -> bool:
        """Whether the stage at that position is complete."""
        return self.state == "succeeded" or self.position > stage_position


def progress_from_rows(rows: Sequence[Row[Any]]) -> list[Progress]:
    """`Progress` of the rows that the query PROGRESS returned."""
    return [Progress(**row._asdict()) for row in rows]


def progress_of(tx: Connection, job_ids: Sequence[int]) -> list[Progress]:
    """How far these jobs are, in the order of their ids; unknown ids are left out."""
    return progress_from_rows(tx.execute(PROGRESS, {"jobs": list(job_ids)}).all())


def stage_positions(tx: Connection) -> dict[str, int]:
    """Each stage's place in the order."""
    rows = tx.execute(text("SELECT name, position FROM stages ORDER BY position"))
    return {row.name: row.position for row in rows}


@dataclass(frozen=True, slots=True)
class ArtifactRow:
    """A recorded file; `path` is relative to the output root."""

    id: int
    stage: str
    ordinal: int
    kind: str
    path: str
    sha256: str
    bytes: int
    rows: int


def artifacts_of(
    tx: Connection, job_id: int, *, stage: str | None = None, limit: int | None = None
) -> list[ArtifactRow]:
    """A job's artifacts of its current generation, in input order; the first `limit` of them, or all."""
    rows = tx.execute(
        text("""
            SELECT a.id, a.stage, a.ordinal, a.kind, a.path, a.sha256, a.bytes, a.rows
              FROM artifacts a JOIN jobs j ON j.id = a.job_id AND j.generation = a.generation
              JOIN stages s ON s.name = a.stage
              LEFT JOIN chunks c ON c.job_id = a.job_id AND c.stage = a.stage AND c.ordinal = a.ordinal
             WHERE a.job_id = :job AND (CAST(:stage AS text) IS NULL OR a.stage = :stage)
             ORDER BY s.position, c.first_record, a.id LIMIT :limit
        """),
        {"job": job_id, "stage": stage, "limit": limit},
    )
    return [ArtifactRow(*row) for row in rows]


def count_artifacts(tx: Connection, job_id: int, *, stage: str) -> int:
    """How many artifacts a job has of a stage, in its current generation."""
    count: int = tx.execute(
        text("""
            SELECT count(*) FROM artifacts a JOIN jobs j ON j.id = a.job_id AND j.generation = a.generation
             WHERE a.job_id = :job AND a.stage = :stage
        """),
        {"job": job_id, "stage": stage},
    ).scalar_one()
    return count


def find_lost(artifacts: Sequence[ArtifactRow], output_root: Path) -> list[int]:
    """Ids of the artifacts whose file is missing or has another size. Reads no contents.

    Raises:
        ServiceError: a file may be there, but cannot be looked at.
    """
    return [a.id for a in artifacts if find_size(output_root / a.path) != a.bytes]


def find_size(path: Path) -> int | None:
    """A file's size; None if it is missing.

    Raises:
        ServiceError: it may be there, but cannot be looked at.
    """
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServiceError(
            f"a file cannot be looked at: {error.strerror}", where=str(path), todo=UNREADABLE_ADVICE
        ) from error


@dataclass(frozen=True, slots=True)
class SubmissionRow:
    """A submission, and whether it has been served in the current generation."""

    id: int
    path: str
    stem: str
    label: str
    nucleotide_path: str
    nucleotide_sha256: str
    requested_by: str
    max_failed_share: float
    submitted_at: datetime
    published_generation: int | None
    error: str | None

    def folder(self, input_sha256: str, recipe_sha256: str) -> str:
        """Where its result is published, relative to the output root."""
        return result_folder(
            self.stem,
            input_sha256,
            recipe_sha256,
            label=self.label,
            nucleotide_sha256=self.nucleotide_sha256,
        )


def submissions_of(tx: Connection, job_id: int) -> list[SubmissionRow]:
    rows = tx.execute(
        text("""
            SELECT id, path, stem, label, nucleotide_path, nucleotide_sha256, requested_by, max_failed_share,
                   submitted_at, published_generation, error
              FROM submissions WHERE job_id = :job ORDER BY id
        """),
        {"job": job_id},
    )
    return [SubmissionRow(*row) for row in rows]


def find_submission(tx: Connection, job_id: int, path: str) -> SubmissionRow:
    """The newest submission of a file for a job.

    Raises:
        JobError: nobody submitted that file for the job.
    """
    found = [row for row in submissions_of(tx, job_id) if row.path == path]
    if not found:
        raise JobError(f"job {job_id} was not asked for this file", where=path, todo="Submit it.")
    return max(found, key=lambda row: row.submitted_at)


def chunk_ranges(tx: Connection, job_id: int) -> list[ChunkRange]:
    """A job's extract chunks in input order."""
    rows = tx.execute(
        text("""
            SELECT ordinal, byte_start, byte_end, virtual_start, first_record, records, residues, sha256
              FROM chunks WHERE job_id = :job AND stage = 'extract' ORDER BY first_record
        """),
        {"job": job_id},
    )
    return [ChunkRange(**row._asdict()) for row in rows]


def failures_of(
    tx: Connection, job_id: int, *, limit: int | None = None, after: int = 0, reason: str | None = None
) -> Iterator[Failure]:
    """A job's failures in input order, streamed; the first `limit` of them, if one is given.

    Args:
        after: only records with a higher number.
        reason: only those that failed for it.
    """
    rows = tx.execute(
        text("""
            SELECT f.record, f.record_id, f.reason, f.detail
              FROM failures f
             WHERE f.job_id = :job AND f.generation = (SELECT generation FROM jobs WHERE id = :job)
               AND f.record > :after AND (CAST(:reason AS text) IS NULL OR f.reason = :reason)
             ORDER BY f.record LIMIT :limit
        """).execution_options(yield_per=1000),
        {"job": job_id, "limit": limit, "after": after, "reason": reason},
    )
    for row in rows:
        yield Failure(row.record, row.record_id, FailureReason(row.reason), row.detail)


def failure_batches(ledger: Engine, job_id: int, *, reason: str | None = None) -> Iterator[list[Failure]]:
    """A job's failures in input order, so many at a time, each time in a transaction of its own.

    In between none is open: PostgreSQL ends one that waits long for a slow reader (`database.IDLE_TIMEOUT`).

    Args:
        reason: only those that failed for it.
    """
    after = 0
    while True:

        def read(tx: Connection, after: int = after) -> list[Failure]:
            return list(failures_of(tx, job_id, limit=BATCH_RECORDS, after=after, reason=reason))

        batch = in_transaction(ledger, read)
        yield batch
        if len(batch) < BATCH_RECORDS:
            return
        after = batch[-1].record


def failure_counts(tx: Connection, job_id: int) -> dict[str, int]:
    """A job's failures by reason, the most frequent first."""
    rows = tx.execute(
        text("""
            SELECT f.reason, count(*) AS n
              FROM failures f JOIN jobs j ON j.id = f.job_id AND j.generation = f.generation
             WHERE f.job_id = :job GROUP BY f.reason ORDER BY n DESC, f.reason
        """),
        {"job": job_id},
    )
    return {row.reason: row.n for row in rows}


NEWEST_SETBACK = """
    SELECT c.error FROM chunks c
     WHERE c.job_id = j.id AND c.state = 'pending' AND c.error IS NOT NULL
     ORDER BY c.claimed_at DESC NULLS LAST LIMIT 1
"""
"""Of a job `j`. A chunk that was only ever declined has no attempt: it must not hide one that failed."""


def find_setback(tx: Connection, job_id: int) -> str | None:
    """Why a chunk that waits did not run when it could have, or how its last attempt ended; None if all is well."""
    return tx.execute(
        text(f"SELECT ({NEWEST_SETBACK}) FROM jobs j WHERE j.id = :job"),  # noqa: S608 - a constant
        {"job": job_id},
    ).scalar_one_or_none()


JOB = """
    SELECT j.*, i.size AS input_bytes, i.residues AS input_residues, i.location, i.compression, m.path AS model_path,
           (SELECT s.stem FROM submissions s WHERE s.job_id = j.id ORDER BY s.id LIMIT 1) AS stem
      FROM jobs j JOIN inputs i ON i.sha256 = j.input_sha256 JOIN models m ON m.name = j.model
"""


def get_job(tx: Connection, job_id: int) -> Row[Any]:
    """All columns of a job, with its input's size and location and its first submission's stem.

    Raises:
        JobError: if there is no such job.
    """
    row = tx.execute(text(JOB + " WHERE j.id = :job"), {"job": job_id}).one_or_none()
    if row is None:
        raise JobError(f"there is no job {job_id}", todo="List the jobs with `virnucpro status`.")
    return row


def find_job(tx: Connection, input_sha256: str, recipe_sha256: str) -> int | None:
    """The job of an input under a recipe, if it is registered."""
    return tx.execute(
        text("SELECT id FROM jobs WHERE input_sha256 = :input AND recipe_sha256 = :recipe"),
        {"input": input_sha256, "recipe": recipe_sha256},
    ).scalar_one_or_none()


def list_jobs(tx: Connection, *, limit: int = 50) -> Sequence[Row[Any]]:
    """The newest jobs first, as `get_job` returns them."""
    return tx.execute(text(JOB + " ORDER BY j.id DESC LIMIT :limit"), {"limit": limit}).all()


def list_models(tx: Connection) -> Sequence[Row[Any]]:
    """The registered models by name."""
    return tx.execute(text("SELECT * FROM models ORDER BY name")).all()


def next_published(tx: Connection, queue: str, limit: int) -> list[int]:
    """The chunks whose messages a queue's workers get next. A guess, for reading ahead."""
    return list(
        tx.execute(
            text("""
                SELECT chunk_id FROM outbox WHERE queue = :queue AND published_at IS NOT NULL
                 ORDER BY published_at, chunk_id LIMIT :limit
            """),
            {"queue": queue, "limit": limit},
        ).scalars()
    )


def live_workers(tx: Connection) -> Sequence[Row[Any]]:
    """The live workers and the chunk each one holds."""
    return tx.execute(
        text("""
            SELECT w.*, c.id AS chunk_id, c.job_id, c.stage, c.ordinal, c.claimed_at
              FROM workers w LEFT JOIN chunks c ON c.worker_id = w.id AND c.state = 'running'
             WHERE w.state = 'live' ORDER BY w.node
        """)
    ).all()
