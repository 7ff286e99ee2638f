"""Real servers for the tests: one PostgreSQL and one Valkey a session, a fresh database of each a test."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import hypothesis
import pytest
import redis
from sqlalchemy import Connection, Engine

from tests import ledger_jobs
from virnucpro_core.ledger.database import open_ledger, upgrade
from virnucpro_core.settings import PREFIX, Settings, load_settings
from virnucpro_core.stack.airflow import log_in
from virnucpro_core.stack.description import Description
from virnucpro_core.stack.postgres import LedgerUrls, PostgresServer
from virnucpro_core.stack.processes import Secrets, choose_port
from virnucpro_core.stack.stack import Stack
from virnucpro_core.stack.valkey import DATABASES, ValkeyServer

pytest_plugins = ["tests.fixtures_airflow", "tests.fixtures_model", "tests.fixtures_gpu"]

PROJECT = Path(__file__).resolve().parents[1]
MIGRATED = "migrated"  # the template that each test's ledger is copied from
UNDURABLE = {"fsync": "off", "synchronous_commit": "off"}  # a test's database need not survive the machine

numbers = itertools.count(1)


def pytest_configure() -> None:
    # A busy machine is slow at times; what hangs is found by the timeout.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    # A developer's own servers are not for tests.
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    # Airflow makes its home as soon as a test module imports it; the user's own stays out of this.
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares servers: a file's tests, and all that need the whole stack."""
    for item in items:
        whole_stack = item.path.is_relative_to(PROJECT / "tests" / "e2e")
        item.add_marker(pytest.mark.xdist_group("e2e" if whole_stack else item.path.name))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["AIRFLOW_HOME"])


@pytest.fixture
def near_root() -> Iterator[Path]:
    """A folder with a short path, for a stack's state: `tmp_path` may leave no room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="stack-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def servers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's servers keep their data, secrets and logs."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server_secrets(servers_folder: Path) -> Secrets:
    return Secrets(servers_folder / "secrets")


@pytest.fixture(scope="session")
def postgres(servers_folder: Path, server_secrets: Secrets) -> Iterator[PostgresServer]:
    """A running PostgreSQL of the session's own."""
    server = PostgresServer(servers_folder / "postgres", choose_port(), server_secrets, UNDURABLE)
    server.prepare()
    with server.process(servers_folder / "postgres.log") as process:
        process.start(server.is_ready)
        yield server


@pytest.fixture(scope="session")
def valkey_server(servers_folder: Path, server_secrets: Secrets) -> Iterator[ValkeyServer]:
    """A running Valkey of the session's own."""
    server = ValkeyServer(servers_folder / "valkey", choose_port(), server_secrets)
    server.prepare()
    with server.process(servers_folder / "valkey.log") as process:
        process.start(server.is_ready)
        yield server


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> str:
    """The name of a database that the migrations ran in, for copying."""
    upgrade(postgres.create_ledger_database(MIGRATED)["owner"])
    return MIGRATED


@pytest.fixture
def database_urls(postgres: PostgresServer) -> Iterator[LedgerUrls]:
    """A fresh database without a schema, as each role sees it: "owner", "dag", "worker"."""
    name = f"test_{next(numbers)}"
    yield postgres.create_ledger_database(name)
    postgres.drop_database(name)


@pytest.fixture
def database_url(database_urls: LedgerUrls) -> str:
    """A fresh database without a schema, as its owner sees it."""
    return database_urls["owner"]


@pytest.fixture
def ledger_urls(postgres: PostgresServer, migrated_template: str) -> Iterator[LedgerUrls]:
    """A fresh migrated ledger, as each role sees it: "owner", "dag", "worker"."""
    name = f"test_{next(numbers)}"
    yield postgres.create_ledger_database(name, template=migrated_template)
    postgres.drop_database(name)


@pytest.fixture
def ledger_url(ledger_urls: LedgerUrls) -> str:
    """A fresh migrated ledger, as its owner sees it."""
    return ledger_urls["owner"]


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Engine]:
    """A fresh migrated ledger, opened by its owner."""
    engine = open_ledger(ledger_url)
    yield engine
    engine.dispose()


@pytest.fixture
def tx(ledger: Engine) -> Iterator[Connection]:
    """A transaction that is rolled back, in a ledger with the model "tiny"."""
    with ledger.connect() as connection:
        ledger_jobs.add_model(connection)
        yield connection


@pytest.fixture
def broker_url(valkey_server: ValkeyServer) -> str:
    """An empty logical database of the broker; no other recent test used its number."""
    url = valkey_server.url(1 + next(numbers) % (DATABASES - 1))
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def settings_environment(
    ledger_urls: LedgerUrls, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """The process's settings point at this test's ledger, broker and folders; call it to set more of them.

    Child processes inherit them. `set(lease_seconds=1)` sets VIRNUCPRO_LEASE_SECONDS.
    """

    def set_variables(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"{PREFIX}{name.upper()}", str(value))
        load_settings.cache_clear()

    for folder in ("inbox", "output", "models"):
        (tmp_path / folder).mkdir()
    set_variables(
        owner_database_url=ledger_urls["owner"],
        dag_database_url=ledger_urls["dag"],
        worker_database_url=ledger_urls["worker"],
        broker_url=broker_url,
        inbox=tmp_path / "inbox",
        input_roots=tmp_path,
        output_root=tmp_path / "output",
        model_root=tmp_path / "models",
    )
    yield set_variables
    monkeypatch.undo()
    load_settings.cache_clear()


@dataclass(frozen=True)
class RunningStack:
    """The session's stack: how to manage it, where it is, and the settings that it runs with."""

    stack: Stack
    description: Description
    settings: Settings

    def log_in(self) -> httpx.Client:
        """A client of Airflow's REST API, base /api/v2."""
        password = (self.stack.folder / "secrets" / "airflow-admin").read_text()
        return log_in(self.description.urls["Airflow"], password)

    def read_url(self, name: str) -> str:
        """A secret URL: "owner_database", "dag_database", "worker_database" or "broker"."""
        return Path(self.description.environment[f"{PREFIX}{name.upper()}_URL_FILE"]).read_text()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The whole stack with Airflow, on the CPU, below a folder of the session's own."""
    folder = tmp_path_factory.mktemp("stack")
    settings = Settings(
        inbox=folder / "inbox",
        input_roots=(tmp_path_factory.getbasetemp(), PROJECT),
        output_root=folder / "output",
        model_root=folder / "models",
        dtype="float32",
        chunk_tokens=4000,  # a test's small file has several chunks
        notifier="tests.notifiers.FileNotifier",
        notifier_options={"path": str(folder / "told"), "text": "{{ run_id }} {{ what }}"},
    )
    stack = Stack(settings, folder / "state", gpus="none", fixed_ports=False)
    with pytest.MonkeyPatch.context() as environment:  # what whoever starts it needs for other programs
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            environment.setenv(name, f"http://127.0.0.1:{choose_port()}")
        environment.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", f"sqlite:///{folder}/others.db")
        description = stack.start()
    assert not (folder / "others.db").exists()
    try:
        yield RunningStack(stack, description, settings)
    finally:
        stack.stop()
