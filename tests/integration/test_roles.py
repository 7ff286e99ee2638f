"""Who may do what in the ledger, and who gets in at all: each thing that is forbidden is tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection, Engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, ProgrammingError

from tests import ledger_jobs as jobs
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.settings import DatabaseRole
from virnucpro_core.stack.postgres import LEDGER_ROLES, SUPERUSER, LedgerUrls, PostgresServer
from virnucpro_core.stack.valkey import ValkeyServer

pytestmark = pytest.mark.integration

SCHEMA = [
    "CREATE TABLE mine (x int)",
    "CREATE TABLE public.mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE EXTENSION vector",
    "CREATE VIEW v AS SELECT * FROM jobs",
    "CREATE TRIGGER t AFTER UPDATE ON chunks FOR EACH ROW EXECUTE FUNCTION pg_notify('a', 'b')",
    "ALTER TABLE chunks ADD COLUMN mine int",
    "ALTER TABLE chunks DROP CONSTRAINT ck_chunks_records_conserved",
    "ALTER TABLE chunks DISABLE TRIGGER ALL",
    "ALTER TABLE jobs OWNER TO CURRENT_USER",
    "ALTER SEQUENCE lease_tokens RESTART",
    "DROP TABLE outbox",
    "DROP TABLE jobs CASCADE",
    "DROP INDEX ix_jobs_state",
    "DROP SCHEMA public CASCADE",
    "TRUNCATE chunks",
    "TRUNCATE jobs CASCADE",
    "UPDATE alembic_version SET version_num = '0'",
    "ALTER ROLE CURRENT_USER SUPERUSER",
    "SET ROLE virnucpro_owner",
    "SET SESSION AUTHORIZATION postgres",
    "CREATE ROLE mine SUPERUSER",
    "ALTER SYSTEM SET listen_addresses = '*'",
    "COPY jobs TO '/tmp/jobs'",
    "COPY jobs FROM PROGRAM 'id'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT * FROM pg_authid",
    "SELECT lo_import('/etc/passwd')",
    "DELETE FROM jobs",
    "DELETE FROM inputs",
    "DELETE FROM submissions",
    "DELETE FROM models",
    "DELETE FROM workers",
    "DELETE FROM stages",
    "INSERT INTO stages VALUES ('mine', 9, 'extract')",
    (
        "INSERT INTO models (name, path, weights_sha256, layers, token_dropout, demonstration, config)"
        " VALUES ('mine', '/mine', repeat('a', 64), 1, true, true, '{}')"
    ),
    "UPDATE models SET path = '/elsewhere'",
    "UPDATE stages SET queue = 'mine'",
    "UPDATE inputs SET sha256 = repeat('a', 64)",
    "UPDATE inputs SET compression = 'gzip'",
    "UPDATE setbacks SET error = 'nothing'",
]
"""What neither the DAG nor a worker may do."""

DAG = [
    "SELECT nextval('lease_tokens')",
    "SELECT setval('lease_tokens', 1)",
    "INSERT INTO workers (node, queue, host, pid, device, lease_expires_at) VALUES ('a', 'b', 'c', 1, 'd', now())",
    "UPDATE workers SET lease_expires_at = now() + interval '1 year'",
    "UPDATE workers SET state = 'gone'",
    "UPDATE chunks SET worker_id = 1",
    "UPDATE chunks SET claimed_at = now()",
    "UPDATE chunks SET sha256 = repeat('a', 64)",
    "UPDATE chunks SET byte_end = byte_end + 1",
    (
        "INSERT INTO artifacts (job_id, generation, stage, ordinal, kind, path, sha256, bytes, rows)"
        " SELECT id, 1, 'extract', 0, 'matrix', '/etc/passwd', repeat('a', 64), 1, 1 FROM jobs"
    ),
    "UPDATE artifacts SET path = '/etc/passwd'",
    "INSERT INTO failures SELECT id, 1, 1, 'x', 'empty', '' FROM jobs",
    "UPDATE failures SET reason = 'oom'",
    "INSERT INTO rejections (reason, messages) VALUES ('task', 1)",
    "UPDATE rejections SET messages = 1",
    "INSERT INTO tallies SELECT id, 'extract', 'tokens', '', 1 FROM workers",
    "UPDATE tallies SET value = 0",
    "DELETE FROM tallies",
]
"""What a worker may do, or nobody, and the DAG must not: lease, run, and say what came of it."""

WORKER = [
    (
        "INSERT INTO inputs (sha256, size, compression, location, records, residues)"
        " VALUES (repeat('c', 64), 1, 'plain', '/etc/passwd', 1, 1)"
    ),
    "UPDATE inputs SET location = '/etc/passwd'",
    (
        "INSERT INTO submissions (job_id, path, stem, requested_by, max_failed_share)"
        " SELECT id, '/a', 'a', 'me', 1 FROM jobs"
    ),
    "UPDATE submissions SET path = '/etc/passwd'",
    "UPDATE submissions SET stem = 'another'",
    "UPDATE submissions SET nucleotide_path = '/etc/passwd'",
    "UPDATE submissions SET requested_by = 'another'",
    (
        "INSERT INTO jobs (input_sha256, recipe_sha256, recipe, model, stage, chunks_total, chunks_left, records)"
        " SELECT input_sha256, repeat('d', 64), recipe, model, stage, 1, 1, 1 FROM jobs"
    ),
    "INSERT INTO waiters (token, job_id) SELECT 'me', id FROM jobs",
    "DELETE FROM waiters",
]
"""What the DAG may do and a worker must not: ask for something."""


@pytest.fixture
def ledgers(ledger_urls: LedgerUrls) -> Iterator[dict[DatabaseRole, Engine]]:
    """A ledger with a job that a worker runs, as each role."""
    engines = {role: open_ledger(url) for role, url in ledger_urls.items()}
    in_transaction(engines["owner"], jobs.add_model)
    registered = in_transaction(engines["dag"], jobs.register, jobs.scan())
    in_transaction(engines["worker"], lease_one, registered.job_id)
    yield engines
    for engine in engines.values():
        engine.dispose()


def lease_one(tx: Connection, job_id: int) -> None:
    jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], jobs.start_worker(tx))


def test_forbidden_statements_are_refused(ledgers: dict[DatabaseRole, Engine]) -> None:
    tried: list[tuple[DatabaseRole, str]] = [
        *(("dag", statement) for statement in SCHEMA + DAG),
        *(("worker", statement) for statement in SCHEMA + WORKER),
    ]
    done = []
    for role, statement in tried:
        with ledgers[role].connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            try:
                connection.execute(text(statement))
            except DBAPIError as error:
                # 42501: insufficient privilege. Whatever else stopped it might not stop it elsewhere.
                if getattr(error.orig, "sqlstate", None) == "42501":
                    continue
                done.append((role, statement, str(error.orig)))
            else:
                done.append((role, statement, "was done"))
    assert done == []


def test_what_is_forbidden_to_one_is_possible(ledgers: dict[DatabaseRole, Engine]) -> None:
    """Statements that nobody could run would prove nothing."""
    able: list[tuple[DatabaseRole, str]] = [
        *(("owner", statement) for statement in DAG + WORKER),
        ("worker", DAG[0]),
        ("worker", DAG[2]),
        ("worker", DAG[3]),
        ("dag", WORKER[0]),
        ("dag", WORKER[1]),
        ("dag", WORKER[7]),
    ]
    for role, statement in able:
        with ledgers[role].connect() as connection:
            connection.execute(text(statement))  # not committed


def test_a_role_reaches_its_own_database_alone(postgres: PostgresServer, ledger_urls: LedgerUrls) -> None:
    postgres.create_role("airflow_of_others")
    postgres.create_database("airflow_of_others", owner="airflow_of_others")
    for url in ledger_urls.values():
        parts = make_url(url)
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(
                host=parts.host,
                port=parts.port,
                user=parts.username,
                password=parts.password,
                dbname="airflow_of_others",
            )


@pytest.mark.parametrize("role", [SUPERUSER, *LEDGER_ROLES.values()])
@pytest.mark.parametrize("password", [None, "", "wrong", SUPERUSER])
def test_postgresql_lets_nobody_in_without_the_password(
    postgres: PostgresServer, ledger_urls: LedgerUrls, role: str, password: str | None
) -> None:
    with pytest.raises(
        psycopg.OperationalError, match=r"password authentication failed|no password supplied"
    ):
        psycopg.connect(
            host="127.0.0.1",
            port=postgres.port,
            user=role,
            password=password,
            dbname="postgres",
            passfile="/x",
        )


def test_postgresql_keeps_passwords_by_scram_and_trusts_no_address(postgres: PostgresServer) -> None:
    rules = [
        line.split()[-1]
        for line in (postgres.data / "pg_hba.conf").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert set(rules) == {"scram-sha-256"}
    with postgres.connect() as connection:
        kept = connection.execute("SELECT rolname, rolpassword FROM pg_authid WHERE rolcanlogin").fetchall()
        sockets = connection.execute("SHOW unix_socket_directories").fetchone()
        addresses = connection.execute("SHOW listen_addresses").fetchone()
    assert {SUPERUSER, *LEDGER_ROLES.values()} <= {role for role, _ in kept}
    assert [role for role, password in kept if not str(password).startswith("SCRAM-SHA-256$")] == []
    assert (sockets, addresses) == (("",), ("127.0.0.1",))


def test_postgresql_has_no_socket_in_the_file_system(postgres: PostgresServer) -> None:
    sockets = Path("/proc/net/unix").read_text()
    assert not re.search(rf"\.s\.PGSQL\.{postgres.port}\b", sockets)


@pytest.mark.parametrize(
    "command", [["PING"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["SHUTDOWN"], ["FLUSHALL"]]
)
@pytest.mark.parametrize("password", [None, "wrong"])
def test_valkey_does_nothing_without_the_password(
    valkey_server: ValkeyServer, command: list[str], password: str | None
) -> None:
    with (
        redis.Redis(port=valkey_server.port, password=password, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.execute_command(*command)


def test_each_role_can_do_its_work_and_no_more(ledger_urls: LedgerUrls) -> None:
    owner, dag, worker = (open_ledger(ledger_urls[role]) for role in ("owner", "dag", "worker"))
    in_transaction(owner, jobs.add_model)
    registered = in_transaction(dag, jobs.register, jobs.scan())
    worker_id = in_transaction(worker, jobs.start_worker)
    in_transaction(worker, jobs.run_job, registered.job_id, worker_id, 1)
    artifacts = in_transaction(dag, queries.artifacts_of, registered.job_id)
    assert in_transaction(dag, resume, registered.job_id, [artifacts[0].id]).lost == 1
    in_transaction(worker, jobs.run_job, registered.job_id, worker_id, 1)
    in_transaction(dag, jobs.register, jobs.scan(), force=True)
    in_transaction(dag, cancel, registered.job_id, by="a person")
    for engine, forbidden in [
        (dag, "SELECT nextval('lease_tokens')"),
        (dag, "UPDATE workers SET state = 'gone'"),
        (dag, "UPDATE models SET path = '/elsewhere'"),
        (dag, "DROP TABLE outbox"),
        (worker, "INSERT INTO jobs (records) VALUES (1)"),
        (worker, "UPDATE models SET path = '/elsewhere'"),
        (worker, "UPDATE inputs SET location = '/elsewhere'"),
        (worker, "CREATE TABLE mine (x int)"),
    ]:
        with engine.connect() as connection, pytest.raises(ProgrammingError, match=r"denied|owner"):
            connection.execute(text(forbidden))
    for engine in (owner, dag, worker):
        engine.dispose()
