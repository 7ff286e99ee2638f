"""The ledger's transitions: claim, complete, fail, and what follows from them.

Each function is one step of the caller's transaction. Whoever changes a chunk in a way that moves its job
locks the job's row first, then the chunk's: one order, so that two of them wait instead of deadlocking.
None reads more rows than it changes, so the cost of a step does not grow with the job.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from virnucpro_core.errors import JobError, StaleLeaseError
from virnucpro_core.ledger.outbox import enqueue, wake_relay, withdraw_messages
from virnucpro_core.ledger.results import (
    forget_older_generations,
    mark_published,
    note_unmerged,
    replace_artifacts,
    replace_failures,
)
from virnucpro_core.ledger.setbacks import SetbackKind, note_setbacks
from virnucpro_core.ledger.tallies import count_commit
from virnucpro_core.ledger.work import Claim, Result, Work
from virnucpro_core.recipe import Recipe
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import Compression

EXTRACT, MERGE, VALIDATE = "extract", "merge", "validate"
MATRIX = "matrix"
"""The kind of artifact that holds rows of embeddings: a chunk's, or all of a job's once they are merged."""

DESCRIBE = text("""
    SELECT c.id, c.job_id, c.stage, c.ordinal, c.byte_start, c.byte_end, c.virtual_start, c.first_record, c.records,
           c.residues, c.sha256, c.state AS chunk_state, j.generation, j.state AS job_state, j.chunks_total,
           j.input_sha256, j.recipe, j.model, j.execution_class, m.path AS model_path, i.location, i.compression,
           (SELECT s.stem FROM submissions s WHERE s.job_id = j.id ORDER BY s.id LIMIT 1) AS stem
      FROM chunks c
      JOIN jobs j ON j.id = c.job_id
      JOIN models m ON m.name = j.model
      JOIN inputs i ON i.sha256 = j.input_sha256
     WHERE c.id = :chunk
""")

PIN_EXECUTION_CLASS = text("""
    UPDATE jobs SET execution_class = :execution_class, execution = CAST(:execution AS jsonb) WHERE id = :job
""")

CLAIM = text("""
    UPDATE chunks c
       SET state = 'running', attempts = c.attempts + 1, lease_token = nextval('lease_tokens'),
           worker_id = w.id, claimed_at = now(), finished_at = NULL
      FROM workers w
     WHERE c.id = :chunk AND c.state = 'pending' AND w.id = :worker AND w.state = 'live'
    RETURNING c.lease_token, c.attempts, c.deaths, c.error
""")

LOCK_JOB = text("SELECT * FROM jobs WHERE id = :job FOR UPDATE")

FINISH_CHUNK = text("""
    UPDATE chunks
       SET state = 'done', lease_token = NULL, finished_at = now(), error = NULL, embeddings = :embeddings,
           failed = :failed, truncated = :truncated, unknown = :unknown, tokens = :tokens, seconds = :seconds
     WHERE id = :chunk AND lease_token = :token
""")

COUNT_CHUNK = text("""
    UPDATE jobs
       SET chunks_left = chunks_left - 1, embeddings = embeddings + :embeddings, failed = failed + :failed,
           truncated = truncated + :truncated, unknown = unknown + :unknown,
           residues_done = residues_done + :residues, tokens = tokens + :tokens, seconds = seconds + :seconds
     WHERE id = :job
    RETURNING chunks_left
""")

TRY_AGAIN = text("""
    UPDATE chunks
       SET state = 'pending', lease_token = NULL, error = :error
     WHERE id = :chunk AND lease_token = :token
""")

GIVE_UP = text("""
    UPDATE chunks SET state = 'failed', lease_token = NULL, finished_at = now(), error = :error
     WHERE id = :chunk AND lease_token = :token
""")


@dataclass(frozen=True, slots=True)
class Declined:
    """A chunk that this worker must not run, and why. Not an error: messages are hints."""

    chunk_id: int
    reason: str
    job_id: int | None = None


def work_from_row(row: Row[Any]) -> Work:
    return Work(
        chunk_id=row.id,
        job_id=row.job_id,
        generation=row.generation,
        stage=row.stage,
        chunks_total=row.chunks_total,
        range=ChunkRange(
            ordinal=row.ordinal,
            byte_start=row.byte_start,
            byte_end=row.byte_end,
            virtual_start=row.virtual_start,
            first_record=row.first_record,
            records=row.records,
            residues=row.residues,
            sha256=row.sha256,
        ),
        input_sha256=row.input_sha256,
        location=row.location,
        compression=Compression(row.compression),
        stem=row.stem or "",
        model=row.model,
        model_path=row.model_path,
        recipe=Recipe(**row.recipe),
    )


def describe(tx: Connection, chunk_id: int) -> Work | Declined:
    """A chunk's work, read without claiming it."""
    row = tx.execute(DESCRIBE, {"chunk": chunk_id}).one_or_none()
    if row is None:
        return Declined(chunk_id, "no such chunk")
    if row.job_state != "running":
        return Declined(chunk_id, f"its job is {row.job_state}", row.job_id)
    if row.chunk_state != "pending":
        return Declined(chunk_id, f"it is {row.chunk_state}", row.job_id)
    return work_from_row(row)


def claim(
    tx: Connection,
    work: Work,
    worker_id: int,
    *,
    execution_class: str | None = None,
    execution: dict[str, Any] | None = None,
) -> Claim | Declined:
    """Take a lease on a pending chunk.

    The first claim of a job that names an execution class pins it; a worker of another class is declined
    for as long as something of it is computed or being computed, so that no result is a mixture.
    """
    job = lock_job(tx, work.job_id)
    if job.state != "running" or (job.generation, job.stage) != (work.generation, work.stage):
        return Declined(
            work.chunk_id, f"its job is {job.state}, at {job.stage} of generation {job.generation}"
        )
    pins = execution_class not in (None, job.execution_class)
    if pins and job.execution_class is not None and is_begun(tx, job):
        return Declined(work.chunk_id, "its job is pinned to another execution class")
    row = tx.execute(CLAIM, {"chunk": work.chunk_id, "worker": worker_id}).one_or_none()
    if row is None:
        now = describe(tx, work.chunk_id)
        return now if isinstance(now, Declined) else Declined(work.chunk_id, "this worker is no longer live")
    if pins:
        tx.execute(
            PIN_EXECUTION_CLASS,
            {"job": work.job_id, "execution_class": execution_class, "execution": json.dumps(execution)},
        )
    tx.execute(text("DELETE FROM outbox WHERE chunk_id = :chunk"), {"chunk": work.chunk_id})
    wake_relay(tx)  # there is room for another message
    return Claim(work, worker_id, row.lease_token, row.attempts, row.deaths, row.error)


def is_begun(tx: Connection, job: Row[Any]) -> bool:
    """Whether a chunk of the stage that a job is in is done, or is being run."""
    held = text("SELECT 1 FROM chunks WHERE job_id = :job AND state = 'running' LIMIT 1")
    return job.chunks_left < job.chunks_total or tx.execute(held, {"job": job.id}).first() is not None


def complete(tx: Connection, claim: Claim, result: Result) -> str:
    """Commit a chunk: artifacts, failures, counters and, with the last chunk, whatever comes next.

    Returns:
        The job's state afterwards.

    Raises:
        StaleLeaseError: if the lease has passed to somebody else; nothing is changed.
    """
    work = claim.work
    job = lock_job(tx, work.job_id)
    extracting = work.stage == EXTRACT
    embeddings, failed = (
        (result.embeddings, len(result.failures)) if extracting else (job.embeddings, job.failed)
    )
    counts = {"truncated": result.truncated, "unknown": result.unknown, "tokens": result.tokens}
    finished = tx.execute(
        FINISH_CHUNK,
        {
            "chunk": work.chunk_id,
            "token": claim.token,
            "embeddings": embeddings,
            "failed": failed,
            "seconds": result.seconds,
            **counts,
        },
    )
    if finished.rowcount == 0:
        raise stale(claim)
    if extracting:
        replace_failures(tx, work, result.failures)
    replace_artifacts(tx, work, result.artifacts, result.execution)
    if work.stage == MERGE:
        note_unmerged(tx, work.job_id, result.unmerged)
    mark_published(tx, result.published, work.generation)
    count_commit(tx, claim, result)
    chunks_left = tx.execute(
        COUNT_CHUNK,
        {
            "job": work.job_id,
            "embeddings": embeddings if extracting else 0,
            "failed": failed if extracting else 0,
            "residues": work.range.residues if extracting else 0,
            "seconds": result.seconds if extracting else 0.0,
            **counts,
        },
    ).scalar_one()
    if chunks_left == 0 and job.state == "running":
        return advance(tx, work.job_id)
    return str(job.state)


def fail(tx: Connection, claim: Claim, error: str, *, max_attempts: int, permanent: bool = False) -> str:
    """End an attempt that failed: the chunk waits for another, or it and its job fail.

    Returns:
        The chunk's state afterwards.

    Raises:
        StaleLeaseError: if the lease has passed to somebody else.
    """
    lock_job(tx, claim.work.job_id)
    note_setbacks(tx, [claim.work.chunk_id], SetbackKind.FAILED, error, token=claim.token)
    lease = {"chunk": claim.work.chunk_id, "token": claim.token, "error": error}
    if permanent or claim.attempt - claim.deaths >= max_attempts:
        if tx.execute(GIVE_UP, lease).rowcount == 0:
            raise stale(claim)
        fail_job(tx, claim.work.job_id, f"{claim.work.title}: {error}")
        return "failed"
    if tx.execute(TRY_AGAIN, lease).rowcount == 0:
        raise stale(claim)
    enqueue(tx, claim.work.chunk_id, delay=float(claim.attempt**2))
    return "pending"


def fail_job(tx: Connection, job_id: int, error: str) -> None:
    """End a running job that cannot go on. The job's row is locked by the caller."""
    tx.execute(
        text("""
            UPDATE jobs
               SET state = 'failed', error = :error, finished_at = now(), times_failed = times_failed + 1
             WHERE id = :job AND state = 'running'
        """),
        {"job": job_id, "error": error},
    )
    withdraw_messages(tx, job_id)


def advance(tx: Connection, job_id: int) -> str:
    """Begin the job's next stage, or end it. The job's row is locked by the caller.

    Returns:
        The job's state afterwards.
    """
    following = tx.execute(
        text("""
            SELECT following.name
              FROM jobs j JOIN stages s ON s.name = j.stage
              JOIN stages following ON following.position > s.position
             WHERE j.id = :job ORDER BY following.position LIMIT 1
        """),
        {"job": job_id},
    ).scalar_one_or_none()
    if following is not None:
        begin_stage(tx, job_id, following)
        return "running"
    tx.execute(
        text("UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE id = :job"), {"job": job_id}
    )
    forget_older_generations(tx, job_id)
    return "succeeded"


def begin_stage(tx: Connection, job_id: int, stage: str) -> None:
    """Make the one chunk of a stage that covers the whole input, and the message for it."""
    tx.execute(
        text("""
            UPDATE jobs SET stage = :stage, stage_since = now(), chunks_total = 1, chunks_left = 1 WHERE id = :job
        """),
        {"job": job_id, "stage": stage},
    )
    chunk_id = tx.execute(
        text("""
            INSERT INTO chunks (job_id, stage, ordinal, byte_start, byte_end, first_record, records, residues, sha256)
            SELECT j.id, j.stage, 0, 0, i.size, 1, j.records, i.residues, i.sha256
              FROM jobs j JOIN inputs i ON i.sha256 = j.input_sha256
             WHERE j.id = :job
            RETURNING id
        """),
        {"job": job_id},
    ).scalar_one()
    enqueue(tx, chunk_id)


def restart_from(tx: Connection, job_id: int, stage: str) -> None:
    """Begin a stage anew. Whoever runs it, or one that follows, is fenced off.

    What it made before stays recorded until it is made again: merge goes on from a result that is still there.
    """
    forget_chunks(tx, job_id, stage)
    tx.execute(
        text("UPDATE jobs SET state = 'running', error = NULL, finished_at = NULL WHERE id = :job"),
        {"job": job_id},
    )
    begin_stage(tx, job_id, stage)


def forget_chunks(tx: Connection, job_id: int, first: str) -> None:
    """Delete the chunks of a stage and of all later ones."""
    tx.execute(
        text("""
            DELETE FROM chunks
             WHERE job_id = :job
               AND stage IN (SELECT name FROM stages
                              WHERE position >= (SELECT position FROM stages WHERE name = :stage))
        """),
        {"job": job_id, "stage": first},
    )


def lock_job(tx: Connection, job_id: int) -> Row[Any]:
    row = tx.execute(LOCK_JOB, {"job": job_id}).one_or_none()
    if row is None:
        raise JobError(f"there is no job {job_id}", todo="List the jobs with `virnucpro status`.")
    return row


def stale(claim: Claim) -> StaleLeaseError:
    return StaleLeaseError(
        "the lease has passed to somebody else; this result is dropped",
        where=f"{claim.work.title}, attempt {claim.attempt}, token {claim.token}",
        todo="Nothing needs doing: the chunk is in other hands.",
    )
