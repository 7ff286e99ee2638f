"""The reaper: takes chunks back from workers that fell silent or got stuck."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import structlog
from sqlalchemy import Connection, Engine, text

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.workers import (
    Recovered,
    chunks_of_the_gone,
    expire_stuck_workers,
    expire_workers,
    hand_back,
    renew_after_set_back,
    take_back,
)
from virnucpro_core.logs import about
from virnucpro_core.settings import Settings

log = structlog.get_logger()

LOCK_TIMEOUT = "500ms"
"""A stopped process may hold the lock of its job; the others, and the relay, must not wait for it."""


def reap(ledger: Engine, settings: Settings) -> list[Recovered]:
    """Give up workers whose lease has run out or whose progress stands still, and free what they hold.

    A chunk that cannot be freed now is found again by the next call.

    Raises:
        ServiceError: the database cannot be used.
    """
    in_transaction(ledger, renew_after_set_back)
    reasons = dict.fromkeys(in_transaction(ledger, expire_workers), "its worker fell silent")
    stuck = in_transaction(ledger, expire_stuck_workers, stuck_seconds=settings.stuck_seconds)
    reasons |= dict.fromkeys(stuck, f"its worker made no progress for {settings.stuck_seconds:g} s")
    for worker, reason in reasons.items():
        log.warning("worker_expired", worker=worker, reason=reason)
    recovered = []
    for worker in in_transaction(ledger, chunks_of_the_gone):
        recovered += free_chunks(ledger, worker, reasons.get(worker, "its worker is gone"), settings)
    return recovered


def free_chunks(ledger: Engine, worker_id: int, reason: str, settings: Settings) -> list[Recovered]:
    """Free what a worker that is gone holds; nothing, if that is not possible at the moment."""
    try:
        freed = in_transaction(ledger, take_back_soon, worker_id, reason, settings.max_attempts)
    except ServiceError as error:
        log.warning("chunks_not_freed", worker=worker_id, reason=str(error))
        return []
    tell_freed(freed, reason)
    return freed


def tell_freed(freed: Sequence[Recovered], reason: str) -> None:
    """Log which chunks have been taken back from a worker."""
    for chunk in freed:
        with about(
            job=chunk.job_id,
            chunk=chunk.chunk_id,
            stage=chunk.stage,
            attempt=chunk.attempt,
            worker=chunk.worker_id,
        ):
            log.warning("chunk_freed", now=chunk.state, reason=reason)


def hand_back_unknown(
    tx: Connection, worker_id: int, reason: str, known: Collection[int], seconds: float
) -> list[Recovered]:
    tx.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    return hand_back(tx, worker_id, reason, known=known, seconds=seconds)


def take_back_soon(tx: Connection, worker_id: int, reason: str, max_attempts: int) -> list[Recovered]:
    tx.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"))
    return take_back(tx, worker_id, reason, max_attempts=max_attempts)
