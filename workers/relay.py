"""The relay: the one process that publishes messages, and the reaper's home.

    python -m workers.relay

It publishes what the outbox says is due, in a bounded window: the backlog stays in the ledger, where it is
safe and can be counted. Woken by NOTIFY, it looks every second without it, too. A second relay waits until
the first is gone, or has slept for `ASLEEP_SECONDS`.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from threading import Event

import psycopg
import structlog
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import Connection, Engine, make_url

from virnucpro_core.errors import ServiceError, VirnucproError
from virnucpro_core.ledger.database import check_migrated, connect_arguments, in_transaction, open_ledger
from virnucpro_core.ledger.outbox import (
    OUTBOX_CHANNEL,
    Message,
    QueueState,
    queue_states,
    seconds_until_due,
    take_due,
    take_overdue,
)
from virnucpro_core.logs import about, configure_logging
from virnucpro_core.settings import Settings, load_settings
from workers.app import app, check_broker
from workers.messages import task_name
from workers.reaper import reap

log = structlog.get_logger()

TURN_SECONDS = 1.0
GATHER_SECONDS = 0.02
"""After a notification, time for more to come: one turn serves them all. Workers have messages in stock meanwhile."""

LONGEST_PAUSE = 10.0  # seconds between attempts while the database or the broker is away
ASLEEP_SECONDS = 30.0
"""A relay that PostgreSQL hears nothing of for so long loses its lock to the next: its process may be stopped, or its
host without power. A turn takes less, also while the broker hangs."""

RELAY_LOCK = 0x7669726E  # any number, but the same in every relay of a ledger ("virn")


class Relay:
    """Publishes what is due, and reaps, for one ledger and one broker."""

    def __init__(self, settings: Settings, celery: Celery, stop: Event) -> None:
        self.settings = settings
        self.celery = celery
        self.stop = stop
        self.ledger: Engine = open_ledger(settings.database_url_for("worker"))
        self.reap_due = 0.0

    def run(self) -> None:
        """Work until told to stop, whatever comes and goes around it."""
        pause = TURN_SECONDS
        while not self.stop.is_set():
            try:
                with self._listen() as connection:
                    if self._is_alone(connection):
                        pause = TURN_SECONDS
                        self._serve(connection)
            except (psycopg.Error, ServiceError) as error:
                log.warning("ledger_away", reason=str(error).strip(), retry_in=pause)
                self.stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self.ledger.dispose()

    def _listen(self) -> psycopg.Connection[tuple[object, ...]]:
        url = make_url(self.settings.database_url_for("worker")).set(drivername="postgresql")
        return psycopg.connect(
            url.render_as_string(hide_password=False),
            autocommit=True,
            **connect_arguments("virnucpro relay", idle_session_timeout=f"{ASLEEP_SECONDS:g}s"),
        )

    def _is_alone(self, connection: psycopg.Connection[tuple[object, ...]]) -> bool:
        """Wait to be the only relay; False if told to stop before."""
        waiting = False
        while not self.stop.is_set():
            (alone,) = connection.execute("SELECT pg_try_advisory_lock(%s)", [RELAY_LOCK]).fetchone() or (
                False,
            )
            if alone:
                log.info("relay_serves", lease_seconds=self.settings.lease_seconds)
                return True
            if not waiting:
                log.info("relay_waits", reason="another relay serves this ledger")
                waiting = True
            self.stop.wait(TURN_SECONDS)
        return False

    def _serve(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        """Take turns until told to stop or the connection, and with it the lock, is lost."""
        connection.execute(f"LISTEN {OUTBOX_CHANNEL}")
        # If the database was away, no worker could renew its lease: give each the time to.
        self.reap_due = time.monotonic() + self.settings.lease_seconds
        pause = 0.0
        while not self.stop.is_set():
            connection.execute("SELECT 1")  # we are awake, and still have the lock
            try:
                wait = self.turn()
                pause = 0.0
            except BrokerError as error:
                pause = min(2 * pause + TURN_SECONDS, LONGEST_PAUSE)
                log.warning("broker_away", reason=str(error), retry_in=pause)
                self.stop.wait(pause)
                continue
            for _ in connection.notifies(timeout=wait, stop_after=1):
                self.stop.wait(GATHER_SECONDS)
            for _ in connection.notifies(timeout=0):
                pass

    def turn(self) -> float:
        """Reap, and publish what is due.

        Returns:
            Seconds after which to look again.

        Raises:
            ServiceError: the database cannot be used.
            BrokerError: the broker cannot be used; nothing counts as published.
        """
        if time.monotonic() >= self.reap_due:
            reap(self.ledger, self.settings)
            self.reap_due = time.monotonic() + TURN_SECONDS
        republish = self.settings.republish_seconds
        for state in in_transaction(self.ledger, queue_states, republish_seconds=republish):
            published = state.published + self._fill(state)
            # Whoever lost one must not wait until the queue is empty: that may be days of other jobs' work.
            missing = published - self._count_waiting(state.queue) if state.overdue else 0
            if missing > 0:
                sent = in_transaction(self.ledger, self._republish, state.queue, missing)
                log.warning("messages_sent_again", queue=state.queue, messages=sent)
        return in_transaction(self.ledger, seconds_until_due, TURN_SECONDS)

    def _fill(self, state: QueueState) -> int:
        """Publish up to the window, a few messages for each worker; returns how many."""
        window = max(1, state.workers) * self.settings.window_per_worker
        if window <= state.published:
            return 0
        return in_transaction(self.ledger, self._publish_due, state.queue, window - state.published)

    def _publish_due(self, tx: Connection, queue: str, limit: int) -> int:
        messages = take_due(tx, queue, limit)
        # Sent before the commit: a message may come twice, but never not at all.
        self._send(messages)
        return len(messages)

    def _republish(self, tx: Connection, queue: str, limit: int) -> int:
        republish = self.settings.republish_seconds
        messages = take_overdue(tx, queue, limit, republish_seconds=republish)
        self._send(messages)
        return len(messages)

    def _send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.celery.send_task(
                task_name(message.stage),
                args=[message.chunk_id],
                # What Flower shows in place of the arguments.
                argsrepr=message.title,
                queue=message.queue,
                ignore_result=True,
                # The next turn does. Meanwhile this transaction must not wait longer than `IDLE_TIMEOUT`.
                retry=False,
            )
            with about(job=message.job_id, chunk=message.chunk_id, stage=message.stage, title=message.title):
                log.info("message_sent", queue=message.queue)

    def _count_waiting(self, queue: str) -> int:
        """Messages of a queue that the broker holds and nobody has taken yet."""
        with self.celery.connection_for_read() as connection:
            try:
                declared = self.celery.amqp.queues[queue].bind(connection.default_channel).queue_declare()
            except connection.connection_errors + connection.channel_errors as error:
                raise BrokerError(str(error)) from error
            return int(declared.message_count)


def main() -> int:
    configure_logging()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load_settings()
        relay = Relay(settings, app, stop)
        check_migrated(relay.ledger)
        check_broker(app)
    except VirnucproError as error:
        log.error("relay_cannot_start", reason=str(error))  # noqa: TRY400 - a trace would hide the reason
        return error.exit_code
    relay.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
