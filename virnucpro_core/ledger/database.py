"""Connections to the ledger: engines, transactions that repeat themselves, migrations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any, Concatenate, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, ProgrammingError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from virnucpro_core.errors import ServiceError, SettingsError
from virnucpro_core.settings import PREFIX

P = ParamSpec("P")
T = TypeVar("T")

TRANSACTION_ATTEMPTS = 5
CONNECT_TIMEOUT = 10  # seconds
SILENT_SECONDS = 30  # a host that says nothing for so long is away: one without power closes no connection
IDLE_TIMEOUT = 20  # seconds a transaction may wait for its client: a stopped process must not keep its locks
SERIALIZATION_FAILURE, DEADLOCK_DETECTED = "40001", "40P01"
UNDEFINED_TABLE, INVALID_PASSWORD, INVALID_CATALOG = "42P01", "28P01", "3D000"
INSUFFICIENT_PRIVILEGE = "42501"
CHANGED_TABLE = "0A000"  # a statement was prepared before a migration gave its table another column
IDLE_TOO_LONG, READ_ONLY = "25P03", "25006"  # InternalError to the driver, as if they were its own bugs


def connect_arguments(application_name: str, **session: str) -> dict[str, Any]:
    """How every connection to the ledger is made, for libpq.

    Args:
        session: settings of PostgreSQL for the session.
    """
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "application_name": application_name,
        # The kernel's own patience is a quarter of an hour for what was sent, and hours for an answer.
        "tcp_user_timeout": SILENT_SECONDS * 1000,
        "keepalives_idle": SILENT_SECONDS // 3,
        "keepalives_interval": SILENT_SECONDS // 6,
        "keepalives_count": 4,
        "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
    }


def open_ledger(url: str) -> Engine:
    """An engine for the ledger at `url`; nothing is connected yet.

    Raises:
        SettingsError: it cannot be read as a URL.
    """
    return create_engine(
        read_url(url),
        pool_pre_ping=True,
        pool_size=2,
        connect_args=connect_arguments("virnucpro", idle_in_transaction_session_timeout=f"{IDLE_TIMEOUT}s"),
    )


def read_url(url: str | URL) -> URL:
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        found = None
    if found is None or "@" in (found.host or ""):
        # Neither it nor the cause is shown: whatever cannot be read may be the password.
        raise SettingsError(
            "the database's URL cannot be read",
            where=f"{PREFIX}DATABASE_URL, or the one of the role",
            todo="Give postgresql://user:password@host:port/name, the password percent-encoded.",
        )
    return found


def hide_password(url: str | URL) -> str:
    """What people are shown of a URL: not its options either, of which one may be a password, too."""
    return read_url(url).set(query={}).render_as_string(hide_password=True)


def in_transaction(
    ledger: Engine, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run `function(connection, ...)` in one transaction, again if PostgreSQL found a deadlock, or a table changed.

    Raises:
        ServiceError: if the database cannot be reached, refuses us, drops us, takes no writes, or lacks our tables, or
            our role may not do that.
    """
    with in_words(ledger):
        for attempt in Retrying(
            retry=retry_if_exception(is_conflict),
            stop=stop_after_attempt(TRANSACTION_ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            reraise=True,
        ):
            with attempt, ledger.begin() as connection:
                return function(connection, *args, **kwargs)
    raise AssertionError("Retrying either returns or raises")


@contextmanager
def in_words(ledger: Engine) -> Iterator[None]:
    """What the driver says against the database or our rights there becomes our error; our own bugs stay as they are.

    Raises:
        ServiceError: as `in_transaction`.
    """
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) == READ_ONLY:
            # An old primary: its connections would lead there for ever, new ones may find its successor.
            ledger.dispose()
        explained = explain(error, ledger)
        if explained is None:
            raise
        raise explained from error


def sqlstate(error: BaseException) -> str | None:
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def is_conflict(error: BaseException) -> bool:
    return sqlstate(error) in (SERIALIZATION_FAILURE, DEADLOCK_DETECTED, CHANGED_TABLE)


def explain(error: DBAPIError, ledger: Engine) -> ServiceError | None:
    """What an operator should read instead of a driver's message; None if it is our own bug."""
    where = hide_password(ledger.url)
    said = str(error.orig).strip().splitlines()[0] if error.orig else str(error)
    if isinstance(error, ProgrammingError) and sqlstate(error) == UNDEFINED_TABLE:
        return ServiceError(
            "the ledger's tables are missing", where=where, todo="Run `virnucpro db upgrade`."
        )
    if sqlstate(error) == INSUFFICIENT_PRIVILEGE:
        return ServiceError(
            f"PostgreSQL does not let this role do that: {said}",
            where=where,
            todo="Name the role that may, by the URL that is meant for it: the owner's, the DAG's or the worker's.",
        )
    if sqlstate(error) == READ_ONLY:
        return ServiceError(
            f"PostgreSQL takes no writes: {said}", where=where, todo="Let the URL lead to the primary server."
        )
    if sqlstate(error) == IDLE_TOO_LONG:
        return ServiceError(
            f"PostgreSQL ended a transaction that waited too long: {said}",
            where=where,
            todo="Look for a process that was stopped, or for what it waited for.",
        )
    # Of the URL: nothing was asked yet.
    is_option = isinstance(error, ProgrammingError) and error.statement is None
    if not (isinstance(error, OperationalError) or error.connection_invalidated or is_option):
        return None
    if sqlstate(error) == INVALID_PASSWORD or "password authentication failed" in said:
        return ServiceError(
            "PostgreSQL refused the password", where=where, todo="Correct the URL's user and password."
        )
    if sqlstate(error) == INVALID_CATALOG or "does not exist" in said:
        return ServiceError(said, where=where, todo="Create the database, or correct the URL.")
    return ServiceError(
        f"PostgreSQL cannot be used: {said}", where=where, todo="Start the server, or correct the URL."
    )


def alembic_config(url: str) -> Config:
    config = Config()
    for name, value in (("script_location", str(resources.files("migrations"))), ("sqlalchemy.url", url)):
        # ConfigParser would read a folder's or a password's per cent sign as an interpolation
        config.set_main_option(name, value.replace("%", "%%"))
    return config


def upgrade(url: str) -> None:
    """Bring the ledger's schema to the newest revision; the role of `url` must own it.

    Raises:
        ServiceError: if the database cannot be reached or refuses us.
    """
    ledger = open_ledger(url)
    try:
        with in_words(ledger):
            command.upgrade(alembic_config(url), "head")
    finally:
        ledger.dispose()


def check_migrated(ledger: Engine) -> None:
    """Refuse a schema that is not the one this code was written for.

    Raises:
        ServiceError: if migrations have not been applied, or newer code has applied more.
    """
    head = ScriptDirectory.from_config(alembic_config("")).get_current_head()
    current = in_transaction(ledger, lambda tx: MigrationContext.configure(tx).get_current_revision())
    if current != head:
        raise ServiceError(
            f"the ledger's schema is at revision {current or 'none'}, this code needs {head}",
            where=hide_password(ledger.url),
            todo="Run `virnucpro db upgrade`, or install the version that matches the schema.",
        )
