"""How commands reach the ledger, and who they say they are."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from virnucpro_core.settings import DatabaseRole, load_settings

if TYPE_CHECKING:
    from sqlalchemy import Engine


@contextmanager
def connect(role: DatabaseRole = "dag") -> Iterator[Engine]:
    """The ledger, as a role; its schema is the one that this code was written for.

    Raises:
        SettingsError: no ledger is named.
        ServiceError: it cannot be reached, refuses us, or its migrations have not been applied.
    """
    from virnucpro_core.ledger.database import check_migrated, open_ledger

    ledger = open_ledger(load_settings().database_url_for(role))
    try:
        check_migrated(ledger)
        yield ledger
    finally:
        ledger.dispose()


def name_person() -> str:
    """Who runs this command, for the ledger's records."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return f"uid {os.getuid()}"
