"""What a person who watches wants to see: how far each job is, when it will end, what each worker does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from virnucpro_core.ledger.queries import NEWEST_SETBACK

RECENT_CHUNKS = 32  # how many of a job's last chunks its present rate is taken from


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOverview:
    """How far one job is.

    Attributes:
        stem: what its first submission calls the result; of those that were looked for, if a name was.
        files: how many files have been submitted that are this job: equal ones are one job.
        records, embeddings, failed: records in all, embedded so far, failed so far.
        residues, residues_done: residues in all, and in the extract chunks that are done.
        residues_per_second: over the last 32 chunks that were done within an hour, by the clock on the wall, all
            workers together; falls when nothing more is done. None without one, and once extraction is over.
        seconds_left: of extraction at that rate; None where there is no rate.
        setback: how the newest failed attempt of a chunk that waits ended, None if all is well.
    """

    id: int
    stem: str | None
    files: int
    model: str
    state: str
    stage: str
    generation: int
    chunks_total: int
    chunks_left: int
    records: int
    embeddings: int
    failed: int
    residues: int
    residues_done: int
    residues_per_second: float | None
    seconds_left: float | None
    setback: str | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOverview:
    """One live worker, and the chunk that it works on: the newest that it holds, as it writes one while it computes.

    Attributes:
        heartbeat_seconds, progress_seconds: ages of its last heartbeat, and of its last sign of progress.
        chunk_seconds: for how long it has held that chunk.
        lease_seconds: for how long it has held the oldest of its chunks.
        tokens_per_second: while it computed the last chunk that it did; None before that.
        gpu_utilization: share of the last moments in which its GPU computed anything; None where nobody can tell.
        gpu_memory_used, gpu_memory_total: of its GPU, in bytes, whoever uses it; None on a CPU.
        gpu_memory_peak: the most bytes that the worker itself has had; None on a CPU.
    """

    id: int
    node: str
    queue: str
    host: str
    device: str
    heartbeat_seconds: float
    progress_seconds: float
    job_id: int | None
    stage: str | None
    ordinal: int | None
    chunks_total: int | None
    chunk_seconds: float | None
    lease_seconds: float | None
    tokens_per_second: float | None
    gpu_utilization: float | None
    gpu_memory_used: int | None
    gpu_memory_total: int | None
    gpu_memory_peak: int | None


def list_job_overviews(
    tx: Connection,
    *,
    limit: int = 50,
    jobs: Sequence[int] | None = None,
    state: str | None = None,
    named: str = "",
    before: int | None = None,
) -> list[JobOverview]:
    """The newest jobs first.

    Args:
        jobs: only those with these ids.
        state: only those in this state.
        named: only those with a submission whose path has this in it, in whatever case.
        before: only those older than this job.
    """
    rows = tx.execute(
        text(f"""
            SELECT j.id, j.model, j.state, j.stage, j.generation, j.chunks_total, j.chunks_left, j.records,
                   j.embeddings, j.failed, j.error, j.created_at, j.finished_at, i.residues,
                   asked.stem, asked.files, j.residues_done,
                   recent.residues / nullif(recent.seconds, 0) AS residues_per_second,
                   setback.error AS setback
              FROM jobs j
              JOIN inputs i ON i.sha256 = j.input_sha256
             CROSS JOIN LATERAL (
                   SELECT count(DISTINCT s.path) AS files,
                          (array_agg(s.stem ORDER BY s.id)
                           FILTER (WHERE position(lower(:named) IN lower(s.path)) > 0))[1] AS stem
                     FROM submissions s WHERE s.job_id = j.id) asked
              LEFT JOIN LATERAL (
                   -- From the end of the chunk before them: what a slow worker began long ago must not count.
                   SELECT sum(last.residues) FILTER (WHERE last.place <= :recent) AS residues,
                          extract(epoch FROM greatest(
                              max(last.finished_at) - CASE WHEN count(*) > :recent THEN min(last.finished_at)
                                                           ELSE min(last.claimed_at) END,
                              now() - max(last.finished_at))) AS seconds
                     FROM (SELECT c.residues, c.claimed_at, c.finished_at,
                                  row_number() OVER (ORDER BY c.finished_at DESC, c.id DESC) AS place
                             FROM chunks c
                            WHERE c.job_id = j.id AND c.stage = 'extract' AND c.state = 'done'
                              AND c.finished_at > now() - interval '1 hour'
                              AND c.claimed_at >= j.stage_since  -- a job may have rested before it was resumed
                            ORDER BY c.finished_at DESC, c.id DESC LIMIT :window) last) recent
                ON j.state = 'running' AND j.stage = 'extract'
              LEFT JOIN LATERAL ({NEWEST_SETBACK}) setback ON j.state = 'running'
             WHERE (CAST(:state AS text) IS NULL OR j.state = :state)
               AND (CAST(:jobs AS bigint[]) IS NULL OR j.id = ANY(:jobs))
               AND (CAST(:before AS bigint) IS NULL OR j.id < :before)
               AND (:named = '' OR asked.stem IS NOT NULL)
             ORDER BY j.id DESC LIMIT :limit
        """),  # noqa: S608 - a constant
        {
            "recent": RECENT_CHUNKS,
            "window": RECENT_CHUNKS + 1,
            "jobs": None if jobs is None else list(jobs),
            "state": state,
            "named": named,
            "before": before,
            "limit": limit,
        },
    )
    overviews = []
    for row in rows:
        values = row._asdict()
        rate = None if row.residues_per_second is None else float(row.residues_per_second)
        done = int(row.residues_done)
        values |= {
            "residues_done": done,
            "residues_per_second": rate,
            "seconds_left": (row.residues - done) / rate if rate else None,
        }
        overviews.append(JobOverview(**values))
    return overviews


def list_worker_overviews(tx: Connection) -> Sequence[WorkerOverview]:
    """The live workers by node."""
    rows = tx.execute(
        text("""
            SELECT w.id, w.node, w.queue, w.host, w.device, w.gpu_utilization, w.gpu_memory_used,
                   w.gpu_memory_total, w.gpu_memory_peak,
                   CAST(extract(epoch FROM now() - w.heartbeat_at) AS float) AS heartbeat_seconds,
                   CAST(extract(epoch FROM now() - w.progress_at) AS float) AS progress_seconds,
                   c.job_id, c.stage, c.ordinal, j.chunks_total,
                   CAST(extract(epoch FROM now() - c.claimed_at) AS float) AS chunk_seconds,
                   CAST(extract(epoch FROM now() - c.held_since) AS float) AS lease_seconds,
                   last.tokens_per_second
              FROM workers w
              LEFT JOIN LATERAL (SELECT d.tokens / nullif(d.seconds, 0) AS tokens_per_second FROM chunks d
                                  WHERE d.worker_id = w.id AND d.state = 'done' AND d.stage = 'extract'
                                  ORDER BY d.finished_at DESC LIMIT 1) last ON true
              LEFT JOIN LATERAL (
                   SELECT h.job_id, h.stage, h.ordinal, h.claimed_at, min(h.claimed_at) OVER () AS held_since
                     FROM chunks h
                    WHERE h.worker_id = w.id AND h.state = 'running'
                    ORDER BY h.claimed_at DESC, h.lease_token DESC LIMIT 1) c ON true
              LEFT JOIN jobs j ON j.id = c.job_id
             WHERE w.state = 'live' ORDER BY w.node
        """)
    )
    return [WorkerOverview(**row._asdict()) for row in rows]


@dataclass(frozen=True, slots=True)
class RecentFailure:
    """A record without an embedding, and when its chunk was done."""

    job: int
    record: int
    id: str
    reason: str
    detail: str
    finished_at: datetime


def list_newest_failures(tx: Connection, limit: int, *, job_id: int | None = None) -> list[RecentFailure]:
    """The failures of the chunks that were done last, the newest first, of all jobs or of one."""
    rows = tx.execute(
        text("""
            SELECT f.job_id, f.record, f.record_id, f.reason, f.detail, c.finished_at
              FROM (SELECT c.*, j.generation FROM chunks c JOIN jobs j ON j.id = c.job_id
                     WHERE c.stage = 'extract' AND c.failed > 0
                       AND (CAST(:job AS bigint) IS NULL OR c.job_id = :job)
                     ORDER BY c.finished_at DESC LIMIT :limit) c
              CROSS JOIN LATERAL (
                   SELECT * FROM failures f
                    WHERE f.job_id = c.job_id AND f.generation = c.generation
                      AND f.record BETWEEN c.first_record AND c.first_record + c.records - 1
                    ORDER BY f.record DESC LIMIT :limit) f
             ORDER BY c.finished_at DESC, f.record DESC LIMIT :limit
        """),
        {"job": job_id, "limit": limit},
    )
    return [RecentFailure(*row) for row in rows]
