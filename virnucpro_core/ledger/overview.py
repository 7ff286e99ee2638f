"""What a person who watches wants to see: how far each job is, when it will end, what each worker does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

RECENT_CHUNKS = 32  # how many of a job's last chunks its present rate is taken from


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOverview:
    """How far one job is.

    Attributes:
        stem: what its first submission calls the result.
        records, embeddings, failed: records in all, embedded so far, failed so far.
        residues, residues_done: residues in all, and in the extract chunks that are done.
        residues_per_second: over the last 32 chunks that were done, by the clock on the wall, all workers together;
            None before the first, and once extraction is over.
        seconds_left: of extraction at that rate; None where there is no rate.
        setback: how the newest failed attempt of a chunk that waits ended, None if all is well.
    """

    id: int
    stem: str | None
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
    """One live worker, and the chunk that it holds, if any.

    Attributes:
        heartbeat_seconds, progress_seconds: ages of its last heartbeat, and of its last sign of progress.
        chunk_seconds: for how long it has held its chunk.
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
    tokens_per_second: float | None
    gpu_utilization: float | None
    gpu_memory_used: int | None
    gpu_memory_total: int | None
    gpu_memory_peak: int | None


def list_job_overviews(
    tx: Connection, *, limit: int = 50, job_id: int | None = None, state: str | None = None
) -> list[JobOverview]:
    """The newest jobs first; one job, or those in one state, if asked."""
    rows = tx.execute(
        text("""
            SELECT j.id, j.model, j.state, j.stage, j.generation, j.chunks_total, j.chunks_left, j.records,
                   j.embeddings, j.failed, j.error, j.created_at, j.finished_at, i.residues,
                   (SELECT s.stem FROM submissions s WHERE s.job_id = j.id ORDER BY s.id LIMIT 1) AS stem,
                   CASE WHEN j.stage = 'extract' THEN coalesce(done.residues, 0) ELSE i.residues END AS residues_done,
                   recent.residues / nullif(recent.seconds, 0) AS residues_per_second,
                   setback.error AS setback
              FROM jobs j
              JOIN inputs i ON i.sha256 = j.input_sha256
              LEFT JOIN LATERAL (
                   SELECT sum(c.residues) AS residues FROM chunks c
                    WHERE c.job_id = j.id AND c.stage = 'extract' AND c.state = 'done') done
                ON j.stage = 'extract'
              LEFT JOIN LATERAL (
                   SELECT sum(last.residues) AS residues,
                          extract(epoch FROM max(last.finished_at) - min(last.claimed_at)) AS seconds
                     FROM (SELECT c.residues, c.claimed_at, c.finished_at FROM chunks c
                            WHERE c.job_id = j.id AND c.stage = 'extract' AND c.state = 'done'
                              AND c.finished_at > now() - interval '1 hour'
                            ORDER BY c.finished_at DESC LIMIT :recent) last) recent
                ON j.state = 'running' AND j.stage = 'extract'
              LEFT JOIN LATERAL (
                   SELECT c.error FROM chunks c
                    WHERE c.job_id = j.id AND c.state = 'pending' AND c.error IS NOT NULL
                    ORDER BY c.claimed_at DESC LIMIT 1) setback
                ON j.state = 'running'
             WHERE (CAST(:job AS bigint) IS NULL OR j.id = :job) AND (CAST(:state AS text) IS NULL OR j.state = :state)
             ORDER BY j.id DESC LIMIT :limit
        """),
        {"recent": RECENT_CHUNKS, "job": job_id, "state": state, "limit": limit},
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
    """The live workers by node. One that writes a chunk while it computes the next is there with each of them."""
    rows = tx.execute(
        text("""
            SELECT w.id, w.node, w.queue, w.host, w.device, w.gpu_utilization, w.gpu_memory_used,
                   w.gpu_memory_total, w.gpu_memory_peak,
                   CAST(extract(epoch FROM now() - w.heartbeat_at) AS float) AS heartbeat_seconds,
                   CAST(extract(epoch FROM now() - w.progress_at) AS float) AS progress_seconds,
                   c.job_id, c.stage, c.ordinal, j.chunks_total,
                   CAST(extract(epoch FROM now() - c.claimed_at) AS float) AS chunk_seconds,
                   last.tokens_per_second
              FROM workers w
              LEFT JOIN LATERAL (SELECT d.tokens / nullif(d.seconds, 0) AS tokens_per_second FROM chunks d
                                  WHERE d.worker_id = w.id AND d.state = 'done' AND d.stage = 'extract'
                                  ORDER BY d.finished_at DESC LIMIT 1) last ON true
              LEFT JOIN chunks c ON c.worker_id = w.id AND c.state = 'running'
              LEFT JOIN jobs j ON j.id = c.job_id
             WHERE w.state = 'live' ORDER BY w.node
        """)
    )
    return [WorkerOverview(**row._asdict()) for row in rows]
