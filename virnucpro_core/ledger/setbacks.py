"""Setbacks: attempts on chunks that came to nothing, kept so that a record's story can be told afterwards.

An attempt that ends well costs nothing here: its chunk's row says all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import Connection, text

from virnucpro_core.ledger import tallies


class SetbackKind(StrEnum):
    """How an attempt ended that left nothing.

    `lost` is one that ended well, and whose file was gone or damaged when somebody looked again.
    """

    FAILED = "failed"
    DIED = "died"
    HALVED = "halved"
    HANDED_BACK = "handed_back"
    CANCELLED = "cancelled"
    LOST = "lost"


COUNTED = (SetbackKind.FAILED, SetbackKind.DIED, SetbackKind.HALVED, SetbackKind.HANDED_BACK)
"""Those that have a tally: what workers note. Their own rows go when their generation does, a count must not fall."""


def note_setbacks(
    tx: Connection, chunk_ids: Sequence[int], kind: SetbackKind, error: str, *, token: int | None = None
) -> None:
    """Keep what the chunks' rows say of their last attempt, before they change, and count it. Their job is locked.

    Args:
        token: the lease that ends; if another has it by now, nothing is kept.
    """
    noted = tx.execute(
        text("""
            INSERT INTO setbacks (job_id, generation, stage, chunk_id, first_record, records, attempt, worker_id,
                                  claimed_at, kind, error)
            SELECT c.job_id, j.generation, c.stage, c.id, c.first_record, c.records, c.attempts, c.worker_id,
                   c.claimed_at, :kind, :error
              FROM chunks c JOIN jobs j ON j.id = c.job_id
             WHERE c.id = ANY(:chunks) AND (CAST(:token AS bigint) IS NULL OR c.lease_token = :token)
            RETURNING worker_id, stage
        """),
        {"chunks": list(chunk_ids), "kind": str(kind), "error": error, "token": token},
    ).all()
    if kind in COUNTED:
        for (worker_id, stage), attempts in sorted(Counter(map(tuple, noted)).items()):
            tallies.add(tx, worker_id, stage, {(tallies.SETBACKS, str(kind)): float(attempts)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt on a chunk, and the worker that made it.

    Attributes:
        chunk: the chunk's id; another than today's where it was halved since.
        first_record, records: what the attempt was about.
        outcome: a `SetbackKind`, or the chunk's state if it is the newest attempt: `running` or `done`.
        error: why it came to nothing.
        seconds: computing, if it is done.
    """

    chunk: int
    first_record: int
    records: int
    attempt: int
    outcome: str
    error: str | None
    claimed_at: datetime
    ended_at: datetime | None
    seconds: float | None
    worker: int
    node: str
    host: str
    pid: int
    device: str


def attempts_on(tx: Connection, job_id: int, stage: str, record: int) -> list[Attempt]:
    """All attempts of a job's current generation, in one stage, on the chunk that holds a record; oldest first."""
    rows = tx.execute(
        text("""
            SELECT a.chunk, a.first_record, a.records, a.attempt, a.outcome, a.error, a.claimed_at, a.ended_at,
                   a.seconds, w.id AS worker, w.node, w.host, w.pid, w.device
              FROM (SELECT s.id AS place, s.chunk_id AS chunk, s.first_record, s.records, s.attempt,
                           s.kind AS outcome, s.error, s.claimed_at, s.ended_at, NULL AS seconds, s.worker_id
                      FROM setbacks s JOIN jobs j ON j.id = s.job_id AND j.generation = s.generation
                     WHERE s.job_id = :job AND s.stage = :stage
                       AND :record BETWEEN s.first_record AND s.first_record + s.records - 1
                    UNION ALL
                    SELECT NULL, c.id, c.first_record, c.records, c.attempts, c.state, NULL, c.claimed_at,
                           c.finished_at, c.seconds, c.worker_id
                      FROM chunks c
                     WHERE c.job_id = :job AND c.stage = :stage AND c.state IN ('running', 'done')
                       AND :record BETWEEN c.first_record AND c.first_record + c.records - 1) a
              JOIN workers w ON w.id = a.worker_id
             ORDER BY a.claimed_at, a.place NULLS LAST
        """),
        {"job": job_id, "stage": stage, "record": record},
    )
    return [Attempt(**row._asdict()) for row in rows]


@dataclass(frozen=True, slots=True)
class RecentSetback:
    """A setback as those see it who watch: when, which chunk, on which node, how, why."""

    job: int
    stage: str
    first_record: int
    records: int
    attempt: int
    node: str
    kind: str
    error: str
    ended_at: datetime


def newest_setbacks(tx: Connection, limit: int, *, job_id: int | None = None) -> list[RecentSetback]:
    """The newest setbacks first, of all jobs or of one."""
    rows = tx.execute(
        text("""
            SELECT s.job_id, s.stage, s.first_record, s.records, s.attempt, w.node, s.kind, s.error, s.ended_at
              FROM setbacks s JOIN workers w ON w.id = s.worker_id
             WHERE CAST(:job AS bigint) IS NULL OR s.job_id = :job
             ORDER BY s.id DESC LIMIT :limit
        """),
        {"job": job_id, "limit": limit},
    )
    return [RecentSetback(*row) for row in rows]
