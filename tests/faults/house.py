"""The house that is set on fire: servers, relay and workers as real processes, on a job of a hundred chunks."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import redis
import torch
from sqlalchemy import Row, text

from tests.faults import traps
from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.errors import ServiceError
from virnucpro_core.features.merging import NUCLEOTIDE_WIDTH
from virnucpro_core.ledger.database import in_transaction, open_ledger, upgrade
from virnucpro_core.ledger.queries import get_job, live_workers, submissions_of
from virnucpro_core.ledger.submissions import submit_file
from virnucpro_core.models import register_checkpoint
from virnucpro_core.settings import PREFIX, Settings
from virnucpro_core.stack.postgres import PostgresServer
from virnucpro_core.stack.processes import Secrets, ServerProcess, choose_port, read_tail, tied_to_parent
from virnucpro_core.stack.programs import PROJECT
from virnucpro_core.stack.valkey import ValkeyServer

T = TypeVar("T")

HOOKS = Path(__file__).with_name("hooks")
MODEL = "tiny"
RECORDS, CHUNK_TOKENS = 240, 50  # two or three records a chunk
CLOCK_OFF = 3600  # seconds by which the second worker's clock is wrong, always
POLL_SECONDS = 0.03
PATIENCE = 120.0  # seconds that anything may take

QUICK = {
    "lease_seconds": 3.0,
    "heartbeat_seconds": 0.5,
    "stuck_seconds": 4.0,
    "republish_seconds": 2.0,
    "max_attempts": 50,  # how often a disk may refuse is not what is tried here
}

LAUNCHERS = {"a": "extract,finish", "b": "extract"}
NODES = 3

AUDIT = """
    CREATE TABLE commits (chunk_id bigint, at timestamptz DEFAULT clock_timestamp());
    CREATE FUNCTION note_commit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        IF NEW.state = 'done' THEN
            INSERT INTO public.commits VALUES (NEW.id);
        ELSIF OLD.state = 'done' THEN  -- its artifact was lost
            DELETE FROM public.commits WHERE chunk_id = NEW.id;
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER note_commit AFTER UPDATE ON chunks FOR EACH ROW EXECUTE FUNCTION note_commit();
"""
"""Every commit of a chunk leaves a row, whatever the ledger thinks of it."""


class HouseError(AssertionError):
    """Something did not happen in time; carries the ends of the logs."""


class House:
    """Servers, relay and workers below one folder.

    Args:
        folder: everything goes there.
        unfenced: the workers' fencing is switched off (the control).
        settings: in place of the quick ones.
    """

    def __init__(self, folder: Path, *, unfenced: bool = False, **settings: Any) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.logs = folder / "logs"
        self.traps = folder / "traps"
        for made in (self.logs, self.traps, folder / "inbox"):
            made.mkdir(parents=True)
        secrets = Secrets(folder / "secrets")
        # What PostgreSQL has committed must survive its own death, not the machine's.
        self.postgres = PostgresServer(folder / "postgres", choose_port(), secrets, {"fsync": "off"})
        self.valkey = ValkeyServer(folder / "valkey", choose_port(), secrets)
        self.postgres.prepare()
        self.valkey.prepare()
        self.database = self.postgres.process(self.logs / "postgres.log")
        self.broker = self.valkey.process(self.logs / "valkey.log")
        self.urls = self.postgres.ledger_urls("virnucpro")
        self.settings = Settings(
            database_url=self.urls["owner"],
            broker_url=self.valkey.url(),
            inbox=folder / "inbox",
            output_root=folder / "output",
            model_root=folder / "models",
            dtype="float32",
            chunk_tokens=CHUNK_TOKENS,
            model=MODEL,
            **QUICK | settings,
        )
        self.input = self.settings.inbox / "chaos.fasta"
        self.nucleotides = self.settings.inbox / "chaos_DNABERT_S.pt"
        self.output = self.settings.output_root
        self.ledger = open_ledger(self.urls["owner"])
        self.environment = self._environment(unfenced)
        self.relay = self._service("relay", "workers.relay")
        self.launchers = {
            name: self._service(f"launcher-{name}", "workers.launcher", "--gpus", "none", "--queues", queues)
            for name, queues in LAUNCHERS.items()
        }
        self.launchers["b"].environment["CHAOS_CLOCK"] = str(CLOCK_OFF)

    def _environment(self, unfenced: bool) -> dict[str, str]:
        plain = self.settings.model_fields_set - {"database_url", "broker_url"}
        values = self.settings.model_dump(include=plain)
        own = {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items()}
        own |= {
            f"{PREFIX}WORKER_DATABASE_URL": self.urls["worker"],
            f"{PREFIX}BROKER_URL": self.valkey.url(),
            "PYTHONPATH": os.pathsep.join(
                [str(HOOKS), str(PROJECT), *filter(None, [os.getenv("PYTHONPATH")])]
            ),
            "OMP_NUM_THREADS": "1",
            traps.FOLDER: str(self.traps),
        }
        return os.environ | own | ({traps.UNFENCED: "yes"} if unfenced else {})

    def _service(self, name: str, module: str, *arguments: str) -> ServerProcess:
        return ServerProcess(
            name,
            tied_to_parent([sys.executable, "-m", module, *arguments]),
            log=self.logs / f"{name}.log",
            environment=dict(self.environment),
        )

    # What is started, and found.

    def start(self) -> None:
        """Start all of it, with a registered model."""
        self.start_database()
        self.start_broker()
        upgrade(self.postgres.create_ledger_database("virnucpro")["owner"])
        checkpoint = write_demo_weights(self.settings.model_root / MODEL, layers=1)
        in_transaction(self.ledger, register_checkpoint, MODEL, checkpoint, self.settings.model_root)
        in_transaction(self.ledger, lambda tx: tx.execute(text(AUDIT)))
        self.write_input()
        self.start_services()

    def start_database(self) -> None:
        if self.database.process is None:
            self.database.start(self.postgres.is_ready)

    def start_broker(self) -> None:
        if self.broker.process is None:
            self.broker.start(self.valkey.is_ready)

    def start_services(self) -> None:
        """Start relay and launchers, those that do not run."""
        for service in (self.relay, *self.launchers.values()):
            if service.process is None or service.process.poll() is not None:
                service.start(lambda: True)

    def start_failed(self) -> None:
        """Start again what ended with an error, as supervisord and the container engine do."""
        for service in (self.relay, *self.launchers.values()):
            if service.process is not None and service.process.poll() not in (None, 0):
                service.start(lambda: True)

    def stop(self) -> None:
        """Stop all of it, the servers last."""
        for service in (*self.launchers.values(), self.relay, self.broker, self.database):
            service.stop()
        self.ledger.dispose()

    def wait_until(self, look: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
        """What `look` returns once it is something; a database that is away says nothing."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                seen = look()
            except ServiceError:
                seen = None
            if seen:
                return seen
            if time.monotonic() > deadline:
                ends = "\n".join(
                    f"--- {log.name}\n{read_tail(log, 30)}" for log in sorted(self.logs.glob("*.log"))
                )
                raise HouseError(f"{what}: not within {seconds} s\n{ends}")
            time.sleep(POLL_SECONDS)

    def rows(self, query: str, **parameters: object) -> list[Row[Any]]:
        """What a query of the ledger returns."""
        return in_transaction(self.ledger, lambda tx: list(tx.execute(text(query), parameters).all()))

    def live(self) -> list[Row[Any]]:
        """The live workers, whose processes exist."""
        return [
            row for row in in_transaction(self.ledger, live_workers) if is_running(row.pid, row.started_at)
        ]

    def wait_for_workers(self) -> None:
        # One that was started while the database was away may end only now.
        self.wait_until(lambda: self.start_failed() or len(self.live()) == NODES, "all workers are live")

    def child(self, launcher: str, queue: str = "extract") -> psutil.Process | None:
        """The Celery child that takes a queue's messages for a launcher."""
        parent = self.parent(launcher, queue)
        try:
            children = parent.children() if parent else []
        except psutil.NoSuchProcess:
            return None
        return children[0] if children else None

    def parent(self, launcher: str, queue: str = "extract") -> psutil.Process | None:
        """The Celery node itself."""
        service = self.launchers[launcher].process
        try:
            nodes = psutil.Process(service.pid).children() if service else []
            return next((node for node in nodes if f"-Q {queue} " in " ".join(node.cmdline())), None)
        except psutil.NoSuchProcess:
            return None

    # What is asked of it.

    def write_input(self) -> None:
        """A FASTA file of short proteins, some of them bad, and their nucleotides' embeddings; always the same."""
        draw = random.Random(0)
        records, entries = [], []
        for k in range(RECORDS):
            protein = "".join(draw.choices("ACDEFGHIKLMNPQRSTVWY", k=draw.randint(5, 30)))
            records.append(f">p{k}\n{'MKV1' if k % 40 == 7 else protein}\n")
            entries.append({"label": f"p{k}", "mean_representation": [draw.random()] * NUCLEOTIDE_WIDTH})
        self.input.write_text("".join(records))
        torch.save({"nucleotide": [entry["label"] for entry in entries], "data": entries}, self.nucleotides)

    def submit(self, *, force: bool = False) -> int:
        """Register the input; returns the job's id."""
        return submit_file(
            self.ledger,
            self.input,
            settings=self.settings,
            requested_by="chaos",
            nucleotides=self.nucleotides,
            label="viral",
            max_failed_share=1,
            force=force,
        ).job_id

    def job(self, job_id: int) -> Row[Any]:
        return in_transaction(self.ledger, get_job, job_id)

    def published(self, job_id: int) -> Path:
        """The folder of a job's published result."""
        job = self.job(job_id)
        (submission,) = in_transaction(self.ledger, submissions_of, job_id)
        return self.output / submission.folder(job.input_sha256, job.recipe_sha256)

    def read_published(self, job_id: int) -> dict[str, bytes]:
        """The bytes of the published embeddings, merged features and failures."""
        return {
            path.name: path.read_bytes()
            for path in sorted(self.published(job_id).iterdir())
            if path.suffix in (".pt", ".jsonl")
        }

    def read_logs(self) -> str:
        """All that relay and workers have logged."""
        return "".join(log.read_text() for log in sorted(self.logs.glob("*.log")))

    def lay(self, queue: str, step: str, action: str) -> None:
        """Lay a trap; the first child of the queue that comes to the step is its victim."""
        draft = self.traps / "draft"
        draft.write_text(action)
        draft.rename(self.traps / f"{queue}.{step}.{next(self.numbers):06d}")

    def wake_the_stopped(self, *, now: bool = False) -> None:
        """Have those that a trap stopped go on, once their leases have surely run out, or now."""
        for sprung in self.traps.glob("sprung-*"):
            slept = time.time() - sprung.stat().st_ctime
            if sprung.read_text() == "stop" and (now or slept > 1.5 * self.settings.lease_seconds):
                pid = int(sprung.name.split("-")[1])
                # One that is about to stop would never be woken.
                self.wait_until(partial(traps.has_stopped, pid), "a child stops")
                sprung.unlink()
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def remove_traps(self) -> None:
        """Take away what is laid, and then wake all that a trap stopped."""
        for path in self.traps.iterdir():
            if not path.name.startswith("sprung-"):
                path.unlink(missing_ok=True)
        self.wake_the_stopped(now=True)
        for path in self.traps.iterdir():
            path.unlink(missing_ok=True)

    def connect_broker(self) -> redis.Redis:
        return redis.Redis.from_url(self.valkey.url(), socket_timeout=5)


def is_running(pid: int, since: datetime | None = None) -> bool:
    """Whether a process exists; a zombie, whom only its parent can remove, does not.

    Args:
        since: when it is known to have run. One that began later has only got its number.
    """
    try:
        process = psutil.Process(pid)
        began = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and (since is None or began <= since.timestamp())
    except psutil.NoSuchProcess:
        return False


def send(process: psutil.Process | None, number: signal.Signals) -> None:
    """Send a signal, if there is still anyone to get it."""
    if process is not None:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return


@contextmanager
def running_house(folder: Path, **options: Any) -> Iterator[House]:
    """A house that is started, and stopped in the end with all that was done to it undone."""
    house = House(folder, **options)
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder / "output", ignore_errors=True)
        cleanup.callback(house.stop)
        house.start()
        house.wait_for_workers()
        yield house
