"""The transport: kombu's for Redis and Valkey, which no message can break.

kombu's own raises what a malformed message makes it stumble over, and the Celery node dies of that.
"""

from __future__ import annotations

from collections import Counter
from queue import Empty
from threading import Event, Lock, Thread
from typing import Any

import structlog
from kombu.transport import redis

from virnucpro_core.errors import VirnucproError
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.rejections import RejectionReason, count_rejections
from virnucpro_core.queues import QUEUES
from virnucpro_core.settings import load_settings
from workers.messages import RejectedMessageError, purify

log = structlog.get_logger()

GATHER_SECONDS = 1.0  # between two transactions that count, however many messages are rejected


class Rejections:
    """Counts rejected messages in the ledger. A thread does it: the consumer must not wait for the database."""

    def __init__(self) -> None:
        self.counts: Counter[RejectionReason] = Counter()
        self.lock = Lock()
        self.wake = Event()
        self.thread: Thread | None = None

    def note(self, reason: RejectionReason, why: str, queue: str) -> None:
        """Log a rejected message, and have it counted."""
        log.error("message_rejected", queue=queue, kind=str(reason), reason=why)
        with self.lock:
            self.counts[reason] += 1
            if self.thread is None:
                self.thread = Thread(target=self._run, name="rejections", daemon=True)
                self.thread.start()
        self.wake.set()

    def _run(self) -> None:
        pause = Event()
        while self.wake.wait():
            self.wake.clear()
            self._write()
            pause.wait(GATHER_SECONDS)

    def _write(self) -> None:
        with self.lock:
            counts, self.counts = self.counts, Counter()
        try:
            # Opened for this alone: a connection must not be inherited by the children that are forked.
            ledger = open_ledger(load_settings().database_url_for("worker"))
            try:
                in_transaction(ledger, count_rejections, counts)
            finally:
                ledger.dispose()
        except VirnucproError as error:
            log.warning("rejections_not_counted", messages=counts.total(), reason=str(error))
            with self.lock:
                self.counts += counts
            self.wake.set()


rejections = Rejections()


class Channel(redis.Channel):
    """Takes items out of queues, and drops those that are not JSON."""

    def _brpop_read(self, **options: Any) -> Any:
        self.connection.delivering = False
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
        except (Empty, *self.connection_errors):
            raise
        except Exception as error:
            if self.connection.delivering:
                raise
            rejections.note(RejectionReason.FORMAT, f"it is not JSON: {type(error).__name__}", "any")
            raise Empty from error


class Transport(redis.Transport):
    """Delivers what `purify` lets through. What it does not is out of its queue already, and is gone."""

    Channel = Channel
    delivering = False  # whether an item has been read, and whoever takes it is at work

    def _deliver(self, message: Any, queue: str) -> None:
        self.delivering = True
        if queue in QUEUES:  # there are also those of Celery's remote control
            try:
                message = purify(message, queue)
            except RejectedMessageError as error:
                rejections.note(error.reason, str(error), queue)
                return
        super()._deliver(message, queue)  # type: ignore[no-untyped-call]
