"""Alembic's entry: runs the migrations of the ledger on the URL that `database.upgrade` gives."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool

from virnucpro_core.ledger.tables import Base

LOCK = 0x6D696772  # any number that only our migrations use: the relay holds another for as long as it lives ("migr")


def run_migrations() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.begin() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        # two hosts may start at once; the second waits and finds nothing to do
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
        with context.begin_transaction():
            context.run_migrations()


run_migrations()
