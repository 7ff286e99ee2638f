"""The whole stack as a person starts and meets it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import RunningStack
from virnucpro_core.errors import ServiceError
from virnucpro_core.settings import Settings
from virnucpro_core.stack.description import use_running_stack
from virnucpro_core.stack.stack import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def family_of(stack: Stack) -> list[psutil.Process]:
    supervisord = psutil.Process(int((stack.folder / "supervisord.pid").read_text()))
    return [supervisord, *supervisord.children(recursive=True)]


def test_every_program_runs(stack: RunningStack) -> None:
    states = stack.stack.status()
    assert set(states.values()) == {"RUNNING"}
    assert set(states) == {
        *("postgres", "valkey", "workers", "relay", "flower"),
        *("api-server", "scheduler", "dag-processor", "triggerer"),
    }


def test_all_of_it_listens_on_loopback_alone(stack: RunningStack) -> None:
    addresses = {
        connection.laddr.ip
        for process in family_of(stack.stack)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_no_secret_is_in_an_argument_list_or_an_environment(stack: RunningStack) -> None:
    secrets = [file.read_text() for file in (stack.stack.folder / "secrets").iterdir()]
    shown = [
        text
        for process in family_of(stack.stack)
        for text in (*process.cmdline(), *process.environ().values())
    ]
    assert not [text for text in shown for secret in secrets if secret in text]


def test_secrets_are_in_files_of_their_owner_alone(stack: RunningStack) -> None:
    folder = stack.stack.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    passwords = [file.read_text() for file in (folder / "secrets").iterdir()]
    for file in folder.rglob("*"):
        if file.is_file() and "postgres/data" not in str(file):
            content = file.read_bytes()
            if any(password.encode() in content for password in passwords):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_pages_want_the_login_that_was_generated(stack: RunningStack) -> None:
    login = re.compile(r"^(\w+)\s+(http://\S+)\s+user (\S+)\s+password (\S+)$", re.MULTILINE)
    logins = {name: rest for name, *rest in login.findall(Path(stack.description.logins).read_text())}
    assert set(logins) == {"Airflow", "Flower"}

    url, user, password = logins["Flower"]
    assert httpx.get(f"{url}/workers").status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(f"{url}/workers", auth=(user, password)).status_code == httpx.codes.OK

    url, user, password = logins["Airflow"]
    assert httpx.get(f"{url}/api/v2/dags").status_code == httpx.codes.UNAUTHORIZED
    wrong = httpx.post(f"{url}/auth/token", json={"username": user, "password": "wrong"})
    assert wrong.status_code == httpx.codes.UNAUTHORIZED
    with stack.log_in() as airflow:
        assert airflow.get("/dags").status_code == httpx.codes.OK


def test_a_second_stack_in_the_same_folder_is_refused(stack: RunningStack) -> None:
    with pytest.raises(ServiceError, match="running already"):
        Stack(stack.settings, stack.stack.folder, gpus="none").start()
    assert set(stack.stack.status().values()) == {"RUNNING"}


def test_commands_find_it(stack: RunningStack) -> None:
    environment: dict[str, str] = {}
    assert use_running_stack(environment, stack.stack.folder)
    assert environment["VIRNUCPRO_OUTPUT_ROOT"] == str(stack.settings.output_root)


def test_one_that_cannot_start_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virnucpro_core.stack.valkey.DATABASES", "no number")
    settings = Settings(inbox=tmp_path / "in", output_root=tmp_path / "out", model_root=tmp_path / "models")
    broken = Stack(settings, tmp_path / "state", gpus="none", fixed_ports=False)
    before = set(psutil.Process(os.getpid()).children(recursive=True))
    with pytest.raises(ServiceError, match=r"(?s)valkey.*log ends:.*no number"):
        broken.start()
    assert broken.status() == {}
    after = set(psutil.Process(os.getpid()).children(recursive=True))
    assert [process for process in after - before if process.status() != psutil.STATUS_ZOMBIE] == []
