"""The ledger as Airflow's processes reach it: with the role that registers and reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from virnucpro_core.ledger.database import check_migrated, connect_arguments, open_ledger
from virnucpro_core.settings import load_settings

_shared: dict[asyncio.AbstractEventLoop, AsyncEngine] = {}


@contextmanager
def open_dag_ledger() -> Iterator[Engine]:
    """The ledger, for the length of a task.

    Raises:
        ServiceError: it cannot be used, or its schema is not this version's.
        SettingsError: no database is named.
    """
    ledger = open_ledger(load_settings().database_url_for("dag"))
    try:
        check_migrated(ledger)
        yield ledger
    finally:
        ledger.dispose()


@cache
def share_ledger() -> Engine:
    """The process's one engine, for a server that answers many requests.

    Raises:
        ServiceError: it cannot be used, or its schema is not this version's.
        SettingsError: no database is named.
    """
    ledger = open_ledger(load_settings().database_url_for("dag"))
    try:
        check_migrated(ledger)
    except BaseException:
        ledger.dispose()
        raise
    return ledger


def share_async_ledger() -> AsyncEngine:
    """The event loop's one asynchronous engine: hundreds of triggers share its two connections."""
    loop = asyncio.get_running_loop()
    if loop not in _shared:
        _shared[loop] = create_async_engine(
            load_settings().database_url_for("dag"),
            pool_pre_ping=True,
            pool_size=2,
            max_overflow=0,
            connect_args=connect_arguments("virnucpro trigger"),
        )
    return _shared[loop]


async def close_async_ledger() -> None:
    """Close the event loop's engine, if it has one."""
    engine = _shared.pop(asyncio.get_running_loop(), None)
    if engine is not None:
        await engine.dispose()
