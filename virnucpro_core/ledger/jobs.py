"""What happens to a job as a whole: it begins, resumes, begins anew, is cancelled."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from virnucpro_core.errors import JobError
from virnucpro_core.ledger.outbox import enqueue_pending, withdraw_messages
from virnucpro_core.ledger.queries import count_artifacts
from virnucpro_core.ledger.setbacks import SetbackKind, note_setbacks
from virnucpro_core.ledger.transitions import (
    EXTRACT,
    MATRIX,
    MERGE,
    VALIDATE,
    advance,
    forget_chunks,
    lock_job,
    restart_from,
)
from virnucpro_core.ledger.work import Resumed
from virnucpro_core.sequences.chunks import ChunkRange

LOST_ARTIFACT = "its artifact was lost"


def enter_chunks(tx: Connection, job_id: int, chunks: Sequence[ChunkRange]) -> None:
    """Enter a job's extract chunks and make their messages due."""
    insert_chunks(tx, job_id, chunks)
    enqueue_pending(tx, job_id)


def insert_chunks(tx: Connection, job_id: int, chunks: Sequence[ChunkRange], *, deaths: int = 0) -> None:
    """Enter extract chunks.

    Args:
        deaths: workers that died of the records in them, in larger chunks.
    """
    tx.execute(
        text("""
            INSERT INTO chunks (job_id, stage, ordinal, byte_start, byte_end, virtual_start, first_record, records,
                                residues, sha256, attempts, deaths)
            VALUES (:job, :stage, :ordinal, :byte_start, :byte_end, :virtual_start, :first_record, :records,
                    :residues, :sha256, :deaths, :deaths)
        """),
        [
            {
                "job": job_id,
                "stage": EXTRACT,
                "ordinal": chunk.ordinal,
                "byte_start": chunk.byte_start,
                "byte_end": chunk.byte_end,
                "virtual_start": chunk.virtual_start,
                "first_record": chunk.first_record,
                "records": chunk.records,
                "residues": chunk.residues,
                "sha256": chunk.sha256,
                "deaths": deaths,
            }
            for chunk in chunks
        ],
    )


def begin_generation(
    tx: Connection, job_id: int, chunks: Sequence[ChunkRange], *, forced_by: str | None = None
) -> None:
    """Compute a job anew. Leases and files of older generations are fenced off, not touched."""
    tx.execute(text("DELETE FROM chunks WHERE job_id = :job"), {"job": job_id})
    tx.execute(
        text("""
            UPDATE jobs
               SET generation = generation + 1, state = 'running', stage = :stage, stage_since = now(),
                   chunks_total = :chunks, chunks_left = :chunks, embeddings = 0, failed = 0, truncated = 0,
                   unknown = 0, residues_done = 0, tokens = 0, seconds = 0, execution_class = NULL, execution = NULL,
                   error = NULL, finished_at = NULL, forced_by = :forced_by
             WHERE id = :job
        """),
        {"job": job_id, "stage": EXTRACT, "chunks": len(chunks), "forced_by": forced_by},
    )
    enter_chunks(tx, job_id, chunks)


def resume(tx: Connection, job_id: int, lost: Sequence[int] = ()) -> Resumed:
    """Have a job do what is missing or failed, and nothing else. Harmless at any time.

    Args:
        lost: ids of artifacts of the current generation whose files are missing or damaged.

    Raises:
        JobError: if there is no such job.
    """
    job = lock_job(tx, job_id)
    stages_lost = set(
        tx.execute(
            text(
                "SELECT stage FROM artifacts WHERE id = ANY(:lost) AND job_id = :job AND generation = :generation"
            ),
            {"lost": list(lost), "job": job_id, "generation": job.generation},
        ).scalars()
    )
    tx.execute(text("DELETE FROM artifacts WHERE id = ANY(:lost)"), {"lost": list(lost)})
    tx.execute(
        text("""
            UPDATE chunks SET state = 'pending', attempts = 0, deaths = 0, finished_at = NULL
             WHERE job_id = :job AND (state = 'failed' OR (state = 'pending' AND :ended))
        """),
        {"job": job_id, "ended": job.state != "running"},
    )
    tx.execute(
        text("""
            UPDATE jobs SET state = 'running', stage_since = now(), error = NULL, finished_at = NULL
             WHERE id = :job AND state IN ('failed', 'cancelled')
        """),
        {"job": job_id},
    )
    reset = 0
    if EXTRACT in stages_lost and job.state == "succeeded" and is_cleaned(tx, job_id):
        stages_lost.remove(EXTRACT)
    elif EXTRACT in stages_lost or (MERGE in stages_lost and not is_merged(tx, job_id)):
        reset = reset_lost_chunks(tx, job_id)
    if not reset and stages_lost:
        stage = MERGE if MERGE in stages_lost else VALIDATE
        if (job.state, job.stage) != ("running", stage):  # it sees to its files itself
            redo(tx, job_id, stage)
    elif job.state in ("failed", "cancelled") and not reset and job.chunks_left == 0:
        advance(tx, job_id)
    enqueue_pending(tx, job_id)
    return count_work(tx, job_id, reset)


def is_cleaned(tx: Connection, job_id: int) -> bool:
    """Whether only the chunk artifacts are gone, and all of them: so cleaning that was cut off leaves a job."""
    return is_merged(tx, job_id) and count_artifacts(tx, job_id, stage=EXTRACT) == 0


def is_merged(tx: Connection, job_id: int) -> bool:
    """Whether the merged matrix of the current generation is there, from which all other results can be made."""
    return (
        tx.execute(
            text("""
                SELECT 1 FROM artifacts a JOIN jobs j ON j.id = a.job_id AND j.generation = a.generation
                 WHERE j.id = :job AND a.stage = :stage AND a.kind = :kind
            """),
            {"job": job_id, "stage": MERGE, "kind": MATRIX},
        ).first()
        is not None
    )


def redo(tx: Connection, job_id: int, stage: str) -> bool:
    """Begin a stage anew if the job has reached it; a job that has not will come to it anyway."""
    reached = tx.execute(
        text("""
            SELECT 1 FROM jobs j JOIN stages now ON now.name = j.stage JOIN stages s ON s.name = :stage
             WHERE j.id = :job AND s.position <= now.position
        """),
        {"job": job_id, "stage": stage},
    ).first()
    if reached is None:
        return False
    restart_from(tx, job_id, stage)
    return True


def count_work(tx: Connection, job_id: int, lost: int) -> Resumed:
    counted = tx.execute(
        text("""
            SELECT count(*) FILTER (WHERE c.stage = :extract) AS chunks,
                   count(*) FILTER (WHERE c.stage = :extract AND c.state = 'done') AS kept,
                   count(*) FILTER (WHERE c.state = 'pending') AS waiting
              FROM chunks c WHERE c.job_id = :job
        """),
        {"job": job_id, "extract": EXTRACT},
    ).one()
    return Resumed(chunks=counted.chunks, kept=counted.kept, lost=lost, waiting=counted.waiting)


def reset_lost_chunks(tx: Connection, job_id: int) -> int:
    """Make every done extract chunk without an artifact pending again, and take its counts off the job's.

    The job returns to its first stage; later stages are forgotten, whoever runs one is fenced off.
    """
    job = lock_job(tx, job_id)
    lost = tx.execute(
        text("""
            SELECT c.id, c.first_record, c.records
              FROM chunks c
             WHERE c.job_id = :job AND c.stage = :stage AND c.state = 'done'
               AND NOT EXISTS (SELECT 1 FROM artifacts a
                                WHERE a.job_id = c.job_id AND a.generation = :generation
                                  AND a.stage = c.stage AND a.ordinal = c.ordinal)
        """),
        {"job": job_id, "stage": EXTRACT, "generation": job.generation},
    ).all()
    if not lost:
        return 0
    forget_chunks(tx, job_id, MERGE)
    tx.execute(
        text("""
            DELETE FROM artifacts WHERE job_id = :job AND generation = :generation AND stage <> :extract
        """),
        {"job": job_id, "generation": job.generation, "extract": EXTRACT},
    )
    tx.execute(
        text("""
            DELETE FROM failures
             WHERE job_id = :job AND generation = :generation AND record BETWEEN :first AND :last
        """),
        [
            {
                "job": job_id,
                "generation": job.generation,
                "first": chunk.first_record,
                "last": chunk.first_record + chunk.records - 1,
            }
            for chunk in lost
        ],
    )
    chunks = [chunk.id for chunk in lost]
    note_setbacks(tx, chunks, SetbackKind.LOST, LOST_ARTIFACT)
    tx.execute(
        text("""
            UPDATE chunks
               SET state = 'pending', attempts = 0, deaths = 0, finished_at = NULL, embeddings = NULL, failed = NULL,
                   truncated = 0, unknown = 0, tokens = 0, seconds = NULL, error = :error
             WHERE id = ANY(:chunks)
        """),
        {"chunks": chunks, "error": LOST_ARTIFACT},
    )
    tx.execute(
        text("""
            UPDATE jobs j
               SET state = 'running', stage = :stage, stage_since = now(), error = NULL, finished_at = NULL,
                   chunks_total = c.total, chunks_left = c.unfinished, embeddings = c.embeddings, failed = c.failed,
                   truncated = c.truncated, unknown = c.unknown, residues_done = c.residues, tokens = c.tokens,
                   seconds = c.seconds
              FROM (SELECT count(*) AS total, count(*) FILTER (WHERE state <> 'done') AS unfinished,
                           coalesce(sum(residues) FILTER (WHERE state = 'done'), 0) AS residues,
                           coalesce(sum(embeddings), 0) AS embeddings, coalesce(sum(failed), 0) AS failed,
                           sum(truncated) AS truncated, sum(unknown) AS unknown, sum(tokens) AS tokens,
                           coalesce(sum(seconds), 0) AS seconds
                      FROM chunks WHERE job_id = :job AND stage = :stage) c
             WHERE j.id = :job
        """),
        {"job": job_id, "stage": EXTRACT},
    )
    return len(lost)


def serve_late_submission(tx: Connection, job_id: int) -> None:
    """Run again the stage that a submission came too late for: merge for nucleotides, else validate."""
    job = lock_job(tx, job_id)
    brings_nucleotides: bool | None = tx.execute(
        text("""
            SELECT bool_or(nucleotide_path <> '') FROM submissions
             WHERE job_id = :job AND published_generation IS DISTINCT FROM :generation
        """),
        {"job": job_id, "generation": job.generation},
    ).scalar_one()
    if brings_nucleotides is not None:
        redo(tx, job_id, MERGE if brings_nucleotides else VALIDATE)


def cancel(tx: Connection, job_id: int, *, by: str) -> None:
    """Stop a running job. Its finished chunks are kept; whoever runs one of the others is fenced off.

    Raises:
        JobError: if there is no such job, or it does not run.
    """
    job = lock_job(tx, job_id)
    if job.state != "running":
        raise JobError(f"job {job_id} is over: {job.state}", todo="Only a running job can be cancelled.")
    tx.execute(
        text("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = :job"), {"job": job_id}
    )
    held = tx.execute(
        text("SELECT id FROM chunks WHERE job_id = :job AND state = 'running'"), {"job": job_id}
    ).scalars()
    note_setbacks(tx, held.all(), SetbackKind.CANCELLED, f"cancelled by {by}")
    tx.execute(
        text("""
            UPDATE chunks SET state = 'pending', lease_token = NULL, attempts = attempts - 1
             WHERE job_id = :job AND state = 'running'
        """),
        {"job": job_id},
    )
    withdraw_messages(tx, job_id)
