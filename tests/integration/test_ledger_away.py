"""A database that drops us or takes no writes is "away" for those who wait for it, whatever class its error has."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from threading import Event, Thread

import pytest
from sqlalchemy import Connection, Engine, text

from dags.connections import close_async_ledger, share_async_ledger
from tests import ledger_jobs
from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.transitions import lock_job
from virnucpro_core.settings import load_settings
from workers.app import app
from workers.persistence import Persistence
from workers.relay import Relay

pytestmark = pytest.mark.integration

Interrupt = Callable[[Connection, Engine], None]


def patience(descriptor: int) -> tuple[int, int]:
    """How long the kernel waits for the other end of a connection: for what was sent, and for an answer. Seconds."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        sent = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        return sent // 1000, idle + interval * count


def test_host_that_falls_silent_is_away_within_seconds(
    ledger: Engine, settings_environment: Callable[..., None]
) -> None:
    """One without power closes no connection; the kernel's own patience is hours."""
    waits = [in_transaction(ledger, lambda tx: patience(tx.connection.driver_connection.fileno()))]
    with Relay(load_settings(), app, Event())._listen() as connection:
        waits.append(patience(connection.fileno()))

    async def trigger() -> tuple[int, int]:
        async with share_async_ledger().connect() as connection:
            return patience((await connection.get_raw_connection()).driver_connection.fileno())

    async def both() -> tuple[int, int]:
        try:
            return await trigger()
        finally:
            await close_async_ledger()

    waits.append(asyncio.run(both()))
    assert waits == [(30, 30)] * 3


def test_relay_that_sleeps_gives_its_place_to_the_next(
    ledger: Engine, settings_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process, or a host without power, closes no connection; the lock would stay with it."""
    first, second = (Relay(load_settings(), app, Event()) for _ in range(2))
    asleep, wake, served, again = Event(), Event(), Event(), Event()

    def sleep() -> float:
        (again if asleep.is_set() else asleep).set()
        wake.wait(60)
        return 0.05

    def serve() -> float:
        served.set()
        return 0.05

    monkeypatch.setattr(first, "turn", sleep)
    monkeypatch.setattr(second, "turn", serve)
    threads = [Thread(target=one.run) for one in (first, second)]
    try:
        with monkeypatch.context() as hurried:
            hurried.setattr("workers.relay.ASLEEP_SECONDS", 1)
            threads[0].start()
            assert asleep.wait(60)
        # Those that are awake have their time: a busy machine may hold them up for a second.
        threads[1].start()
        assert served.wait(60)
        wake.set()
        assert not again.wait(2)  # awake, it waits behind the other
        second.stop.set()
        assert again.wait(60)
    finally:
        wake.set()
        for one, thread in zip((first, second), threads, strict=True):
            one.stop.set()
            if thread.ident:
                thread.join(10)


def test_table_that_a_migration_changes_under_a_process_costs_it_nothing(ledger: Engine) -> None:
    """PostgreSQL refuses a statement once that was prepared before its table had another column."""
    in_transaction(ledger, ledger_jobs.add_model)
    job = in_transaction(ledger, ledger_jobs.register, ledger_jobs.scan()).job_id
    for _ in range(8):  # psycopg prepares what comes again and again
        in_transaction(ledger, lock_job, job)
    owner = open_ledger(ledger.url.render_as_string(hide_password=False))
    in_transaction(owner, lambda tx: tx.execute(text("ALTER TABLE jobs ADD COLUMN later bigint")))
    assert in_transaction(ledger, lock_job, job).later is None
    owner.dispose()


def backend(tx: Connection) -> int:
    pid = tx.execute(text("SELECT pg_backend_pid()")).scalar_one()
    assert isinstance(pid, int)
    return pid


def wait_too_long(tx: Connection, ledger: Engine) -> None:
    """As a process that was stopped, or that waited for somebody else, inside its transaction."""
    pid = backend(tx)
    tx.execute(text("SET LOCAL idle_in_transaction_session_timeout = '50ms'"))
    alive = text("SELECT 1 FROM pg_stat_activity WHERE pid = :pid")
    while in_transaction(ledger, lambda other: other.execute(alive, {"pid": pid}).scalar()):
        Event().wait(0.02)


def forbid_writing(tx: Connection, _: Engine) -> None:
    """As a primary that has become a standby."""
    tx.execute(text("SET TRANSACTION READ ONLY"))


def be_cut(tx: Connection, ledger: Engine) -> None:
    cut = text("SELECT pg_terminate_backend(:pid, 10000)")
    pid = backend(tx)
    assert in_transaction(ledger, lambda other: other.execute(cut, {"pid": pid}).scalar_one())


AWAY = pytest.mark.parametrize(
    ("interrupt", "said"),
    [
        (wait_too_long, "idle-in-transaction timeout"),
        (forbid_writing, "read-only transaction"),
        (be_cut, "terminating connection"),
    ],
)


@AWAY
def test_database_that_ends_a_transaction_is_away_in_words(
    ledger: Engine, interrupt: Interrupt, said: str
) -> None:
    def work(tx: Connection) -> None:
        interrupt(tx, ledger)
        tx.execute(text("DELETE FROM jobs"))

    with pytest.raises(ServiceError, match=said) as raised:
        in_transaction(ledger, work)
    assert "postgresql+psycopg://" in raised.value.where
    assert raised.value.todo


def test_database_that_ended_a_transaction_before_its_commit_is_away(ledger: Engine) -> None:
    with pytest.raises(ServiceError, match="idle-in-transaction timeout"):
        in_transaction(ledger, wait_too_long, ledger)


@AWAY
def test_finished_work_waits_for_it_and_comes_by_another_connection(
    ledger: Engine, interrupt: Interrupt, said: str
) -> None:
    backends = []

    def work(tx: Connection) -> str:
        backends.append(backend(tx))
        if len(backends) == 1:
            interrupt(tx, ledger)
        tx.execute(text("DELETE FROM jobs"))
        return "kept"

    assert Persistence(ledger, Event())(work) == "kept"
    first, second = backends
    assert first != second, "the old connection leads to the old primary for ever"
