"""Runs: which worker computed which of a job's chunks, when, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRun:
    """The run that completed an extract chunk.

    Attributes:
        node: the Celery node, named after its device.
        device: the GPU's UUID, or cpu.
        tokens: computed, BOS and EOS included.
        seconds: that the device took for them.
        started_at, finished_at: when the chunk was claimed and committed, by the database's clock.
    """

    node: str
    host: str
    device: str
    tokens: int
    seconds: float
    started_at: datetime
    finished_at: datetime


def chunk_runs(tx: Connection, job_id: int) -> list[ChunkRun]:
    """A job's completed extract chunks of the current generation, in the order of their beginning."""
    rows = tx.execute(
        text("""
            SELECT w.node, w.host, w.device, c.tokens, coalesce(c.seconds, 0) AS seconds,
                   c.claimed_at AS started_at, c.finished_at
              FROM chunks c JOIN workers w ON w.id = c.worker_id
             WHERE c.job_id = :job AND c.stage = 'extract' AND c.state = 'done'
             ORDER BY c.claimed_at, c.id
        """),
        {"job": job_id},
    )
    return [ChunkRun(**row._asdict()) for row in rows]
