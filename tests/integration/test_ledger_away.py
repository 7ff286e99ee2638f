"""A database that drops us or takes no writes is "away" for those who wait for it, whatever class its error has."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest
from sqlalchemy import Connection, Engine, text

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction
from workers.persistence import Persistence

pytestmark = pytest.mark.integration

Interrupt = Callable[[Connection, Engine], None]


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
