"""The embedded servers: they start, keep strangers out, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from sqlalchemy.engine import make_url

from virnucpro_core.errors import ServiceError
from virnucpro_core.stack.composition import provision
from virnucpro_core.stack.postgres import LedgerUrls, PostgresServer
from virnucpro_core.stack.processes import Secrets, choose_port
from virnucpro_core.stack.supervisor import is_alive
from virnucpro_core.stack.valkey import ValkeyServer

pytestmark = pytest.mark.integration


def connect(url: str, **overrides: str) -> psycopg.Connection:
    parts = make_url(url)
    given = {"host": parts.host, "user": parts.username, "password": parts.password, "dbname": parts.database}
    return psycopg.connect(**(given | {"port": parts.port} | overrides))


def test_each_role_logs_in_with_its_own_password(database_urls: LedgerUrls) -> None:
    for role, url in database_urls.items():
        with connect(url) as connection:
            assert connection.execute("SELECT current_user").fetchone() == (f"virnucpro_{role}",)
    assert len({make_url(url).password for url in database_urls.values()}) == 3


def test_a_wrong_password_is_refused(database_url: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        connect(database_url, password="wrong")


def test_a_database_is_closed_to_other_roles(postgres: PostgresServer, database_url: str) -> None:
    postgres.create_role("stranger")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        connect(postgres.url(str(make_url(database_url).database), "stranger"))


def test_a_database_that_was_made_and_not_yet_closed_is_closed(postgres: PostgresServer) -> None:
    """Whoever made it was killed in between."""
    postgres.create_role("stranger")
    with postgres.connect() as connection:
        connection.execute("CREATE DATABASE half_made OWNER virnucpro_owner")
    urls = postgres.create_ledger_database("half_made")
    try:
        connect(urls["worker"]).close()
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            connect(postgres.url("half_made", "stranger"))
    finally:
        postgres.drop_database("half_made")


def test_a_server_without_space_for_the_databases_is_said_in_words(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*_: object, **__: object) -> None:
        raise psycopg.errors.DiskFull(
            "could not extend file: No space left on device\nHINT:  Check free disk space."
        )

    monkeypatch.setattr(postgres, "create_database", fill_up)
    with pytest.raises(
        ServiceError, match="cannot be made: could not extend file: No space left on device"
    ) as caught:
        provision(postgres)
    assert caught.value.where == str(postgres.folder)


def test_the_broker_wants_its_password(valkey_server: ValkeyServer, broker_url: str) -> None:
    assert redis.Redis.from_url(broker_url).ping()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=valkey_server.port).ping()


def test_the_broker_reads_its_configuration_from_a_folder_of_any_name(tmp_path: Path) -> None:
    """Without one it would listen everywhere, without a password."""
    folder = tmp_path / "a [1] b\\n*"
    server = ValkeyServer(folder, choose_port(), Secrets(tmp_path / "secrets"))
    server.prepare()
    with server.process(tmp_path / "log") as process:
        process.start(server.is_ready)
        with redis.Redis.from_url(server.url()) as client:
            assert client.config_get("dir") == {"dir": str(folder)}


def test_servers_listen_on_loopback_alone(postgres: PostgresServer, valkey_server: ValkeyServer) -> None:
    listening = {
        connection.laddr.port: connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening[postgres.port] == "127.0.0.1"
    assert listening[valkey_server.port] == "127.0.0.1"


def test_secrets_are_in_private_files_and_in_no_argument_list(
    postgres: PostgresServer, valkey_server: ValkeyServer, server_secrets: Secrets
) -> None:
    files = [*server_secrets.folder.iterdir(), valkey_server.configuration]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(server_secrets.folder.stat().st_mode) == 0o700
    passwords = [file.read_text() for file in server_secrets.folder.iterdir()]
    arguments = [
        part for process in psutil.process_iter(["cmdline"]) for part in process.info["cmdline"] or []
    ]
    assert not [part for part in arguments for password in passwords if password in part]


def test_data_outlives_a_restart(tmp_path: Path) -> None:
    server = PostgresServer(tmp_path / "postgres", choose_port(), Secrets(tmp_path / "secrets"))
    for statement in ("CREATE TABLE kept ()", "SELECT * FROM kept"):
        server.prepare()
        with server.process(tmp_path / "log") as process:
            process.start(server.is_ready)
            with server.connect() as connection:
                connection.execute(statement)


PREPARER = """
    import sys
    from pathlib import Path
    from virnucpro_core.stack.postgres import PostgresServer
    from virnucpro_core.stack.processes import Secrets

    PostgresServer(Path(sys.argv[1]) / "postgres", 0, Secrets(Path(sys.argv[1]) / "secrets")).prepare()
"""


def kill_preparer(folder: Path, made: str) -> list[psutil.Process]:
    """Kill who makes a cluster as soon as one of its files is there; returns the programs that were at work."""
    argv = [sys.executable, "-c", textwrap.dedent(PREPARER), str(folder)]
    with subprocess.Popen(argv) as preparer:
        while not list(folder.glob(f"postgres/*/{made}")):
            assert preparer.poll() is None
            time.sleep(0.005)
        programs = psutil.Process(preparer.pid).children(recursive=True)
        preparer.kill()
    return programs


def test_a_cluster_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    # PG_VERSION is initdb's first file.
    programs = kill_preparer(tmp_path, "PG_VERSION")
    _, left = psutil.wait_procs(programs, timeout=60)
    assert not left, "initdb ends with whoever asked for it"
    server = PostgresServer(tmp_path / "postgres", choose_port(), Secrets(tmp_path / "secrets"))
    server.prepare()
    with server.process(tmp_path / "log") as process:
        process.start(server.is_ready)


def test_a_cluster_is_made_while_the_last_initdb_is_not_gone_yet(tmp_path: Path) -> None:
    """It ends only after the program that it waits for, and removes what it has made."""
    # That program does the rest from here, for a second or more.
    programs = kill_preparer(tmp_path, "base/1/PG_VERSION")
    server = PostgresServer(tmp_path / "postgres", choose_port(), Secrets(tmp_path / "secrets"))
    server.prepare()
    _, left = psutil.wait_procs(programs, timeout=60)
    assert not left
    with server.process(tmp_path / "log") as process:
        process.start(server.is_ready)
    server.prepare()
    assert [path.name for path in server.folder.iterdir()] == ["data"]


def test_a_server_that_cannot_start_shows_the_end_of_its_log(
    valkey_server: ValkeyServer, tmp_path: Path
) -> None:
    second = ValkeyServer(tmp_path / "valkey", valkey_server.port, Secrets(tmp_path / "secrets"))
    second.prepare()
    with (
        pytest.raises(ServiceError, match=r"(?s)ended while starting.*Address already in use"),
        second.process(tmp_path / "log") as process,
    ):
        process.start(second.is_ready)


STARTER = """
    import sys, time
    from pathlib import Path
    from virnucpro_core.stack.postgres import PostgresServer
    from virnucpro_core.stack.processes import Secrets, choose_port
    from virnucpro_core.stack.valkey import ValkeyServer

    folder = Path(sys.argv[1])
    secrets = Secrets(folder / "secrets")
    for server in (
        PostgresServer(folder / "postgres", choose_port(), secrets),
        ValkeyServer(folder / "valkey", choose_port(), secrets),
    ):
        server.prepare()
        server.process(folder / "log").start(server.is_ready)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_servers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", textwrap.dedent(STARTER), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
        children = psutil.Process(starter.pid).children(recursive=True)
        names = set()
        for child in children:
            with suppress(psutil.NoSuchProcess):  # one that served a connection of PostgreSQL's
                names.add(child.name())
        assert {"postgres", "valkey-server"} <= names
        os.kill(starter.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    # An orphan that nobody reaps (a container without an init) stays a zombie: it has ended all the same.
    assert [process for process in alive if is_alive(process)] == []
