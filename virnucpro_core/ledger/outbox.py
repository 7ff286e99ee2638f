"""The outbox: which messages are due. Transitions fill it, the relay alone reads it; claiming a chunk empties it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

OUTBOX_CHANNEL = "virnucpro_outbox"

LONGEST_DELAY = 60.0
"""Seconds that a message waits at most. One that is due later was delayed before the database's clock was set back."""

ENQUEUE_CHUNK = text("""
    INSERT INTO outbox (chunk_id, queue, due_at)
    SELECT c.id, s.queue, now() + make_interval(secs => :delay)
      FROM chunks c JOIN stages s ON s.name = c.stage JOIN jobs j ON j.id = c.job_id
     WHERE c.id = :chunk AND j.state = 'running'
    ON CONFLICT (chunk_id) DO UPDATE SET due_at = excluded.due_at, published_at = NULL
""")

OVERDUE = "published_at NOT BETWEEN now() - make_interval(secs => :age) AND now()"
"""Published long ago; or in the future, before the database's clock was set back."""


@dataclass(frozen=True, slots=True)
class Message:
    """A hint that a chunk is waiting. `title` is for people who watch queues."""

    job_id: int
    chunk_id: int
    stage: str
    queue: str
    title: str


@dataclass(frozen=True, slots=True)
class QueueState:
    """A queue as the ledger sees it.

    Attributes:
        workers: live workers that consume it.
        published: messages sent and not yet claimed.
        overdue: those among them that were sent longer ago than the republish time.
    """

    queue: str
    workers: int
    published: int
    overdue: int


def enqueue(tx: Connection, chunk_id: int, *, delay: float = 0.0) -> None:
    """Make a chunk's message due in `delay` seconds (`LONGEST_DELAY` at most), unless its job has ended.

    Wakes the relay with the commit.
    """
    tx.execute(ENQUEUE_CHUNK, {"chunk": chunk_id, "delay": min(delay, LONGEST_DELAY)})
    wake_relay(tx)


def enqueue_pending(tx: Connection, job_id: int) -> None:
    """Make the message of every pending chunk due, unless it is already."""
    tx.execute(
        text("""
            INSERT INTO outbox (chunk_id, queue)
            SELECT c.id, s.queue FROM chunks c JOIN stages s ON s.name = c.stage
             WHERE c.job_id = :job AND c.state = 'pending' ORDER BY c.ordinal
            ON CONFLICT (chunk_id) DO NOTHING
        """),
        {"job": job_id},
    )
    wake_relay(tx)


def wake_relay(tx: Connection) -> None:
    tx.execute(text("SELECT pg_notify(:channel, '')"), {"channel": OUTBOX_CHANNEL})


def withdraw_messages(tx: Connection, job_id: int) -> None:
    """Take an ended job's messages out of the outbox, where they would hold places that others need."""
    tx.execute(
        text("DELETE FROM outbox o USING chunks c WHERE c.id = o.chunk_id AND c.job_id = :job"),
        {"job": job_id},
    )


def queue_states(tx: Connection, *, republish_seconds: float) -> list[QueueState]:
    """One row per queue of the stages table."""
    rows = tx.execute(
        text(f"""
            SELECT q.queue,
                   (SELECT count(*) FROM workers w WHERE w.state = 'live' AND w.queue = q.queue) AS workers,
                   (SELECT count(*) FROM outbox o
                     WHERE o.queue = q.queue AND o.published_at IS NOT NULL) AS published,
                   (SELECT count(*) FROM outbox o
                     WHERE o.queue = q.queue AND o.published_at IS NOT NULL AND {OVERDUE}) AS overdue
              FROM (SELECT DISTINCT queue FROM stages) q ORDER BY q.queue
        """),  # noqa: S608 - a constant
        {"age": republish_seconds},
    )
    return [QueueState(row.queue, row.workers, row.published, row.overdue) for row in rows]


def take_due(tx: Connection, queue: str, limit: int) -> list[Message]:
    """Mark up to `limit` due messages as published and return them, those of the oldest chunks first.

    So a chunk that was taken back from a dead worker does not wait behind all that have never run. But what has
    been put off waits behind what has not: a job that no worker here may run holds up no other. The caller
    publishes before it commits: a message may be sent twice, never lost.
    """
    return messages(
        tx,
        tx.execute(
            text("""
                UPDATE outbox SET published_at = now()
                 WHERE id IN (SELECT id FROM outbox
                               WHERE queue = :queue AND published_at IS NULL
                                 AND (due_at <= now() OR due_at > now() + make_interval(secs => :longest))
                               ORDER BY put_off, chunk_id LIMIT :limit FOR UPDATE SKIP LOCKED)
                RETURNING chunk_id
            """),
            {"queue": queue, "limit": limit, "longest": LONGEST_DELAY},
        )
        .scalars()
        .all(),
    )


def take_overdue(tx: Connection, queue: str, limit: int, *, republish_seconds: float) -> list[Message]:
    """Up to `limit` messages that were published long ago and that nobody claimed, marked as published now.

    Those published first: if some are lost and others still wait in the queue, these came later.
    """
    return messages(
        tx,
        tx.execute(
            text(f"""
                UPDATE outbox SET published_at = now()
                 WHERE id IN (SELECT id FROM outbox
                               WHERE queue = :queue AND published_at IS NOT NULL AND {OVERDUE}
                               ORDER BY published_at, chunk_id LIMIT :limit FOR UPDATE SKIP LOCKED)
                RETURNING chunk_id
            """),  # noqa: S608 - a constant
            {"queue": queue, "age": republish_seconds, "limit": limit},
        )
        .scalars()
        .all(),
    )


def send_again(tx: Connection, chunk_id: int, *, delay: float, reason: str) -> None:
    """Have a published message sent again in `delay` seconds: who got it may not run the chunk.

    Harmless once the chunk is claimed.

    Args:
        reason: kept with the chunk while it waits, for those who wonder why it does.
    """
    tx.execute(
        text("UPDATE chunks SET error = :reason WHERE id = :chunk AND state = 'pending'"),
        {"chunk": chunk_id, "reason": reason},
    )
    put_off = tx.execute(
        text("""
            UPDATE outbox SET published_at = NULL, due_at = now() + make_interval(secs => :delay),
                              put_off = put_off + 1
             WHERE chunk_id = :chunk RETURNING put_off
        """),
        {"chunk": chunk_id, "delay": delay},
    ).scalar_one_or_none()
    if put_off == 1:
        wake_relay(
            tx
        )  # others may be behind it; where all were put off before, the relay's own pace is enough


def messages(tx: Connection, chunk_ids: Sequence[int]) -> list[Message]:
    if not chunk_ids:
        return []
    rows = tx.execute(
        text("""
            SELECT c.job_id, c.id, c.stage, s.queue,
                   format('job %s %s: %s chunk %s of %s', j.id,
                          (SELECT stem FROM submissions WHERE job_id = j.id ORDER BY id LIMIT 1),
                          c.stage, c.ordinal + 1, j.chunks_total) AS title
              FROM chunks c JOIN jobs j ON j.id = c.job_id JOIN stages s ON s.name = c.stage
             WHERE c.id = ANY(:chunks) ORDER BY c.id
        """),
        {"chunks": list(chunk_ids)},
    )
    return [Message(row.job_id, row.id, row.stage, row.queue, row.title) for row in rows]


def seconds_until_due(tx: Connection, limit: float) -> float:
    """Seconds until a delayed message is due, at most `limit`."""
    seconds: float | None = tx.execute(
        text("""
            SELECT extract(epoch FROM min(next.due_at) - now())::float8
              FROM (SELECT DISTINCT queue FROM stages) q
             CROSS JOIN LATERAL (SELECT o.due_at FROM outbox o
                                  WHERE o.queue = q.queue AND o.published_at IS NULL AND o.due_at > now()
                                  ORDER BY o.due_at LIMIT 1) next
        """)
    ).scalar_one()
    return limit if seconds is None else max(0.0, min(seconds, limit))
