"""Workers in the ledger: their heartbeats, and what becomes of their chunks when they fall silent."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text

from virnucpro_core.gpus import GpuUse
from virnucpro_core.ledger.outbox import enqueue
from virnucpro_core.ledger.setbacks import SetbackKind, note_setbacks
from virnucpro_core.ledger.suspects import note_death
from virnucpro_core.ledger.tallies import count_duplicate
from virnucpro_core.ledger.transitions import lock_job
from virnucpro_core.ledger.work import Claim


@dataclass(frozen=True, slots=True)
class Recovered:
    """A chunk taken back from a worker, and what became of it."""

    chunk_id: int
    job_id: int
    stage: str
    attempt: int
    worker_id: int
    state: str


def register_worker(
    tx: Connection, *, node: str, queue: str, host: str, pid: int, device: str, lease_seconds: float
) -> tuple[int, list[int]]:
    """Enter a new process of `node`. Whoever ran under that name before is gone.

    What the predecessors held is the caller's to take back, in a transaction of its own: that one has to wait for
    jobs, and must not keep the reaper from these workers' rows meanwhile.

    Returns:
        The worker's id, and those of its predecessors.
    """
    predecessors = tx.execute(
        text("UPDATE workers SET state = 'gone' WHERE node = :node AND state = 'live' RETURNING id"),
        {"node": node},
    ).scalars()
    gone = list(predecessors)
    worker_id: int = tx.execute(
        text("""
            INSERT INTO workers (node, queue, host, pid, device, lease_expires_at)
            VALUES (:node, :queue, :host, :pid, :device, now() + make_interval(secs => :lease))
            RETURNING id
        """),
        {"node": node, "queue": queue, "host": host, "pid": pid, "device": device, "lease": lease_seconds},
    ).scalar_one()
    return worker_id, gone


def beat(
    tx: Connection,
    worker_id: int,
    *,
    progress: int | None,
    lease_seconds: float,
    gpu: GpuUse | None = None,
    gpu_memory_peak: int = 0,
) -> bool:
    """Renew all leases of a worker by renewing its own.

    Args:
        progress: a number that rises while the worker gets anything done; None while it has nothing to do.
        gpu: how busy its GPU is, if it has one that can be asked.
        gpu_memory_peak: the most bytes that it has had of its GPU.

    Returns:
        False if the worker has been given up; it must stop, its chunks are in other hands.
    """
    renewed = tx.execute(
        text("""
            UPDATE workers
               SET heartbeat_at = now(), lease_expires_at = now() + make_interval(secs => :lease),
                   progress_at = CASE WHEN progress = CAST(:progress AS bigint) THEN progress_at ELSE now() END,
                   progress = coalesce(CAST(:progress AS bigint), progress),
                   gpu_utilization = :utilization, gpu_memory_used = :used, gpu_memory_total = :total,
                   gpu_memory_peak = nullif(:peak, 0)
             WHERE id = :worker AND state = 'live'
        """),
        {
            "worker": worker_id,
            "progress": progress,
            "lease": lease_seconds,
            "utilization": gpu and gpu.utilization,
            "used": gpu and gpu.memory_used,
            "total": gpu and gpu.memory_total,
            "peak": gpu_memory_peak,
        },
    )
    return renewed.rowcount == 1


def retire_worker(tx: Connection, worker_id: int) -> list[Recovered]:
    """Strike off a worker that shuts down in order; a chunk it still holds is free again, the attempt forgiven."""
    tx.execute(
        text("UPDATE workers SET state = 'gone' WHERE id = :worker AND state = 'live'"), {"worker": worker_id}
    )
    return hand_back(tx, worker_id, "its worker was stopped")


def hand_back(
    tx: Connection, worker_id: int, reason: str, *, known: Collection[int] = (), seconds: float = 0.0
) -> list[Recovered]:
    """Free what a worker holds and does not work on; the attempts are forgiven.

    Args:
        known: lease tokens of what it does work on.
        seconds: for how long it has held the rest.
    """
    freed = []
    for chunk in lock_held(tx, worker_id, known=known, seconds=seconds):
        note_setbacks(tx, [chunk.id], SetbackKind.HANDED_BACK, reason)
        tx.execute(
            text(
                "UPDATE chunks SET state = 'pending', attempts = attempts - 1, lease_token = NULL WHERE id = :id"
            ),
            {"id": chunk.id},
        )
        enqueue(tx, chunk.id)
        freed.append(Recovered(chunk.id, chunk.job_id, chunk.stage, chunk.attempts, worker_id, "pending"))
    return freed


def renew_after_set_back(tx: Connection) -> None:
    """If the database's clock was set back, give each live worker the time that it had, from now on.

    One that died would be missed only when the clock is where it was.
    """
    tx.execute(
        text("""
            UPDATE workers
               SET heartbeat_at = now(), progress_at = least(progress_at, now()),
                   lease_expires_at = now() + (lease_expires_at - heartbeat_at)
             WHERE id IN (SELECT id FROM workers WHERE state = 'live' AND greatest(heartbeat_at, progress_at) > now()
                             FOR UPDATE SKIP LOCKED)
        """)
    )


def expire_workers(tx: Connection) -> list[int]:
    """Give up the workers whose lease has run out by the database's clock; returns their ids.

    A row that somebody has locked is left for the next time: a process that was stopped may hold it for long.
    """
    return list(
        tx.execute(
            text("""
                UPDATE workers SET state = 'silent'
                 WHERE id IN (SELECT id FROM workers WHERE state = 'live' AND lease_expires_at < now()
                                 FOR UPDATE SKIP LOCKED)
                RETURNING id
            """)
        ).scalars()
    )


def expire_stuck_workers(tx: Connection, *, stuck_seconds: float) -> list[int]:
    """Give up the workers that live and have something to do, but made no progress for `stuck_seconds`.

    Whether they hold a chunk does not matter: one that hangs behind a commit, or before a claim, holds none.

    Returns:
        Their ids.
    """
    return list(
        tx.execute(
            text("""
                UPDATE workers SET state = 'stuck'
                 WHERE id IN (SELECT id FROM workers
                               WHERE state = 'live' AND progress_at < now() - make_interval(secs => :stuck)
                                 FOR UPDATE SKIP LOCKED)
                RETURNING id
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


def take_back(tx: Connection, worker_id: int, reason: str, *, max_attempts: int) -> list[Recovered]:
    """Free the chunks of a worker that is dead, or as good as dead; `reason` is kept as their last error."""
    freed = []
    for chunk in lock_held(tx, worker_id):
        state = note_death(tx, chunk, reason, max_attempts=max_attempts)
        freed.append(Recovered(chunk.id, chunk.job_id, chunk.stage, chunk.attempts, worker_id, state))
    return freed


def lock_held(
    tx: Connection, worker_id: int, *, known: Collection[int] = (), seconds: float = 0.0
) -> Iterator[Row[Any]]:
    """The chunks that a worker holds, one by one, with their jobs locked; `known` and `seconds` as in `hand_back`."""
    held = tx.execute(
        text("""
            SELECT id, job_id FROM chunks
             WHERE worker_id = :worker AND state = 'running' AND lease_token <> ALL(:known)
               AND (:seconds = 0 OR claimed_at <= now() - make_interval(secs => :seconds)) ORDER BY id
        """),
        {"worker": worker_id, "known": list(known), "seconds": seconds},
    ).all()
    for chunk in held:
        lock_job(tx, chunk.job_id)
        still = tx.execute(
            text(
                "SELECT * FROM chunks WHERE id = :chunk AND worker_id = :worker AND state = 'running' FOR UPDATE"
            ),
            {"chunk": chunk.id, "worker": worker_id},
        ).one_or_none()
        if still is not None:
            yield still


def count_if_duplicate(tx: Connection, claim: Claim) -> bool:
    """Count a dropped result if its chunk is, or was since, in somebody else's hands.

    It is not if a person ended the job or forced it anew.
    """
    passed_on: bool = tx.execute(
        text("""
            SELECT EXISTS (SELECT 1 FROM chunks
                            WHERE id = :chunk AND (worker_id <> :worker OR lease_token <> :token))
        """),
        {"chunk": claim.work.chunk_id, "worker": claim.worker_id, "token": claim.token},
    ).scalar_one()
    if passed_on:
        count_duplicate(tx, claim)
    return passed_on
