"""What those who look after others ask of the ledger. Nothing here writes."""

from __future__ import annotations

from sqlalchemy import Connection, text


def live_nodes(tx: Connection, host: str) -> dict[str, str]:
    """The Celery nodes of a host whose workers' heartbeats are fresh, each with its queue."""
    rows = tx.execute(
        text("""
            SELECT node, queue FROM workers
             WHERE host = :host AND state = 'live' AND lease_expires_at > now() ORDER BY node
        """),
        {"host": host},
    )
    return {row.node: row.queue for row in rows}


def waits_in_broker(tx: Connection, queues: str, *, seconds: float) -> bool:
    """Whether a message of one of the queues (`extract,finish`) was sent so long ago and is not claimed yet."""
    return bool(
        tx.execute(
            text("""
                SELECT EXISTS (SELECT FROM outbox
                                WHERE queue = ANY(string_to_array(:queues, ','))
                                  AND published_at < now() - make_interval(secs => :seconds))
            """),
            {"queues": queues, "seconds": seconds},
        ).scalar_one()
    )


def is_served(tx: Connection, relay_lock: int) -> bool:
    """Whether a relay, anywhere, holds the lock of this ledger's relay."""
    return bool(
        tx.execute(
            text("""
                SELECT EXISTS (
                       SELECT FROM pg_locks
                        WHERE locktype = 'advisory' AND objsubid = 1 AND classid = 0 AND objid = :lock AND granted
                          AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
            """),
            {"lock": relay_lock},
        ).scalar_one()
    )


def find_neglected(tx: Connection, *, window_per_worker: int, seconds: float) -> list[str]:
    """What a relay that serves would have done at least so many seconds ago; empty if all is well."""
    late = tx.execute(
        text("""
            SELECT q.queue,
                   (SELECT count(*) FROM outbox o
                     WHERE o.queue = q.queue AND o.published_at IS NULL
                       AND o.due_at < now() - make_interval(secs => :seconds)) AS due
              FROM (SELECT DISTINCT queue FROM stages) q
             WHERE (SELECT count(*) FROM outbox o WHERE o.queue = q.queue AND o.published_at IS NOT NULL)
                 < :window * greatest(1, (SELECT count(*) FROM workers w WHERE w.state = 'live' AND w.queue = q.queue))
             ORDER BY q.queue
        """),
        {"seconds": seconds, "window": window_per_worker},
    )
    neglected = [f"{row.due} messages of the queue {row.queue} are not published" for row in late if row.due]
    silent: int = tx.execute(
        text("""
            SELECT count(*) FROM workers
             WHERE state = 'live' AND lease_expires_at < now() - make_interval(secs => :seconds)
        """),
        {"seconds": seconds},
    ).scalar_one()
    return neglected + ([f"{silent} silent workers are not given up"] if silent else [])
