"""The migrations build the schema that the code describes, and can be undone."""

from __future__ import annotations

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import alembic_config, check_migrated, open_ledger, upgrade
from virnucpro_core.ledger.tables import Base
from workers.relay import RELAY_LOCK

pytestmark = pytest.mark.integration


def test_migrations_build_the_tables_that_the_code_describes(ledger_url: str) -> None:
    engine = create_engine(ledger_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_upgrade_can_be_repeated_and_undone(database_url: str) -> None:
    upgrade(database_url)
    upgrade(database_url)
    command.downgrade(alembic_config(database_url), "base")
    engine = create_engine(database_url)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_upgrade_does_not_wait_for_a_relay_that_serves(ledger_url: str) -> None:
    engine = create_engine(ledger_url)
    with engine.connect() as relay:
        relay.exec_driver_sql(f"SELECT pg_advisory_lock({RELAY_LOCK})")
        upgrade(f"{ledger_url}?options=-c%20lock_timeout%3D2s")
    engine.dispose()


def test_a_schema_that_is_not_migrated_is_refused(database_url: str, ledger_url: str) -> None:
    empty, migrated = open_ledger(database_url), open_ledger(ledger_url)
    check_migrated(migrated)
    with pytest.raises(ServiceError, match="virnucpro db upgrade"):
        check_migrated(empty)
    empty.dispose()
    migrated.dispose()
