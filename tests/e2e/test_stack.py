"""The whole stack as a person starts and meets it."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable
from configparser import RawConfigParser
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import redis
from sqlalchemy import create_engine, inspect, make_url, text

from tests.conftest import RunningStack
from tests.fixtures_airflow import wait_until
from virnucpro_core.errors import ServiceError
from virnucpro_core.settings import Settings
from virnucpro_core.stack.description import STATE_FOLDER, use_running_stack
from virnucpro_core.stack.stack import Stack, only_starter

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SECONDS = 120.0  # that an answer may take
INTERRUPTED = 130  # exit code


def family_of(stack: Stack) -> list[psutil.Process]:
    supervisord = psutil.Process(int((stack.folder / "supervisord.pid").read_text()))
    return [supervisord, *supervisord.children(recursive=True)]


def ask_all(stack: Stack, question: Callable[[psutil.Process], Iterable[str]]) -> list[str]:
    """What each process of the stack answers; Airflow and PostgreSQL have some that end while we ask."""
    answers: list[str] = []
    for process in family_of(stack):
        with suppress(psutil.NoSuchProcess):
            answers.extend(question(process))
    assert answers
    return answers


def addresses_of(process: psutil.Process) -> list[str]:
    """Where a process listens."""
    connections = process.net_connections("tcp")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


def wait_until_all_run(stack: Stack) -> set[str]:
    """A program that answers is STARTING until it has settled; returns the programs' names."""
    wait_until(lambda: set(stack.status().values()) == {"RUNNING"}, stack.status)
    return set(stack.status())


def test_every_program_runs(stack: RunningStack) -> None:
    assert wait_until_all_run(stack.stack) == {
        *("postgres", "valkey", "workers", "relay", "flower", "metrics"),
        *("api-server", "scheduler", "dag-processor", "triggerer"),
    }


def test_all_of_it_listens_on_loopback_alone(stack: RunningStack) -> None:
    assert set(ask_all(stack.stack, addresses_of)) == {"127.0.0.1"}


def test_no_secret_is_in_an_argument_list_or_an_environment(stack: RunningStack) -> None:
    secrets = [file.read_text() for file in (stack.stack.folder / "secrets").iterdir()]
    shown = ask_all(stack.stack, lambda process: [*process.cmdline(), *process.environ().values()])
    assert not [text for text in shown for secret in secrets if secret in text]


def read_secrets(stack: RunningStack) -> dict[str, str]:
    """All that was generated, and the URLs that passwords are in."""
    secrets = {file.name: file.read_text() for file in (stack.stack.folder / "secrets").iterdir()}
    assert len(secrets) >= 10
    return secrets


def test_no_secret_is_in_a_log(stack: RunningStack) -> None:
    folder = stack.stack.folder
    logs = [
        *(folder / "logs").glob("*"),
        *(folder / "airflow" / "logs").rglob("*.log"),
        *folder.rglob("*.log"),
    ]
    assert {"postgres.log", "valkey.log"} - {log.name for log in logs} == set()
    assert sum(log.stat().st_size for log in logs) > 10_000
    told = [
        (log.name, name)
        for log in logs
        if log.is_file()
        for name, secret in read_secrets(stack).items()
        if secret.encode() in log.read_bytes()
    ]
    assert told == []


def test_no_secret_is_in_the_broker_or_in_airflows_tables(stack: RunningStack) -> None:
    """Where the arguments of tasks lie: of Celery's in the broker, of Airflow's in its tables."""
    secrets = read_secrets(stack)
    with redis.Redis.from_url(stack.read_url("broker")) as broker:
        dumps = [bytes(broker.dump(key) or b"") for key in broker.keys("*")]
    assert dumps
    assert not [name for name, secret in secrets.items() for dump in dumps if secret.encode() in dump]
    parser = RawConfigParser()
    parser.read(stack.stack.folder / "airflow" / "airflow.cfg")
    url = make_url(parser["database"]["sql_alchemy_conn"].replace("%%", "%"))
    found = []
    with create_engine(url).connect() as connection:
        for table in inspect(connection).get_table_names():
            rows = str(connection.execute(text(f'SELECT * FROM "{table}"')).all())
            found += [(table, name) for name, secret in secrets.items() if secret in rows]
    connection.engine.dispose()
    assert found == []


@pytest.mark.parametrize("page", ["/", "/workers", "/broker", "/tasks", "/api/workers?refresh=1"])
def test_no_secret_is_on_a_page_of_flowers(stack: RunningStack, page: str) -> None:
    """It shows configurations, to whoever is logged in."""
    secrets = read_secrets(stack)
    answer = httpx.get(
        stack.description.urls["Flower"] + page,
        auth=("admin", secrets["flower-admin"]),
        follow_redirects=True,
        timeout=SECONDS,
    )
    assert answer.status_code == httpx.codes.OK
    assert not [name for name, secret in secrets.items() if secret in answer.text]


def test_strangers_can_do_nothing_to_workers_and_runs(stack: RunningStack) -> None:
    flower, airflow = stack.description.urls["Flower"], stack.description.urls["Airflow"]
    for method, url in [
        ("GET", f"{flower}/"),
        ("GET", f"{flower}/api/workers"),
        ("GET", f"{flower}/api/tasks"),
        ("POST", f"{flower}/api/worker/shutdown/extract"),
        ("POST", f"{flower}/api/task/send-task/virnucpro.extract"),
        ("GET", f"{airflow}/api/v2/dags/virnucpro_ingest/dagRuns"),
        ("GET", f"{airflow}/api/v2/config"),
        ("GET", f"{airflow}/api/v2/connections"),
        ("POST", f"{airflow}/api/v2/dags/virnucpro_ingest/dagRuns"),
        ("PATCH", f"{airflow}/api/v2/dags/virnucpro_ingest"),
    ]:
        answer = httpx.request(method, url, json={} if method != "GET" else None, timeout=SECONDS)
        assert answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN), (method, url)
    wrong = httpx.get(f"{flower}/workers", auth=("admin", "admin"), timeout=SECONDS)
    assert wrong.status_code == httpx.codes.UNAUTHORIZED
    # These are open, for who watches: they count.
    for page in (f"{flower}/metrics", f"{flower}/healthcheck", stack.description.urls["Metrics"]):
        told = httpx.get(page, timeout=SECONDS).text
        assert not [name for name, secret in read_secrets(stack).items() if secret in told]


def test_secrets_are_in_files_of_their_owner_alone(stack: RunningStack) -> None:
    folder = stack.stack.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    passwords = [file.read_text() for file in (folder / "secrets").iterdir()]
    for file in folder.rglob("*"):
        if file.is_file() and "postgres/data" not in str(file):
            with suppress(FileNotFoundError):  # the broker and Airflow have some that are gone again
                content = file.read_bytes()
                if any(password.encode() in content for password in passwords):
                    assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_pages_want_the_login_that_was_generated(stack: RunningStack) -> None:
    login = re.compile(r"^(\w+)\s+(http://\S+)\s+user (\S+)\s+password (\S+)$", re.MULTILINE)
    logins = {name: rest for name, *rest in login.findall(Path(stack.description.logins).read_text())}
    assert set(logins) == {"Airflow", "Flower"}

    url, user, password = logins["Flower"]
    assert httpx.get(f"{url}/workers", timeout=SECONDS).status_code == httpx.codes.UNAUTHORIZED
    right = httpx.get(f"{url}/workers", auth=(user, password), timeout=SECONDS)
    assert right.status_code == httpx.codes.OK

    url, user, password = logins["Airflow"]
    assert httpx.get(f"{url}/api/v2/dags", timeout=SECONDS).status_code == httpx.codes.UNAUTHORIZED
    wrong = httpx.post(f"{url}/auth/token", json={"username": user, "password": "wrong"}, timeout=SECONDS)
    assert wrong.status_code == httpx.codes.UNAUTHORIZED
    with stack.log_in() as airflow:
        assert airflow.get("/dags").status_code == httpx.codes.OK


def test_metrics_are_those_of_its_ledger(stack: RunningStack) -> None:
    told = httpx.get(stack.description.urls["Metrics"], timeout=SECONDS).text
    assert "virnucpro_ledger_up 1.0" in told
    assert re.search(
        r'virnucpro_worker_info{device="cpu",host="\S+",node="cpu\d+@\S+",queue="extract"} 1.0', told
    )
    assert f'virnucpro_disk_free_bytes{{folder="{stack.settings.output_root}"}}' in told


def test_a_second_stack_in_the_same_folder_is_refused(stack: RunningStack) -> None:
    wait_until_all_run(stack.stack)
    with pytest.raises(ServiceError, match="running already"):
        Stack(stack.settings, stack.stack.folder, gpus="none").start()
    assert set(stack.stack.status().values()) == {"RUNNING"}


def test_commands_find_it(stack: RunningStack) -> None:
    environment: dict[str, str] = {}
    assert use_running_stack(environment, stack.stack.folder)
    assert environment["VIRNUCPRO_OUTPUT_ROOT"] == str(stack.settings.output_root)


def processes_of(folder: Path) -> list[object]:
    """Who has a state folder on the command line or works in it: another stack's come and go meanwhile."""
    return [
        process.info
        for process in psutil.process_iter(["cmdline", "cwd"])
        if str(folder) in " ".join([*(process.info["cmdline"] or []), process.info["cwd"] or ""])
    ]


@pytest.fixture
def broken(near_root: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack that cannot start."""
    monkeypatch.setattr("virnucpro_core.stack.valkey.DATABASES", "no number")
    settings = Settings(
        inbox=near_root / "in", output_root=near_root / "out", model_root=near_root / "models"
    )
    return Stack(settings, near_root / STATE_FOLDER, gpus="none", fixed_ports=False)


def test_one_that_cannot_start_says_why_and_leaves_nothing(broken: Stack) -> None:
    with pytest.raises(ServiceError, match=r"(?s)valkey.*log ends:.*no number"):
        broken.start()
    assert broken.status() == {}
    assert processes_of(broken.folder) == []


def interrupt_up(folder: Path, number: signal.Signals) -> int:
    """Send `virnucpro up` a signal while it waits for the servers; returns its exit code."""
    command = [sys.executable, "-m", "virnucpro_core.cli", "up", "--gpus", "none"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as up:
        assert up.stderr is not None
        said = []
        while "servers" not in "".join(said):
            said.append(up.stderr.readline())
            assert said[-1], f"it ended: {''.join(said)}"
        up.send_signal(number)
        up.stderr.read()
    return up.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_that_is_interrupted_leaves_nothing(number: signal.Signals, near_root: Path) -> None:
    assert interrupt_up(near_root, number) == INTERRUPTED
    assert processes_of(near_root / STATE_FOLDER) == []


def test_what_a_killed_up_leaves_does_not_keep_the_next_from_starting(broken: Stack, near_root: Path) -> None:
    assert interrupt_up(near_root, signal.SIGKILL) == -signal.SIGKILL
    assert processes_of(broken.folder) != []
    with pytest.raises(ServiceError, match=r"(?s)valkey.*log ends:.*no number"):
        broken.start()
    assert processes_of(broken.folder) == []


def test_two_that_start_at_once_do_not_mix(broken: Stack) -> None:
    broken.folder.mkdir()
    with only_starter(broken.folder), pytest.raises(ServiceError, match="being started already"):
        broken.start()
