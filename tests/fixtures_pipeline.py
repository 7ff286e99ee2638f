"""The relay and the workers as processes, on this test's ledger and broker, as a plugin.

def test_something(pipeline):
    pipeline.start_relay()
    pipeline.start_workers()
    job = pipeline.wait_for(pipeline.submit(fasta).job_id)
    assert job.state == "succeeded"
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from sqlalchemy import Engine, Row, text

from virnucpro_core.embedding.checkpoint import Checkpoint
from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.queries import get_job, live_workers, submissions_of
from virnucpro_core.ledger.registration import add_model
from virnucpro_core.ledger.submissions import Submitted, submit_file
from virnucpro_core.settings import Settings, load_settings
from virnucpro_core.stack.processes import ServerProcess, read_tail
from workers.process import WorkerProcess

T = TypeVar("T")

MODEL = "tiny"
POLL_SECONDS = 0.05
SECONDS = 240.0  # that anything may take on two busy cores
ENDED = ("succeeded", "failed", "cancelled")


class Pipeline:
    """A registered model, and processes that are started on demand and stopped after the test.

    Attributes:
        ledger: the ledger, as its owner.
        folder: where processes write their logs.
    """

    def __init__(
        self, ledger: Engine, folder: Path, stack: ExitStack, configure: Callable[..., None]
    ) -> None:
        self.ledger = ledger
        self.folder = folder
        self.configure = configure
        self._stack = stack
        self._numbers = itertools.count(1)

    @property
    def settings(self) -> Settings:
        return load_settings()

    def start_relay(self, ready: str = "relay_serves") -> ServerProcess:
        """A relay that publishes, or that has logged another event."""
        relay = self._process("relay", "workers.relay")
        relay.start(lambda: ready in relay.log.read_text(errors="replace"), SECONDS)
        return relay

    def start_workers(self, queues: str = "extract,finish", *options: str) -> ServerProcess:
        """A launcher, returned once a node for each of the queues is live, on the CPU."""
        before = self.live_nodes()
        nodes = len(queues.split(","))
        launcher = self._process(
            "workers", "workers.launcher", "--gpus", "none", "--queues", queues, *options
        )
        launcher.start(lambda: len(self.live_nodes() - before) == nodes, SECONDS)
        return launcher

    def start_node(self, module: str, queue: str) -> ServerProcess:
        """A Celery node without a launcher, of a module that brings an application."""
        before = self.live_nodes()
        command = [
            "-A",
            module,
            "--quiet",
            "worker",
            "-n",
            f"{queue}@test",
            "-Q",
            queue,
            "-P",
            "prefork",
            "-c",
            "1",
        ]
        node = self._process("node", "celery", *command, "-l", "INFO")
        node.start(lambda: bool(self.live_nodes() - before), SECONDS)
        return node

    def live_nodes(self) -> set[str]:
        return {worker.node for worker in in_transaction(self.ledger, live_workers)}

    def submit(self, path: Path, **options: Any) -> Submitted:
        return submit_file(
            self.ledger, path, settings=self.settings, requested_by="test", model=MODEL, **options
        )

    def wait_for(
        self,
        job_id: int,
        condition: Callable[[Row[Any]], bool] = lambda job: job.state in ENDED,
        seconds: float = SECONDS,
    ) -> Row[Any]:
        """The job once it fulfils a condition; by default, once it has ended."""
        return self.wait_until(lambda: next(filter(condition, [self.job(job_id)]), None), seconds)

    def wait_until(self, look: Callable[[], T | None], seconds: float = SECONDS) -> T:
        """What `look` returns once it is something; fails with the ends of all logs."""
        deadline = time.monotonic() + seconds
        while not (seen := look()):
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {log.name}\n{read_tail(log, 60)}" for log in sorted(self.folder.glob("*.log"))
                )
                jobs = [
                    row._asdict()
                    for row in self.rows("SELECT id, state, stage, chunks_left, error FROM jobs")
                ]
                pytest.fail(f"not within {seconds} s; jobs: {jobs}\n{logs}")
            time.sleep(POLL_SECONDS)
        return seen

    def stop_in_mid_chunk(self, worker: int) -> tuple[int, int]:
        """Stop a worker's process (SIGSTOP) while it holds a chunk; its id, and the chunk's.

        It is not committing the chunk either: until the process goes on or its lease ends, the chunk stays its own.
        """
        held = """SELECT w.pid, c.id FROM chunks c JOIN workers w ON w.id = c.worker_id
                   WHERE w.id = :worker AND c.state = 'running' ORDER BY c.id DESC LIMIT 1"""

        def stop() -> tuple[int, int] | None:
            for pid, _ in self.rows(held, worker=worker):
                os.kill(pid, signal.SIGSTOP)
                for _, chunk in self.rows(f"{held} FOR UPDATE OF c SKIP LOCKED", worker=worker):
                    return pid, chunk
                os.kill(pid, signal.SIGCONT)
            return None

        return self.wait_until(stop)

    def job(self, job_id: int) -> Row[Any]:
        return in_transaction(self.ledger, get_job, job_id)

    def published(self, job_id: int, submission: int = 0) -> Path:
        """The folder that a job's result is published in for one of its submissions, the first one being 0."""
        job = self.job(job_id)
        submissions = in_transaction(self.ledger, submissions_of, job_id)
        return self.settings.output_root / submissions[submission].folder(job.input_sha256, job.recipe_sha256)

    def rows(self, query: str, **parameters: object) -> list[Row[Any]]:
        """What a query of the ledger returns."""
        return in_transaction(self.ledger, lambda tx: list(tx.execute(text(query), parameters).all()))

    def logs(self) -> str:
        """All that the processes have written."""
        return "".join(log.read_text() for log in sorted(self.folder.glob("*.log")))

    def _process(self, name: str, module: str, *arguments: str) -> ServerProcess:
        log = self.folder / f"{name}-{next(self._numbers)}.log"
        process = ServerProcess(name, [sys.executable, "-m", module, *arguments], log=log)
        return self._stack.enter_context(process)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Demonstration weights of one layer; read only."""
    return write_demo_weights(tmp_path_factory.mktemp("weights") / MODEL, layers=1)


@pytest.fixture
def pipeline(
    settings_environment: Callable[..., None],
    ledger_url: str,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Pipeline]:
    """A pipeline without processes yet, with quick settings and small chunks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings_environment(
        dtype="float32",
        chunk_tokens=400,
        lease_seconds=6,
        heartbeat_seconds=1,
        republish_seconds=3,
        model_root=tiny_checkpoint.folder.parent,
    )
    folder = tmp_path / "logs"
    folder.mkdir()
    ledger = open_ledger(ledger_url)
    in_transaction(
        ledger,
        add_model,
        name=MODEL,
        path=MODEL,
        weights_sha256=tiny_checkpoint.sha256,
        layers=tiny_checkpoint.layers,
        token_dropout=tiny_checkpoint.token_dropout,
        demonstration=True,
        config=tiny_checkpoint.config,
    )
    with ExitStack() as stack:
        yield Pipeline(ledger, folder, stack, settings_environment)
    ledger.dispose()


@pytest.fixture
def small_fasta(tmp_path: Path) -> Path:
    """Ten proteins of 60 to 240 residues, two records that must fail, and two with the same id."""
    records = [f">protein_{k} of ten\n{'MKVLAGICDEFHNPQRSTWY' * (3 + k)}\n" for k in range(10)]
    records[4] = records[4].replace("protein_4", "protein_3")
    path = tmp_path / "inbox" / "small.fasta"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join([*records[:5], ">empty\n", *records[5:], ">digits\nMKV1AG\n"]))
    return path


@pytest.fixture
def nucleotides(small_fasta: Path) -> Path:
    """A DNABERT-S file with one entry for each record of `small_fasta`, failures included."""
    ids = [line[1:].split()[0] for line in small_fasta.read_text().splitlines() if line.startswith(">")]
    entries = [{"label": name, "mean_representation": [float(k)] * 768} for k, name in enumerate(ids)]
    path = small_fasta.with_name("small_DNABERT_S.pt")
    with path.open("wb") as file:
        torch.save({"nucleotide": ids, "data": entries}, file)
    return path


@pytest.fixture
def run_chunks(pipeline: Pipeline) -> Iterator[Callable[[str], None]]:
    """Runs all chunks of a stage that wait, in this process."""
    processes: dict[str, WorkerProcess] = {}

    def run(stage: str) -> None:
        queue = "extract" if stage == "extract" else "finish"
        if queue not in processes:
            processes[queue] = WorkerProcess(pipeline.settings, node=f"{queue}@test", queue=queue)
        for row in pipeline.rows("SELECT id FROM chunks WHERE stage = :stage ORDER BY id", stage=stage):
            processes[queue].run(stage, row.id)
        done = "SELECT 1 FROM chunks WHERE stage = :stage AND state <> 'done'"
        pipeline.wait_until(lambda: not pipeline.rows(done, stage=stage))

    yield run
    for process in processes.values():
        process.close()
