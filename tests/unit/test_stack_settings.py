"""What a stack makes of its settings: which servers it starts, and what each program is told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from pydantic import ValidationError

from virnucpro_core.errors import SettingsError
from virnucpro_core.settings import Settings
from virnucpro_core.stack.composition import Composition, compose
from virnucpro_core.stack.demo import read_also
from virnucpro_core.stack.description import SOCKET, Description, read_description, use_running_stack
from virnucpro_core.stack.processes import choose_port, write_private

pytestmark = pytest.mark.unit

LEDGER = "postgresql://me:hidden@db.example/ledger"
AIRFLOW = "postgresql+psycopg://me:hidden@db.example/airflow"
BROKER = "redis://:hidden@broker.example/3"


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(f"VIRNUCPRO_{field.upper()}", raising=False)
        monkeypatch.delenv(f"VIRNUCPRO_{field.upper()}_FILE", raising=False)


def compose_at(folder: Path, **settings: object) -> Composition:
    return compose(Settings.model_validate(settings), folder, gpus="none", fixed_ports=False)


def test_servers_of_the_users_own_are_not_started(tmp_path: Path) -> None:
    parts = compose_at(tmp_path, database_url=LEDGER, airflow_database_url=AIRFLOW, broker_url=BROKER)
    assert parts.postgres is None
    assert parts.valkey is None
    assert {program.name for program in parts.programs if program.group == "servers"} == set()
    assert parts.ledger_urls["dag"] == "postgresql+psycopg://me:hidden@db.example/ledger"
    assert parts.airflow.database_url == AIRFLOW


def test_a_broker_of_the_users_own_leaves_the_database_to_us(tmp_path: Path) -> None:
    parts = compose_at(tmp_path, broker_url=BROKER)
    assert parts.valkey is None
    assert parts.postgres is not None
    broker = Path(parts.description.environment["VIRNUCPRO_BROKER_URL_FILE"])
    assert broker.read_text() == BROKER


def test_a_ledger_elsewhere_needs_a_database_for_airflow_too(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="VIRNUCPRO_AIRFLOW_DATABASE_URL"):
        compose_at(tmp_path, database_url=LEDGER)


def test_no_secret_is_in_an_argument_an_environment_or_an_open_file(tmp_path: Path) -> None:
    parts = compose_at(tmp_path)
    secrets = [file.read_text() for file in (tmp_path / "secrets").iterdir()]
    told = [text for program in parts.programs for text in (*program.argv, *program.environment.values())]
    told.append(json.dumps(parts.description.environment))
    assert len(secrets) > 8
    assert not [text for text in told for secret in secrets if secret in text]
    for file in tmp_path.rglob("*"):
        if file.is_file() and any(secret in file.read_text() for secret in secrets):
            assert file.stat().st_mode & 0o077 == 0, file


def test_each_program_gets_the_database_role_that_it_needs(tmp_path: Path) -> None:
    expected = {"postgres": "", "valkey": "", "workers": "worker", "relay": "worker", "flower": ""}
    expected |= {
        "api-server": "dag",
        "scheduler": "dag",
        "dag-processor": "dag",
        "triggerer": "dag",
        "metrics": "dag",
    }
    for program in compose_at(tmp_path).programs:
        given = [name for name in program.environment if name.endswith("_DATABASE_URL_FILE")]
        role = expected.pop(program.name)
        assert given == ([f"VIRNUCPRO_{role.upper()}_DATABASE_URL_FILE"] if role else [])
    assert not expected


def test_programs_are_told_the_settings_that_were_made(tmp_path: Path) -> None:
    parts = compose_at(tmp_path, inbox=Path("here"), chunk_tokens=777)
    environment = next(program for program in parts.programs if program.name == "workers").environment
    assert environment["VIRNUCPRO_CHUNK_TOKENS"] == "777"
    assert environment["VIRNUCPRO_INBOX"] == str(Path.cwd() / "here")
    assert environment["VIRNUCPRO_DTYPE"] == "float32"
    assert "VIRNUCPRO_LEASE_SECONDS" not in environment


def test_airflow_is_told_the_notifiers_options_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"to": "me", "text": '{{ run_id }} "late" ; # 100%'}
    parts = compose_at(tmp_path, notifier="a.Notifier", notifier_options=options)
    environment = next(program for program in parts.programs if program.name == "triggerer").environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings().notifier_options == options
    assert Settings().notifier == "a.Notifier"
    monkeypatch.delenv("VIRNUCPRO_NOTIFIER_OPTIONS_FILE")
    monkeypatch.setenv("VIRNUCPRO_NOTIFIER_OPTIONS", "{no json")
    with pytest.raises(ValidationError, match="notifier_options"):
        Settings()


def input_roots_of(settings: Settings, folder: Path) -> set[str]:
    """What the programs of a stack are told of the input roots; the servers are told nothing."""
    parts = compose(settings, folder, gpus="none", fixed_ports=False)
    told = {p.name: p.environment.get("VIRNUCPRO_INPUT_ROOTS", "") for p in parts.programs}
    assert {name for name, roots in told.items() if not roots} == {"postgres", "valkey"}
    return set(told.values()) - {""} | {parts.description.environment["VIRNUCPRO_INPUT_ROOTS"]}


def test_programs_and_commands_read_inputs_from_the_same_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert input_roots_of(Settings(), tmp_path / "a") == {f"{tmp_path}:/home/somebody"}
    told = input_roots_of(Settings(input_roots=(Path("/data"), Path("here"))), tmp_path / "b")
    assert told == {f"/data:{tmp_path}/here"}


def test_the_demonstration_reads_its_files_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.fasta").touch()
    (tmp_path / "link.fasta").symlink_to("data/a.fasta")
    settings = read_also(Settings(input_roots=(Path("/mine"),)), Path("link.fasta"))
    assert input_roots_of(settings, tmp_path / "state") == {f"/mine:{tmp_path}/data"}


@pytest.fixture
def described(tmp_path: Path) -> Description:
    description = Description(
        urls={},
        logins="",
        environment={"VIRNUCPRO_INBOX": "/stack/inbox", "VIRNUCPRO_BROKER_URL_FILE": "/stack/secrets/broker"},
    )
    description.write(tmp_path)
    return description


@pytest.fixture
def running(tmp_path: Path, described: Description) -> Iterator[Description]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()
        yield described


def test_commands_find_the_running_stack(tmp_path: Path, running: Description) -> None:
    environment: dict[str, str] = {}
    assert use_running_stack(environment, tmp_path)
    assert environment == running.environment


def test_who_reads_a_private_file_while_it_is_written_finds_it_whole(tmp_path: Path) -> None:
    """Commands read where the stack is while it starts."""
    path = tmp_path / "file"
    write_private(path, "whole")
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            write_private(path, "whole")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        found = {path.read_text() if path.exists() else "" for _ in range(2000)}
    finally:
        done.set()
        writer.join()
    assert found == {"whole"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_setting_made_by_hand_stands(tmp_path: Path, running: Description) -> None:
    environment = {"VIRNUCPRO_BROKER_URL": BROKER, "VIRNUCPRO_INBOX": "/mine"}
    assert use_running_stack(environment, tmp_path)
    assert environment == {"VIRNUCPRO_BROKER_URL": BROKER, "VIRNUCPRO_INBOX": "/mine"}


@pytest.fixture
def described_roles(tmp_path: Path) -> Description:
    """What a stack with servers of its own leaves: a URL of the ledger for each role."""
    names = ("OWNER_DATABASE", "DAG_DATABASE", "WORKER_DATABASE", "BROKER")
    description = Description(
        urls={},
        logins="",
        environment={f"VIRNUCPRO_{name}_URL_FILE": f"/stack/secrets/{name}" for name in names},
    )
    description.write(tmp_path)
    return description


@pytest.mark.parametrize("name", ["DATABASE_URL", "DATABASE_URL_FILE", "DAG_DATABASE_URL"])
def test_a_ledger_named_by_hand_is_the_ledger_of_every_role(
    name: str, tmp_path: Path, running: Description, described_roles: Description
) -> None:
    environment = {f"VIRNUCPRO_{name}": "mine"}
    assert use_running_stack(environment, tmp_path)
    assert environment == {
        f"VIRNUCPRO_{name}": "mine",
        "VIRNUCPRO_BROKER_URL_FILE": "/stack/secrets/BROKER",
    }


@pytest.mark.parametrize("name", ["VIRNUCPRO_BROKER_URL", "VIRNUCPRO_BROKER_URL_FILE"])
def test_a_broker_named_by_hand_stands(
    name: str, tmp_path: Path, running: Description, described_roles: Description
) -> None:
    environment = {name: "mine", "VIRNUCPRO_AIRFLOW_DATABASE_URL": "another database"}
    assert use_running_stack(environment, tmp_path)
    assert {key for key in environment if "BROKER" in key} == {name}
    assert environment[name] == "mine"
    assert "VIRNUCPRO_DAG_DATABASE_URL_FILE" in environment


def test_what_a_killed_stack_left_behind_does_not_count(tmp_path: Path, described: Description) -> None:
    assert read_description(tmp_path) is None
    environment: dict[str, str] = {}
    assert not use_running_stack(environment, tmp_path)
    assert environment == {}


CHOOSE_PORTS = """
from virnucpro_core.stack.processes import choose_port
print(*(choose_port() for _ in range(500)))
"""


def test_a_chosen_port_is_nobody_elses_before_a_server_listens_on_it() -> None:
    # Some in another process: it is the kernel that keeps them, and what it has chosen is free when it ends.
    chosen = [choose_port() for _ in range(5)]
    told = subprocess.run([sys.executable, "-c", CHOOSE_PORTS], capture_output=True, text=True, check=True)
    chosen += map(int, told.stdout.split())
    assert len(set(chosen)) == 505
    with socket.create_server(("127.0.0.1", chosen[0])):
        assert choose_port(chosen[0]) != chosen[0]


def test_two_stacks_that_start_at_once_have_ports_of_their_own() -> None:
    """The servers of the first do not listen yet."""
    wanted = choose_port()
    take = f"from virnucpro_core.stack.processes import choose_port; print(choose_port({wanted}), flush=True); input()"
    ports = set()
    with ExitStack() as stack:
        for _ in range(2):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", take], text=True, **pipes))
            stack.callback(process.communicate, "\n")
            assert process.stdout is not None
            ports.add(int(process.stdout.readline()))
    assert wanted in ports
    assert len(ports) == 2
