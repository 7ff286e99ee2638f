"""The whole stack as one thing to start and stop: servers, migrations, workers, relay, Airflow, Flower, metrics."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import httpx
import structlog
from sqlalchemy import Engine, func, select

from virnucpro_core.errors import ServiceError
from virnucpro_core.ledger.database import in_transaction, open_ledger, upgrade
from virnucpro_core.ledger.queries import live_workers
from virnucpro_core.queues import QUEUES
from virnucpro_core.settings import Settings
from virnucpro_core.stack.airflow import COMPONENTS
from virnucpro_core.stack.composition import Composition, compose, provision
from virnucpro_core.stack.description import FILE, STATE_FOLDER, Description
from virnucpro_core.stack.processes import make_private_folder, wait_until
from virnucpro_core.stack.programs import FOLDERS, PROJECT, SERVICES
from virnucpro_core.stack.supervisor import Supervisor

SERVER_SECONDS = 60.0
SERVICE_SECONDS = 240.0  # two slow cores import Airflow four times and torch twice

log = structlog.get_logger()


class Stack:
    """The processes of one state folder.

    Args:
        settings: the pipeline's settings. A server whose URL is set there is not started.
        state_folder: data, secrets, logs; mode 0700, made if missing.
        gpus: which GPUs work: "all" (the CPU, where there is none), "none" or a list such as "0,1".
        fixed_ports: take the well-known ports where they are free; otherwise any free ones.
    """

    def __init__(
        self,
        settings: Settings,
        state_folder: Path = STATE_FOLDER,
        *,
        gpus: str = "all",
        fixed_ports: bool = True,
    ) -> None:
        self.settings = settings
        self.folder = state_folder.absolute()
        self.gpus = gpus
        self.fixed_ports = fixed_ports
        self.supervisor = Supervisor(self.folder)

    def start(self, *, detached: bool = False, on_step: Callable[[str], None] | None = None) -> Description:
        """Start everything, and return when all of it answers.

        Args:
            detached: it outlives this process; otherwise it ends with it, however that ends.
            on_step: told what is being waited for.

        Raises:
            ServiceError: something did not start, or a stack runs or is being started already; nothing new is left
                running.
            SettingsError: the settings name some servers but not all that belong together.
        """
        tell = on_step or (lambda step: log.info("starting", step=step))
        make_private_folder(self.folder)
        with only_starter(self.folder):
            if self.supervisor.is_running():
                if (self.folder / FILE).exists():
                    raise ServiceError(
                        "a stack is running already",
                        where=str(self.folder),
                        todo="Use it (the file `logins` there says where its pages are), or stop it with `make down`.",
                    )
                # It is being stopped, or whoever started it was killed before it was complete.
                tell("once the last one is gone")
                self.supervisor.shutdown()
            return self._start(detached, tell)

    def _start(self, detached: bool, tell: Callable[[str], None]) -> Description:
        (self.folder / FILE).unlink(missing_ok=True)
        for name in FOLDERS:
            getattr(self.settings, name).mkdir(parents=True, exist_ok=True)
        parts = compose(self.settings, self.folder, gpus=self.gpus, fixed_ports=self.fixed_ports)
        self.supervisor.launch(parts.programs, working_folder=PROJECT, detached=detached)
        try:
            tell("servers")
            self._start_servers(parts)
            tell("migrations")
            upgrade(parts.ledger_urls["owner"])
            parts.airflow.migrate(self.supervisor.log_of("airflow-migrate"))
            self._start_services(parts, tell)
            parts.description.write(self.folder)
        except BaseException:
            self.supervisor.shutdown()
            raise
        return parts.description

    def stop(self) -> None:
        """Stop everything; returns when no process is left.

        Raises:
            ServiceError: no stack is running.
        """
        if not self.supervisor.is_running():
            raise ServiceError(
                "no stack runs from this folder",
                where=str(self.folder),
                todo="If one was started elsewhere, run `virnucpro down` in the folder that it was started in.",
            )
        (self.folder / FILE).unlink(missing_ok=True)
        self.supervisor.shutdown()

    def status(self) -> dict[str, str]:
        """Each program's state in supervisord's words; empty if no stack is running."""
        return self.supervisor.states() if self.supervisor.is_running() else {}

    def _start_servers(self, parts: Composition) -> None:
        for name, server in (("postgres", parts.postgres), ("valkey", parts.valkey)):
            if server is not None:
                server.prepare()
                self.supervisor.start(name)
                self._wait(name, server.is_ready, SERVER_SECONDS)
        if parts.postgres is not None:
            provision(parts.postgres)

    def _start_services(self, parts: Composition, tell: Callable[[str], None]) -> None:
        ledger = open_ledger(parts.ledger_urls["worker"])
        try:
            started = in_transaction(ledger, lambda tx: tx.execute(select(func.now())).scalar_one())
            for program in parts.programs:
                if program.group == SERVICES:
                    self.supervisor.start(program.name)
            tell("Airflow")
            for component in COMPONENTS:
                self._wait(component, partial(parts.airflow.is_healthy, component))
            tell("workers")
            self._wait("relay", lambda: self.supervisor.states()["relay"] == "RUNNING")
            self._wait("workers", lambda: has_workers(ledger, started))
            tell("Flower and metrics")
            self._wait("flower", lambda: is_answering(f"{parts.description.urls['Flower']}/healthcheck"))
            self._wait("metrics", lambda: is_answering(parts.description.urls["Metrics"]))
        finally:
            ledger.dispose()

    def _wait(self, program: str, ready: Callable[[], bool], seconds: float = SERVICE_SECONDS) -> None:
        wait_until(
            ready,
            name=program,
            log=self.supervisor.log_of(program),
            seconds=seconds,
            alive=lambda: self.supervisor.is_alive(program),
        )


@contextmanager
def only_starter(folder: Path) -> Iterator[None]:
    """Nobody else starts a stack in a state folder meanwhile: two would write one configuration.

    Raises:
        ServiceError: somebody else does.
    """
    with (folder / "starting").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServiceError(
                "a stack is being started already", where=str(folder), todo="Wait until it is up."
            ) from error
        except OSError as error:  # some clusters' file systems have no locks
            log.warning("file_system_without_locks", folder=str(folder), reason=error.strerror)
        yield


def has_workers(ledger: Engine, since: datetime) -> bool:
    """Whether each queue has a worker that entered the ledger since then."""
    workers = in_transaction(ledger, live_workers)
    return {worker.queue for worker in workers if worker.started_at >= since} >= set(QUEUES)


def is_answering(url: str) -> bool:
    """Whether a page answers without an error."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False
