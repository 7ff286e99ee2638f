"""Rates: how fast earlier jobs went, by host and execution class. What has not run has no rate."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from virnucpro_core.recipe import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What one host's workers did in one execution class.

    Attributes:
        chunks, tokens, seconds: computed, and the seconds of computing that they took, summed over workers.
        workers_now: workers of that host that live now and take extract chunks, on the CPU if that is the class's
            device, else on GPUs.
        newest_at: when the newest of these chunks was done.
    """

    host: str
    model: str
    execution: dict[str, Any]
    jobs: int
    chunks: int
    tokens: int
    seconds: float
    workers_now: int
    newest_at: datetime

    @property
    def tokens_per_second(self) -> float:
        """Of one worker."""
        return self.tokens / self.seconds


def rates_of(tx: Connection, *, dtype: Dtype, model: str | None = None) -> list[Rate]:
    """The rates of what the ledger still holds, the newest first.

    Args:
        dtype: of the recipe; another's rate says nothing.
        model: a registered model's name; all models if None.
    """
    rows = tx.execute(
        text("""
            SELECT w.host, j.model, j.execution, count(DISTINCT j.id) AS jobs, sum(c.chunks)::bigint AS chunks,
                   sum(c.tokens)::bigint AS tokens, sum(c.seconds) AS seconds, max(c.newest_at) AS newest_at,
                   (SELECT count(*) FROM workers l
                     WHERE l.state = 'live' AND l.host = w.host
                       AND (l.device = 'cpu') = (j.execution ->> 'device' = 'cpu')
                       AND 'extract' = ANY(string_to_array(l.queue, ','))) AS workers_now
              -- Added up before they are joined: there may be millions.
              FROM (SELECT job_id, worker_id, count(*) AS chunks, sum(tokens) AS tokens, sum(seconds) AS seconds,
                           max(finished_at) AS newest_at
                      FROM chunks WHERE stage = 'extract' AND state = 'done' AND tokens > 0 AND seconds > 0
                     GROUP BY job_id, worker_id) c
              JOIN jobs j ON j.id = c.job_id JOIN workers w ON w.id = c.worker_id
             WHERE j.execution IS NOT NULL AND j.recipe ->> 'dtype' = :dtype
               AND (CAST(:model AS text) IS NULL OR j.model = :model)
             GROUP BY w.host, j.model, j.execution ORDER BY newest_at DESC
        """),
        {"dtype": dtype, "model": model},
    )
    return [Rate(**row._asdict()) for row in rows]
