"""Workers in the ledger: their heartbeats, and what becomes of their chunks when they fall silent."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from virnucpro_core.ledger.transitions import enqueue, fail_job, lock_job


@dataclass(frozen=True, slots=True)
class Recovered:
    """A chunk taken back from a worker, and what became of it."""

    chunk_id: int
    job_id: int
    worker_id: int
    state: str


def register_worker(
    tx: Connection,
    *,
    node: str,
    queue: str,
    host: str,
    pid: int,
    device: str,
    lease_seconds: float,
    max_attempts: int | None = None,
) -> tuple[int, list[Recovered]]:
    """Enter a new process of `node`. Whoever ran under that name before is gone, its chunks are free again.

    Args:
        max_attempts: claims of a chunk before it fails: a chunk that kills each process of its node must not do so
            for ever.

    Returns:
        The worker's id, and the chunks taken back from its predecessor.
    """
    predecessors = tx.execute(
        text("UPDATE workers SET state = 'gone' WHERE node = :node AND state = 'live' RETURNING id"),
        {"node": node},
    ).scalars()
    recovered = [
        chunk
        for worker in predecessors.all()
        for chunk in take_back(tx, worker, "the worker was replaced", max_attempts=max_attempts)
    ]
    worker_id: int = tx.execute(
        text("""
            INSERT INTO workers (node, queue, host, pid, device, lease_expires_at)
            VALUES (:node, :queue, :host, :pid, :device, now() + make_interval(secs => :lease))
            RETURNING id
        """),
        {"node": node, "queue": queue, "host": host, "pid": pid, "device": device, "lease": lease_seconds},
    ).scalar_one()
    return worker_id, recovered


def beat(tx: Connection, worker_id: int, *, progress: int, lease_seconds: float) -> bool:
    """Renew all leases of a worker by renewing its own.

    Args:
        progress: a number that rises while the worker gets anything done.

    Returns:
        False if the worker has been given up; it must stop, its chunks are in other hands.
    """
    renewed = tx.execute(
        text("""
            UPDATE workers
               SET heartbeat_at = now(), lease_expires_at = now() + make_interval(secs => :lease),
                   progress_at = CASE WHEN progress = :progress THEN progress_at ELSE now() END, progress = :progress
             WHERE id = :worker AND state = 'live'
        """),
        {"worker": worker_id, "progress": progress, "lease": lease_seconds},
    )
    return renewed.rowcount == 1


def retire_worker(tx: Connection, worker_id: int) -> list[Recovered]:
    """Strike off a worker that shuts down in order; a chunk it still holds is free again, the attempt forgiven."""
    tx.execute(
        text("UPDATE workers SET state = 'gone' WHERE id = :worker AND state = 'live'"), {"worker": worker_id}
    )
    return take_back(tx, worker_id, None)


def expire_workers(tx: Connection) -> list[int]:
    """Give up the workers whose lease has run out by the database's clock; returns their ids."""
    return list(
        tx.execute(
            text(
                "UPDATE workers SET state = 'gone' WHERE state = 'live' AND lease_expires_at < now() RETURNING id"
            )
        ).scalars()
    )


def expire_stuck_workers(tx: Connection, *, stuck_seconds: float) -> list[int]:
    """Give up the workers that live but have made no progress on a chunk for `stuck_seconds`; returns their ids."""
    return list(
        tx.execute(
            text("""
                UPDATE workers w SET state = 'stuck'
                  FROM chunks c
                 WHERE w.state = 'live' AND c.worker_id = w.id AND c.state = 'running'
                   AND greatest(w.progress_at, c.claimed_at) < now() - make_interval(secs => :stuck)
                RETURNING w.id
            """),
            {"stuck": stuck_seconds},
        ).scalars()
    )


def chunks_of_the_gone(tx: Connection) -> list[int]:
    """Workers that are no longer live but still hold chunks (a reaper was itself interrupted)."""
    return list(
        tx.execute(
            text("""
                SELECT DISTINCT w.id FROM chunks c JOIN workers w ON w.id = c.worker_id
                 WHERE c.state = 'running' AND w.state <> 'live'
            """)
        ).scalars()
    )


def take_back(
    tx: Connection, worker_id: int, reason: str | None, *, max_attempts: int | None = None
) -> list[Recovered]:
    """Free the chunks of a worker. Those out of attempts fail, and their job with them.

    Args:
        reason: recorded as the chunk's last error; None forgives the attempt.
    """
    held = tx.execute(
        text("SELECT id, job_id FROM chunks WHERE worker_id = :worker AND state = 'running' ORDER BY id"),
        {"worker": worker_id},
    ).all()
    recovered = []
    for chunk in held:
        lock_job(tx, chunk.job_id)
        row = tx.execute(
            text("""
                UPDATE chunks
                   SET state = CASE WHEN attempts >= coalesce(CAST(:max_attempts AS bigint), attempts + 1)
                                    THEN 'failed' ELSE 'pending' END,
                       error = coalesce(:reason, error),
                       attempts = attempts - CASE WHEN CAST(:reason AS text) IS NULL THEN 1 ELSE 0 END,
                       lease_token = NULL
                 WHERE id = :chunk AND worker_id = :worker AND state = 'running'
                RETURNING state, stage, ordinal
            """),
            {"chunk": chunk.id, "worker": worker_id, "reason": reason, "max_attempts": max_attempts},
        ).one_or_none()
        if row is None:
            continue
        if row.state == "failed":
            said = f"{row.stage} chunk {row.ordinal + 1}: {reason}; no attempt is left"
            fail_job(tx, chunk.job_id, said)
        else:
            enqueue(tx, chunk.id)
        recovered.append(Recovered(chunk.id, chunk.job_id, worker_id, row.state))
    return recovered
