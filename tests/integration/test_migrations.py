"""The migrations build the schema that the code describes, and can be undone."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from tests import ledger_jobs as jobs
from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import (
    alembic_config,
    check_migrated,
    in_transaction,
    open_ledger,
    upgrade,
)
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.overview import list_job_overviews
from virnucpro_core.ledger.snapshot import take_snapshot
from virnucpro_core.ledger.tables import Base
from virnucpro_core.stack.postgres import LedgerUrls
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


def test_folders_and_passwords_may_hold_a_per_cent_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virnucpro_core.ledger.database.resources.files", lambda _: "/100%_of it/migrations")
    config = alembic_config("postgresql://me:%40@host/base")
    found = [config.get_main_option(name) for name in ("script_location", "sqlalchemy.url")]
    assert found == ["/100%_of it/migrations", "postgresql://me:%40@host/base"]


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


OLD = """
    INSERT INTO models (name, path, weights_sha256, layers, token_dropout, demonstration, config)
    VALUES ('tiny', 'tiny', :weights, 1, true, true, '{}');
    INSERT INTO inputs (sha256, size, compression, location, records, residues)
    VALUES (:input, 3000, 'plain', '/in/a.fasta', 30, 2700);
    INSERT INTO jobs (input_sha256, recipe_sha256, recipe, model, stage, chunks_total, chunks_left, records, embeddings)
    VALUES (:input, :recipe_sha256, CAST(:recipe AS jsonb), 'tiny', 'extract', 3, 2, 30, 10);
    INSERT INTO submissions (job_id, path, stem, requested_by, max_failed_share)
    VALUES (1, '/in/a.fasta', 'a', 'test', 1.0);
    INSERT INTO workers (node, queue, host, pid, device, lease_expires_at)
    VALUES ('cpu@test', 'extract', 'test', 1, 'cpu', now());
    INSERT INTO chunks (job_id, stage, ordinal, byte_start, byte_end, first_record, records, residues, sha256, state,
                        attempts, worker_id, claimed_at, finished_at, embeddings, failed, seconds)
    SELECT 1, 'extract', k, 1000 * k, 1000 * k + 1000, 10 * k + 1, 10, 900, :input,
           CASE k WHEN 0 THEN 'done' ELSE 'pending' END, CASE k WHEN 0 THEN 1 ELSE 0 END,
           CASE k WHEN 0 THEN 1 END, CASE k WHEN 0 THEN now() END, CASE k WHEN 0 THEN now() END,
           CASE k WHEN 0 THEN 10 END, CASE k WHEN 0 THEN 0 END, CASE k WHEN 0 THEN 0.5 END
      FROM generate_series(0, 2) k;
    INSERT INTO outbox (chunk_id, queue, due_at)
    SELECT id, 'extract', now() - interval '1 hour' FROM chunks WHERE state = 'pending'
"""


@pytest.mark.parametrize("made_by_0001", ["0001", "0002"])
def test_a_ledger_of_an_earlier_version_is_upgraded_in_mid_job(
    database_urls: LedgerUrls, made_by_0001: str
) -> None:
    """Rows as that version wrote them; each role goes on with them. For a while 0001 made what 0002 does, too."""
    command.upgrade(alembic_config(database_urls["owner"]), made_by_0001)
    command.stamp(alembic_config(database_urls["owner"]), "0001")
    engines = {role: open_ledger(url) for role, url in database_urls.items()}
    values = {
        "weights": jobs.WEIGHTS,
        "input": "b" * 64,
        "recipe": json.dumps(asdict(jobs.RECIPE)),
        "recipe_sha256": jobs.RECIPE.sha256,
    }
    with engines["owner"].begin() as tx:
        for statement in OLD.split(";"):
            tx.execute(text(statement), {name: values[name] for name in values if f":{name}" in statement})
    upgrade(database_urls["owner"])
    (job,) = in_transaction(engines["dag"], list_job_overviews)
    assert (job.residues_done, job.chunks_left) == (900, 2)
    (queue, _) = in_transaction(engines["dag"], take_snapshot).queues
    assert 3600 <= queue.oldest_pending_seconds < 3700
    worker = in_transaction(engines["worker"], jobs.start_worker)
    in_transaction(engines["dag"], cancel, job.id, by="a person")
    in_transaction(engines["dag"], resume, job.id)
    in_transaction(engines["worker"], jobs.run_job, job.id, worker)
    (job,) = in_transaction(engines["dag"], list_job_overviews)
    assert (job.state, job.embeddings, job.residues_done) == ("succeeded", 30, 2700)
    for engine in engines.values():
        engine.dispose()
