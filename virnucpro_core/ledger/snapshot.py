"""A snapshot of the ledger: the numbers that queues are watched by, all of one moment.

No query reads all chunks or all messages: they go by jobs, workers, and indexes of what is out of the ordinary.
So a snapshot of a million chunks takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

from virnucpro_core.ledger.overview import WorkerOverview, list_worker_overviews
from virnucpro_core.ledger.tallies import Tallies, read_tallies

STATEMENT_TIMEOUT = "5s"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSnapshot:
    """One queue.

    Attributes:
        pending, running, done: chunks of running jobs, in the stage that each job is in.
        failed: chunks that their jobs failed of.
        sent: messages in the broker that nobody has taken.
        oldest_pending_seconds: how long the chunk that waits for longest has waited; 0 without one.
    """

    queue: str
    pending: int
    running: int
    done: int
    failed: int
    sent: int
    oldest_pending_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The ledger at one moment.

    Attributes:
        jobs: how many are in each state.
        job_failures: how often jobs failed, in all.
        stages: the names of the stages, in order.
        stage_seconds: by stage, how long the running job that is in it for longest has been.
        given_up: workers whose lease ran out (`silent`) and that made no progress (`stuck`), since the ledger is.
        overdue_leases: chunks held by workers that are gone, or whose lease has run out.
        rejections: messages that were refused, by reason.
    """

    jobs: Mapping[str, int]
    job_failures: int
    stages: Sequence[str]
    queues: Sequence[QueueSnapshot]
    workers: Sequence[WorkerOverview]
    stage_seconds: Mapping[str, float]
    given_up: Mapping[str, int]
    overdue_leases: int
    rejections: Mapping[str, int]
    tallies: Tallies


def take_snapshot(tx: Connection) -> Snapshot:
    """All of it, as it is at the beginning of the transaction, in which nothing has been asked before."""
    tx.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
    tx.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT}'"))
    return Snapshot(
        jobs=read_counts(tx, "SELECT state, count(*) FROM jobs GROUP BY state"),
        job_failures=tx.execute(text("SELECT coalesce(sum(times_failed), 0) FROM jobs")).scalar_one(),
        stages=list(tx.execute(text("SELECT name FROM stages ORDER BY position")).scalars()),
        queues=read_queues(tx),
        workers=list_worker_overviews(tx),
        stage_seconds=read_stage_seconds(tx),
        given_up=read_counts(
            tx, "SELECT state, count(*) FROM workers WHERE state IN ('silent', 'stuck') GROUP BY state"
        ),
        overdue_leases=count_overdue_leases(tx),
        rejections=read_counts(tx, "SELECT reason, messages FROM rejections"),
        tallies=read_tallies(tx),
    )


def read_counts(tx: Connection, query: str) -> dict[str, int]:
    return {row[0]: row[1] for row in tx.execute(text(query))}


def read_queues(tx: Connection) -> list[QueueSnapshot]:
    """A job's counters tell of its chunks; its messages are one for each chunk that is pending."""
    rows = tx.execute(
        text("""
            SELECT q.queue, jobs.left_over - held.of_running_jobs AS pending, held.running, jobs.done, lost.failed,
                   sent.messages AS sent,
                   coalesce(extract(epoch FROM now() - oldest.since), 0)::float8 AS oldest_pending_seconds
              FROM (SELECT DISTINCT queue FROM stages) q
             CROSS JOIN LATERAL (
                   SELECT coalesce(sum(j.chunks_left), 0)::bigint AS left_over,
                          coalesce(sum(j.chunks_total - j.chunks_left), 0)::bigint AS done
                     FROM jobs j JOIN stages s ON s.name = j.stage
                    WHERE j.state = 'running' AND s.queue = q.queue) jobs
             CROSS JOIN LATERAL (
                   SELECT count(*) AS running, count(*) FILTER (WHERE j.state = 'running') AS of_running_jobs
                     FROM chunks c JOIN stages s ON s.name = c.stage JOIN jobs j ON j.id = c.job_id
                    WHERE c.state = 'running' AND s.queue = q.queue) held
             CROSS JOIN LATERAL (
                   SELECT count(*) AS failed FROM chunks c JOIN stages s ON s.name = c.stage
                    WHERE c.state = 'failed' AND s.queue = q.queue) lost
             CROSS JOIN LATERAL (
                   SELECT count(*) AS messages FROM outbox o
                    WHERE o.queue = q.queue AND o.published_at IS NOT NULL) sent
             CROSS JOIN LATERAL (SELECT min(o.since) AS since FROM outbox o WHERE o.queue = q.queue) oldest
             ORDER BY q.queue
        """)
    )
    return [QueueSnapshot(**row._asdict()) for row in rows]


def read_stage_seconds(tx: Connection) -> dict[str, float]:
    rows = tx.execute(
        text("""
            SELECT stage, extract(epoch FROM now() - min(stage_since))::float8 AS seconds
              FROM jobs WHERE state = 'running' GROUP BY stage
        """)
    )
    return {row.stage: row.seconds for row in rows}


def count_overdue_leases(tx: Connection) -> int:
    count: int = tx.execute(
        text("""
            SELECT count(*) FROM chunks c JOIN workers w ON w.id = c.worker_id
             WHERE c.state = 'running' AND (w.state <> 'live' OR w.lease_expires_at < now())
        """)
    ).scalar_one()
    return count
