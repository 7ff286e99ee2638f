"""docker-compose.yml, .env.example and the secrets fit together."""

from __future__ import annotations

import json
import re
import runpy
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from virnucpro_core.settings import PREFIX, Settings

pytestmark = pytest.mark.unit

PROJECT = Path(__file__).resolve().parents[2]
NOT_OURS = {"postgres", "broker", "prometheus", "grafana"}
ONE_SHOTS = {"migrate", "airflow-migrate", "cli"}


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    """docker-compose.yml with its anchors resolved."""
    loaded: dict[str, Any] = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def maker() -> dict[str, Any]:
    """What deploy/make_secrets.py defines."""
    return runpy.run_path(str(PROJECT / "deploy" / "make_secrets.py"))


def test_every_setting_reaches_the_containers(file: dict[str, Any]) -> None:
    """Those with a URL in them are secrets, and come from files."""
    plain = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields if not name.endswith("_url")}
    for service in ("worker-gpu", "worker-cpu", "finish", "relay", "scheduler", "cli"):
        environment = file["services"][service]["environment"]
        assert plain - set(environment) == set(), service
        unknown = {
            name for name in environment if name.startswith(PREFIX) and not name.endswith("_FILE")
        } - plain
        assert unknown == set(), service


def test_every_variable_is_explained(file: dict[str, Any]) -> None:
    used = set()
    for path in (PROJECT / "docker-compose.yml", *(PROJECT / "deploy").glob("*.yml")):
        used |= set(re.findall(r"(?<!\$)\$\{(\w+)", path.read_text()))
    used |= {name for name, value in file["x-settings"].items() if value is None} | {"OMP_NUM_THREADS"}
    lines = (PROJECT / ".env.example").read_text().splitlines()
    explained = {
        match[1]: place for place, line in enumerate(lines) if (match := re.match(r"#?([A-Z_0-9]+)=", line))
    }
    assert used | {"COMPOSE_PROFILES", "COMPOSE_FILE"} == set(explained)


def test_defaults_are_those_that_are_shown(file: dict[str, Any]) -> None:
    shown = dict(re.findall(r"^([A-Z_0-9]+)=(.*)$", (PROJECT / ".env.example").read_text(), re.MULTILINE))
    text = (PROJECT / "docker-compose.yml").read_text()
    for name, default in re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", text):
        assert shown.get(name, "") == default, name
    for name in file["x-settings"]:
        field = Settings.model_fields[name.removeprefix(PREFIX).lower()]
        if name in shown and field.default is not None:
            assert (
                type(field.default)(shown[name]) == field.default or shown[name] == str(field.default).lower()
            )


def test_every_service_has_what_keeps_it_running(file: dict[str, Any]) -> None:
    for name, service in file["services"].items():
        if name in ONE_SHOTS:
            assert service["restart"] == "no", name
            continue
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
    for name in set(file["services"]) - NOT_OURS:
        assert file["services"][name]["cap_drop"] == ["ALL"], name


def test_a_gpu_host_starts_workers_alone(file: dict[str, Any]) -> None:
    """All that has no profile would be started by a plain `up -d`."""
    there = yaml.safe_load((PROJECT / "deploy" / "gpu-host.yml").read_text())["services"]
    workers = {name for name in file["services"] if name.startswith(("worker-gpu", "worker-cpu"))}
    assert {name for name, service in there.items() if "extra_hosts" in service} == workers
    started = {name for name, service in file["services"].items() if "profiles" not in service}
    assert {name for name, service in there.items() if service == {"deploy": {"replicas": 0}}} == started


def test_each_gpu_has_a_service_a_profile_and_a_variable(file: dict[str, Any]) -> None:
    for number in range(8):
        suffix = f"-{number}" if number else ""
        service = file["services"][f"worker-gpu{suffix}"]
        assert service["profiles"] == [f"gpu{suffix}"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {
            "driver": "nvidia",
            "device_ids": [f"${{GPU_{number}:-{number}}}"],
            "capabilities": ["gpu"],
        }


def test_ledger_knows_each_worker_by_a_name_that_stays(file: dict[str, Any]) -> None:
    """A container's id is another after each `up`; a health check is about the nodes of one host name."""
    workers = {
        name: service for name, service in file["services"].items() if "worker" in service.get("command", [])
    }
    names = [service["hostname"] for service in workers.values()]
    assert len(set(names)) == len(workers) == 10
    assert all(name.startswith("${WORKER_HOST:-main}-") for name in names)
    there = yaml.safe_load((PROJECT / "deploy" / "gpu-host.yml").read_text())["services"]
    elsewhere = {name: service["hostname"] for name, service in there.items() if "hostname" in service}
    assert set(elsewhere) == set(workers) - {"finish"}
    for name, hostname in elsewhere.items():
        own = re.sub(r"\$\{WORKER_HOST:\?[^}]+\}", "${WORKER_HOST:-main}", hostname)
        assert own == workers[name]["hostname"], "no default: it would be the main host's"


def test_who_gets_which_secret(file: dict[str, Any]) -> None:
    """A role's URL is where the role works, and nowhere else."""
    holders: dict[str, set[str]] = {}
    for name, service in file["services"].items():
        for secret in service.get("secrets", []):
            holders.setdefault(secret, set()).add(name)
    gpus = {f"worker-gpu-{number}" for number in range(1, 8)}
    workers = {"worker-gpu", *gpus, "worker-cpu", "finish", "relay"}
    airflow = {"airflow-migrate", "api-server", "scheduler", "dag-processor", "triggerer"}
    assert holders["owner_database_url"] == {"migrate", "cli"}
    assert holders["worker_database_url"] == workers
    assert holders["broker_url"] == workers | {"flower"}
    assert holders["dag_database_url"] == airflow | {"cli", "metrics"}
    assert holders["airflow_database_url"] == airflow
    assert holders["postgres_password"] == {"postgres"}
    assert set(holders) == set(file["secrets"])


def test_secrets_are_made_once_and_rotated_in_place(
    file: dict[str, Any], maker: dict[str, Any], tmp_path: Path
) -> None:
    folder, user = tmp_path / "secrets", (1000, 1000)
    written = maker["make_secrets"](folder, user, [])
    assert {Path(secret["file"]).name for secret in file["secrets"].values()} == set(written)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before = {path.name: (path.read_text(), path.stat().st_ino) for path in folder.iterdir()}
    assert maker["make_secrets"](folder, user, []) == []
    # Whoever was stopped by a full disk left a file without a password in it.
    (folder / "airflow_jwt_key").write_text("")
    assert maker["make_secrets"](folder, user, []) == ["airflow_jwt_key"]
    before["airflow_jwt_key"] = ((folder / "airflow_jwt_key").read_text(), before["airflow_jwt_key"][1])
    assert len(before["airflow_jwt_key"][0]) == 64

    assert set(maker["make_secrets"](folder, user, ["worker"])) == {"worker_password", "worker_database_url"}
    after = {path.name: (path.read_text(), path.stat().st_ino) for path in folder.iterdir()}
    changed = {name for name in after if after[name][0] != before[name][0]}
    assert changed == {"worker_password", "worker_database_url"}
    assert after["worker_password"][0] in after["worker_database_url"][0]
    # A file that is replaced would leave a running container with the old one.
    assert {name: inode for name, (_, inode) in after.items()} == {
        name: inode for name, (_, inode) in before.items()
    }

    maker["make_secrets"](folder, user, ["all", "worker"])
    same = {name for name, (text, _) in after.items() if (folder / name).read_text() == text}
    assert same == {"airflow_fernet_key"}
    assert len(json.loads((folder / "airflow_logins.json").read_text())["admin"]) == 64


def test_every_secret_belongs_to_a_group_that_can_be_rotated(maker: dict[str, Any]) -> None:
    grouped = [file for files in maker["PASSWORDS"].values() for file in files]
    assert sorted(grouped) == sorted(maker["make_contents"](str))


def test_what_an_old_fernet_key_hides_can_be_read_until_it_is_dropped(
    maker: dict[str, Any], tmp_path: Path
) -> None:
    folder, user, key = tmp_path / "secrets", (1000, 1000), tmp_path / "secrets" / "airflow_fernet_key"
    maker["make_secrets"](folder, user, [])
    old = key.read_text()
    inode = key.stat().st_ino
    assert maker["make_secrets"](folder, user, ["fernet"]) == [key.name]
    new, kept = key.read_text().split(",")
    assert kept == old != new
    maker["drop_old_keys"](folder, user)
    assert key.read_text() == new
    assert key.stat().st_ino == inode


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("INPUT_FOLDER=./a", "./a"),
        ("INPUT_FOLDER = ./a b  # where they come from", "./a b"),
        ("INPUT_FOLDER=./a#b", "./a#b"),
        ("INPUT_FOLDER=", ""),
        ("export INPUT_FOLDER='./a # $b'  # quoted", "./a # $b"),
        ('INPUT_FOLDER="./a # b"', "./a # b"),
        ("INPUT_FOLDER=${ROOT_FOLDER}/a$NOBODY", "/home/me/a"),
        ('INPUT_FOLDER="$ROOT_FOLDER/a"', "/home/me/a"),
    ],
)
def test_variables_are_read_as_compose_reads_them(
    maker: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, value: str
) -> None:
    monkeypatch.delenv("INPUT_FOLDER", raising=False)
    monkeypatch.setenv("GPU_0", "7")
    file = tmp_path / ".env"
    file.write_text(f"# INPUT_FOLDER=no\nROOT_FOLDER=/home/me\nGPU_0=1\n{line}\n")
    found = maker["read_variables"](file)
    assert (found["INPUT_FOLDER"], found["GPU_0"]) == (value, "7")


def test_folders_are_found_as_compose_finds_them(
    maker: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = [maker["find_folder"]({"INPUT_FOLDER": name}, "INPUT_FOLDER", "a") for name in ("", "/b", "~/c")]
    assert found == [PROJECT / "a", Path("/b"), Path("/home/me/c")]
