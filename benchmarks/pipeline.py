"""A whole pipeline for a benchmark: its own ledger, broker and relay, and workers that come and go."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Row, text

from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.errors import ExecutionError
from virnucpro_core.ledger.database import in_transaction, open_ledger, upgrade
from virnucpro_core.ledger.queries import artifacts_of, get_job, live_workers
from virnucpro_core.ledger.submissions import submit_file
from virnucpro_core.ledger.transitions import EXTRACT
from virnucpro_core.models import register_checkpoint
from virnucpro_core.settings import load_settings
from virnucpro_core.stack.postgres import PostgresServer
from virnucpro_core.stack.processes import Secrets, ServerProcess, choose_port, read_tail, wait_until
from virnucpro_core.stack.valkey import ValkeyServer

MODEL = "demonstration"
START_SECONDS = 90.0  # for workers to be live
JOB_SECONDS = 120.0  # for a job to end, its model loaded or not

EXTRACTED = text("""
    SELECT c.worker_id, w.device, c.residues, c.attempts, c.seconds,
           extract(epoch FROM c.claimed_at)::float8 AS claimed, extract(epoch FROM c.finished_at)::float8 AS finished
      FROM chunks c JOIN workers w ON w.id = c.worker_id
     WHERE c.job_id = :job AND c.stage = :stage ORDER BY c.claimed_at
""")


@dataclass(frozen=True, slots=True)
class Workers:
    """Launchers that run, and the log that they and their nodes write."""

    launchers: Sequence[ServerProcess]
    log: Path

    def alive(self) -> bool:
        """Whether all of them still run."""
        return all(each.process is not None and each.process.poll() is None for each in self.launchers)

    def stop(self) -> None:
        """Stop them; returns when they are gone."""
        for launcher in self.launchers:
            launcher.stop()


class Pipeline:
    """Servers, relay and a demonstration model, in a folder of its own.

    Args:
        folder: where all of it lies; the model is `folder/models/MODEL`.
        layers: of the model.
        dtype: of the forward pass.
        stack: stops all that is started.
    """

    def __init__(self, folder: Path, stack: ExitStack, *, layers: int, dtype: str) -> None:
        self.folder = folder
        self.stack = stack
        secrets = Secrets(folder / "secrets")
        postgres = PostgresServer(folder / "postgres", choose_port(), secrets)
        valkey = ValkeyServer(folder / "valkey", choose_port(), secrets)
        for server, log in ((postgres, "postgres.log"), (valkey, "valkey.log")):
            server.prepare()
            stack.enter_context(server.process(folder / log)).start(server.is_ready)
        urls = postgres.create_ledger_database()
        upgrade(urls["owner"])
        os.environ |= {
            "VIRNUCPRO_DAG_DATABASE_URL": urls["dag"],
            "VIRNUCPRO_WORKER_DATABASE_URL": urls["worker"],
            "VIRNUCPRO_BROKER_URL": valkey.url(),
            "VIRNUCPRO_INPUT_ROOTS": str(folder),
            "VIRNUCPRO_OUTPUT_ROOT": str(folder / "output"),
            "VIRNUCPRO_MODEL_ROOT": str(folder / "models"),
            "VIRNUCPRO_DTYPE": dtype,
        }
        load_settings.cache_clear()
        self.ledger = open_ledger(urls["owner"])
        stack.callback(self.ledger.dispose)
        self.checkpoint = write_demo_weights(folder / "models" / MODEL, layers=layers)
        in_transaction(self.ledger, register_checkpoint, MODEL, self.checkpoint, folder / "models")
        self._launch("relay", "workers.relay", ready=lambda log: "relay_serves" in read_tail(log))

    def start_workers(self, command_lines: Sequence[Sequence[str]], extractors: int) -> Workers:
        """Workers from a launcher for each command line, once so many that extract are live.

        Raises:
            ServiceError: a launcher ended, or they are not live in time; with the end of their log.
        """
        name = f"workers{extractors}"
        launchers = [self._launch(name, "workers.launcher", *arguments) for arguments in command_lines]
        workers = Workers(launchers, launchers[0].log)
        wait_until(
            lambda: len(self.live_extractors()) == extractors,
            name=f"{extractors} extract worker(s)",
            log=workers.log,
            seconds=START_SECONDS,
            alive=workers.alive,
        )
        return workers

    def live_extractors(self) -> set[int]:
        """Ids of the live workers that extract."""
        live = in_transaction(self.ledger, live_workers)
        return {worker.id for worker in live if worker.queue == EXTRACT}

    def run_job(self, fasta: Path, chunk_tokens: int, workers: Workers) -> tuple[int, float]:
        """Computes a file, whether it is known or not: the job's id, and the seconds from submission to its end.

        Raises:
            ServiceError: a launcher ended, or the job is not done in time; with the end of their log.
            ExecutionError: the job failed, or one of its records did.
        """
        settings = load_settings().model_copy(update={"chunk_tokens": chunk_tokens})
        started = time.perf_counter()
        job_id = submit_file(
            self.ledger, fasta, settings=settings, requested_by="benchmark", model=MODEL, force=True
        ).job_id
        wait_until(
            lambda: bool(self.job(job_id).state != "running"),
            name=f"the job of {fasta.name}",
            log=workers.log,
            seconds=JOB_SECONDS,
            alive=workers.alive,
        )
        seconds = time.perf_counter() - started
        job = self.job(job_id)
        if job.state != "succeeded" or job.failed:
            said = f"{job.failed} records failed, {job.error}; its workers' log ends:\n{read_tail(workers.log)}\n"
            raise ExecutionError(f"the job of {fasta.name} {job.state}: {said}", where=str(workers.log))
        return job_id, seconds

    def job(self, job_id: int) -> Row[Any]:
        """A job as `get_job` returns it."""
        return in_transaction(self.ledger, get_job, job_id)

    def extracted(self, job_id: int) -> Sequence[Row[Any]]:
        """A job's extract chunks in the order in which they were claimed; `claimed` and `finished` in seconds."""
        parameters = {"job": job_id, "stage": EXTRACT}
        return in_transaction(self.ledger, lambda tx: tx.execute(EXTRACTED, parameters).all())

    def artifact_hashes(self, job_id: int) -> dict[str, str]:
        """sha256 of all that the job's current generation left, by stage and name of the file."""
        made = in_transaction(self.ledger, artifacts_of, job_id)
        return {f"{row.stage}/{Path(row.path).name}": row.sha256 for row in made}

    def server_version(self) -> str:
        """PostgreSQL's."""
        return in_transaction(
            self.ledger, lambda tx: str(tx.execute(text("SHOW server_version")).scalar_one())
        )

    def _launch(
        self, name: str, module: str, *arguments: str, ready: Callable[[Path], bool] = lambda _: True
    ) -> ServerProcess:
        log = self.folder / f"{name}.log"
        process = ServerProcess(name, [sys.executable, "-m", module, *arguments], log=log)
        self.stack.enter_context(process).start(lambda: ready(log))
        return process
