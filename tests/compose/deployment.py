"""A deployment of docker-compose.yml: a project of its own, in a copy of what a clone has."""

from __future__ import annotations

import json
import os
import re
import shutil
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
GUIDE = PROJECT / "docs" / "operations.md"
IMAGE = "virnucpro-pipeline:compose-test"
NOT_STARTED = {"cli", "worker-gpu", *(f"worker-gpu-{number}" for number in range(1, 8))}  # other profiles
ONE_SHOTS = {"migrate", "airflow-migrate"}
READY_SECONDS = 900.0  # a dozen containers start at once on few cores
POLL_SECONDS = 1.0


@dataclass
class Deployment:
    """Containers, and how to ask them.

    Attributes:
        compose: the beginning of each command.
        folder: what a clone has, with .env, data and secrets.
        variables: of the .env file.
        absent: services that cannot be started here.
    """

    engine: Engine
    compose: Sequence[str]
    folder: Path
    variables: dict[str, str]
    absent: set[str] = field(default_factory=set)

    @classmethod
    def prepare(
        cls, engine: Engine, compose: Sequence[str], folder: Path, absent: set[str], **variables: str
    ) -> Deployment:
        """Copy the project, write the .env file, make secrets and folders."""
        copy_project(folder)
        chosen = {
            "COMPOSE_FILE": "docker-compose.yml:here.yml",
            "COMPOSE_PROFILES": "cpu",
            "VIRNUCPRO_UID": str(os.geteuid() or 1000),
            "VIRNUCPRO_GID": str(os.getegid() or 1000),
            "VIRNUCPRO_IMAGE": IMAGE,
            **{name: str(choose_port()) for name in PORTS},
            **variables,
        }
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in chosen.items()))
        # The machine's package indexes may be reachable on the host's network alone.
        here = {
            "migrate": {"build": {"network": "host"}},
            **{name: {"profiles": ["absent"]} for name in absent},
        }
        (folder / "here.yml").write_text(json.dumps({"services": here}))
        engine.run("make", "secrets", folder=folder)
        return cls(engine, compose, folder, chosen, absent)

    @property
    def project(self) -> str:
        return re.sub("[^a-z0-9]", "", f"virnucpro{self.folder.parent.name}")

    @property
    def backup(self) -> Path:
        """What /backup is in the operator's guide."""
        return self.folder.with_name("backup")

    def run(self, *arguments: str, check: bool = True) -> str:
        """A command of Compose; its output."""
        return self.call(*self.compose, *arguments, check=check)

    def call(self, *command: str, check: bool = True) -> str:
        """A command in the project's folder; its output."""
        done = self.engine.run(*command, check=check, folder=self.folder, COMPOSE_PROJECT_NAME=self.project)
        return done.stdout

    def follow(self, heading: str) -> None:
        """Run the commands that the operator's guide has below a heading, as they stand there."""
        (section,) = re.findall(rf"^##+ {heading} ✓$(.*?)^##", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
        script = "".join(re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE))
        assert script, heading
        script = script.replace("docker compose", " ".join(self.compose)).replace("/backup", str(self.backup))
        self.call("sh", "-euc", script)

    def services(self) -> list[str]:
        """All that run here, the one-shots among them."""
        listed = self.run("config", "--services").split()
        return sorted(set(listed) - self.absent - NOT_STARTED)

    def up(self) -> None:
        self.run("up", "-d")

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

    def checks_well(self, service: str) -> bool:
        """Whether a service's own check of its health succeeds now."""
        kind, *test = self.inspect(service)["Config"]["Healthcheck"]["Test"]
        command = test if kind == "CMD" else ["sh", "-c", *test]
        return (
            self.engine.run("docker", "exec", self.container(service), *command, check=False).returncode == 0
        )

    def wait_healthy(self, services: Sequence[str] = ()) -> None:
        """Return once some services are healthy, or all."""
        waiting = list(services or set(self.services()) - ONE_SHOTS)

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

    def query(self, sql: str, database: str = "virnucpro") -> list[list[str]]:
        """What a database answers to the superuser, whose socket is in PostgreSQL's own container."""
        told = self.engine.run(
            *("docker", "exec", self.container("postgres"), "psql", "--username=postgres", "--no-psqlrc"),
            *("--tuples-only", "--no-align", f"--dbname={database}", f"--command={sql}"),
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


def copy_project(folder: Path) -> None:
    """What a deployment needs of a clone: what the image is built from, and what the operator's guide names."""
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    sources = [line.removeprefix("!") for line in lines if line.startswith("!")]
    names = ["docker-compose.yml", "Dockerfile", ".dockerignore", "Makefile", "deploy", "monitoring"]
    folder.mkdir()
    for name in (*sources, *names):
        if (PROJECT / name).is_dir():
            shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(PROJECT / name, folder / name)
