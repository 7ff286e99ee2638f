"""A Docker engine: the one that is there, or one of the test's own.

Ours keeps its images below `build`, and leaves its bridge and packet filter rules to the next, as every engine does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from virnucpro_core.stack.processes import ServerProcess

STATE = Path(__file__).resolve().parents[2] / "build" / "compose-test"
"""Where an engine of our own keeps its images, so that a second run need not build them again."""

COMMAND_SECONDS = 3600


def give_up(reason: str) -> NoReturn:
    """Skip the test; fail it if MUST_RUN says that it is the purpose of this run."""
    if "MUST_RUN" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass(frozen=True)
class Engine:
    """How to reach a Docker engine; `host` is None for the one that the `docker` command finds by itself."""

    host: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For commands: nothing of ours that Compose would take for a variable."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
        return kept | ({"DOCKER_HOST": self.host} if self.host else {})

    def run(
        self, *command: str, check: bool = True, folder: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; fails the test with its output if it fails."""
        done = subprocess.run(
            command,
            env=self.environment | more,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-8000:]}")
        return done

    def answers(self) -> bool:
        return self.run("docker", "version", check=False).returncode == 0

    def has_image(self, name: str) -> bool:
        return self.run("docker", "image", "inspect", name, check=False).returncode == 0

    def build(self, tag: str, folder: Path, *arguments: str) -> None:
        """Build an image on the host's network: the machine's package indexes may be reachable only there."""
        nice = ["nice", "-n", "10"] if shutil.which("nice") else []
        self.run(*nice, "docker", "build", "--network", "host", "--tag", tag, *arguments, str(folder))


def find_compose(engine: Engine) -> Sequence[str]:
    """Compose v2 if it is there, else docker-compose; $COMPOSE says otherwise."""
    if "COMPOSE" in os.environ:
        return os.environ["COMPOSE"].split()
    if engine.run("docker", "compose", "version", check=False).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    give_up("neither `docker compose` nor docker-compose is there")


@contextmanager
def running_engine() -> Iterator[Engine]:
    """An engine; one of our own is stopped again, its images are kept below `build`."""
    if shutil.which("docker") is None:
        give_up("the `docker` command is not there")
    found = Engine()
    if found.answers():
        yield found
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        give_up("no Docker engine answers, and only root can start one")
    STATE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="docker-") as folder:  # a socket's path must be short
        own = Engine(f"unix://{folder}/docker.sock")
        arguments = [
            "--host",
            str(own.host),
            "--data-root",
            str(STATE / "docker"),
            "--exec-root",
            f"{folder}/exec",
        ]
        command = ["dockerd", *arguments, "--pidfile", f"{folder}/docker.pid"]
        with ServerProcess(
            "Docker", command, log=STATE / "dockerd.log", stop_signal=signal.SIGTERM
        ) as process:
            process.start(own.answers, seconds=60)
            yield own
        unmount_below(folder)


def unmount_below(folder: str) -> None:
    """What an engine leaves mounted when it ends: the network namespace of the host."""
    for line in Path("/proc/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", place], check=True)
