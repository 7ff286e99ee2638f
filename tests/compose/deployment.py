"""A deployment of docker-compose.yml as a project of its own, in folders of its own."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.compose.engine import Engine
from tests.compose.images import PROJECT
from virnucpro_core.stack.airflow import log_in
from virnucpro_core.stack.processes import choose_port

PORTS = ("AIRFLOW_PORT", "FLOWER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
NOT_STARTED = {"worker-gpu", "cli"}  # of the profiles gpu and tools
ONE_SHOTS = {"migrate", "airflow-migrate"}
READY_SECONDS = 900.0  # a dozen containers start at once on few cores
POLL_SECONDS = 1.0


@dataclass
class Deployment:
    """Containers, and how to ask them.

    Attributes:
        folder: holds the data folders and the secrets.
        variables: of the .env file.
        compose: the beginning of each command.
        absent: services that cannot be started here.
    """

    engine: Engine
    folder: Path
    variables: dict[str, str]
    compose: Sequence[str]
    absent: set[str] = field(default_factory=set)

    @classmethod
    def prepare(
        cls, engine: Engine, compose: Sequence[str], folder: Path, absent: set[str], **variables: str
    ) -> Deployment:
        """Write the .env file, and make the secrets and folders as `make secrets` does."""
        user = os.geteuid() or 1000
        chosen = {
            "COMPOSE_PROFILES": "cpu",
            "VIRNUCPRO_UID": str(user),
            "VIRNUCPRO_GID": str(os.getegid() or 1000),
            "SECRETS_FOLDER": str(folder / "secrets"),
            "INPUT_FOLDER": str(folder / "input"),
            "OUTPUT_FOLDER": str(folder / "output"),
            "MODELS_FOLDER": str(folder / "models"),
            **{name: str(choose_port()) for name in PORTS},
            **variables,
        }
        environment = folder / "env"
        environment.write_text("".join(f"{name}={value}\n" for name, value in chosen.items()))
        engine.run(sys.executable, str(PROJECT / "deploy" / "make_secrets.py"), **chosen)
        name = re.sub("[^a-z0-9]", "", f"virnucpro{folder.name}")
        files = [
            "--project-name",
            name,
            "--env-file",
            str(environment),
            "--file",
            str(PROJECT / "docker-compose.yml"),
        ]
        return cls(engine, folder, chosen, [*compose, *files], absent)

    def run(self, *arguments: str, check: bool = True) -> str:
        """A command of Compose; its output."""
        return self.engine.run(*self.compose, *arguments, check=check, folder=PROJECT).stdout

    def services(self) -> list[str]:
        """All that run here, the one-shots among them."""
        listed = self.run("config", "--services").split()
        return sorted(set(listed) - self.absent - NOT_STARTED)

    def up(self) -> None:
        self.run("up", "-d", *self.services())

    def container(self, service: str) -> str:
        return self.run("ps", "-a", "-q", service).split()[0]

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says of a service's container."""
        done = self.engine.run("docker", "inspect", self.container(service))
        found: dict[str, Any] = json.loads(done.stdout)[0]
        return found

    def health(self, service: str) -> str:
        """`healthy`, `unhealthy`, `starting`, or the container's state where nothing checks its health."""
        state = self.inspect(service)["State"]
        return str(state.get("Health", state)["Status"])

    def wait_healthy(self, services: Sequence[str]) -> None:
        waiting = list(services)

        def all_healthy() -> bool:
            waiting[:] = [service for service in waiting if self.health(service) != "healthy"]
            return not waiting

        self.wait_until(all_healthy, "healthy", waiting)

    def wait_until(self, look: Callable[[], bool], what: str, services: Sequence[str] = ()) -> None:
        """Return once `look` is true; fails with what `services` have logged."""
        deadline = time.monotonic() + READY_SECONDS
        while not look():
            if time.monotonic() > deadline:
                logs = "\n".join(self.run("logs", "--tail=30", service) for service in services)
                checks = [self.inspect(service)["State"].get("Health") for service in services]
                pytest.fail(f"not {what} within {READY_SECONDS:.0f} s: {list(services)}\n{checks}\n{logs}")
            time.sleep(POLL_SECONDS)

    def command(self, *arguments: str) -> str:
        """A `virnucpro` command in a container of its own; its output."""
        return self.run("run", "--rm", "-T", "--no-deps", "cli", *arguments)

    def ask(self, *arguments: str) -> Any:
        """A `virnucpro … --json` command in a container of its own; its document."""
        said = self.command("virnucpro", *arguments, "--json")
        start = re.search(r"^[\[{]", said, re.MULTILINE)
        assert start, said
        return json.JSONDecoder().raw_decode(said[start.start() :])[0]

    def query(self, sql: str) -> list[list[str]]:
        """What the ledger answers to the superuser, whose socket is in PostgreSQL's own container."""
        told = self.engine.run(
            *("docker", "exec", self.container("postgres"), "psql", "--username=postgres", "--no-psqlrc"),
            *("--tuples-only", "--no-align", "--dbname=virnucpro", f"--command={sql}"),
        ).stdout
        return [line.split("|") for line in told.splitlines() if line]

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text()

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.variables[port]}"

    def airflow(self) -> httpx.Client:
        """A client of Airflow's REST API, logged in with the generated password."""
        return log_in(self.url("AIRFLOW_PORT"), json.loads(self.secret("airflow_logins.json"))["admin"])

    def down(self) -> None:
        """Remove containers, networks and volumes."""
        self.run("down", "--volumes", "--remove-orphans", "--timeout", "10", check=False)
