"""The stack's Airflow as a person uses it.

def test_something(house, proteins):
    house.run(proteins)
    house.check_published(house.job_of(proteins))
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import Engine, Row, text

from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.features.exports import read_pt
from virnucpro_core.features.manifests import find_faults, read_manifest
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.ledger.work import result_folder
from virnucpro_core.models import register_checkpoint
from virnucpro_core.stack import demo
from virnucpro_core.stack.airflow import ask

if TYPE_CHECKING:
    from tests.conftest import RunningStack

DAG = "/dags/virnucpro_ingest"
SECONDS = 240.0  # that anything may take on two busy cores
DONE = ("success", "failed")
PAGE = 100

Condition = Callable[[], Any]


class House:
    """A running stack, its ledger as the owner sees it, and its Airflow as a logged-in person does."""

    def __init__(self, stack: RunningStack, ledger: Engine, airflow: httpx.Client) -> None:
        self.supervisor = stack.stack.supervisor
        self.ledger = ledger
        self.airflow = airflow
        self.inbox = stack.settings.inbox
        self.output = stack.settings.output_root
        self.told = Path(stack.settings.notifier_options["path"])

    def trigger(self, *files: Path, logical_date: datetime | None = None, **form: Any) -> str:
        date = None if logical_date is None else logical_date.isoformat()
        conf = {"files": [str(file) for file in files], "model": demo.MODEL, **form}
        return str(ask(self.airflow, "POST", f"{DAG}/dagRuns", logical_date=date, conf=conf)["dag_run_id"])

    def wait_for_run(self, run: str) -> str:
        def state() -> str | None:
            state = str(ask(self.airflow, "GET", f"{DAG}/dagRuns/{run}")["state"])
            return state if state in DONE else None

        return str(wait_until(state, lambda: self.states(run)))

    def run(self, *files: Path, **form: Any) -> str:
        """Trigger a run that must succeed; returns its id."""
        run = self.trigger(*files, **form)
        assert self.wait_for_run(run) == "success", self.states(run)
        return run

    def tasks(self, run: str) -> dict[tuple[str, int], dict[str, Any]]:
        found = ask(self.airflow, "GET", f"{DAG}/dagRuns/{run}/taskInstances?limit={PAGE}")["task_instances"]
        return {(task["task_id"], task["map_index"]): task for task in found}

    def states(self, run: str) -> dict[tuple[str, int], str]:
        return {name: task["state"] for name, task in self.tasks(run).items()}

    def wait_for_task(self, run: str, task_id: str, state: str, attempt: int) -> dict[str, Any]:
        def task() -> dict[str, Any] | None:
            task = self.tasks(run).get((task_id, 0))
            reached = task is not None and (task["state"], task["try_number"]) == (state, attempt)
            return task if reached else None

        found: dict[str, Any] = wait_until(task, lambda: self.states(run))
        return found

    def clear(self, run: str, task_id: str, *, downstream: bool = False) -> None:
        """What a person's click on Clear does, for this task alone or for all that follow it, too."""
        body = {"dry_run": False, "only_failed": False, "dag_run_id": run, "task_ids": [task_id]}
        ask(self.airflow, "POST", f"{DAG}/clearTaskInstances", **body, include_downstream=downstream)

    def log(self, run: str, task_id: str, attempt: int = 1) -> str:
        """What the log of a task says, which is not mapped."""
        return json.dumps(
            ask(self.airflow, "GET", f"{DAG}/dagRuns/{run}/taskInstances/{task_id}/logs/{attempt}")
        )

    def features_told(self, run: str) -> list[dict[str, Any]]:
        """The files in the run's asset events."""
        path = f"/assets/events?source_run_id={quote(run)}&limit={PAGE}"
        events = ask(self.airflow, "GET", path)["asset_events"]
        return [file for event in events for file in event["extra"]["files"]]

    def job_of(self, file: Path) -> Row[Any]:
        """The newest job of a file."""
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        with self.ledger.connect() as tx:
            ids = tx.execute(
                text("SELECT max(id) FROM jobs WHERE input_sha256 = :sha256"), {"sha256": sha256}
            )
            return queries.get_job(tx, ids.scalar_one())

    def log_lines(self, job: int) -> dict[str, list[dict[str, Any]]]:
        """What each program's log, and each task's, says of a job, by the file's path below the stack's folder."""
        found: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(self.supervisor.folder.rglob("*.log")):
            # What follows the last line feed is being written.
            for line in path.read_text(errors="replace").split("\n")[:-1]:
                # Other programs write text, and numbers that are no objects.
                if line.startswith("{") and json.loads(line).get("job") == job:
                    found.setdefault(str(path.relative_to(self.supervisor.folder)), []).append(
                        json.loads(line)
                    )
        return found

    def chunks(self, job: int, stage: str | None = None) -> dict[tuple[str, int], tuple[Any, ...]]:
        """All that a recomputation would change, of each chunk."""
        with self.ledger.connect() as tx:
            rows = tx.execute(
                text("""
                    SELECT stage, ordinal, id, state, attempts, claimed_at, finished_at FROM chunks
                     WHERE job_id = :job AND stage = coalesce(:stage, stage)
                """),
                {"job": job, "stage": stage},
            )
            return {(row.stage, row.ordinal): tuple(row) for row in rows}

    def waiters(self, job: int) -> list[str]:
        with self.ledger.connect() as tx:
            return list(
                tx.execute(text("SELECT token FROM waiters WHERE job_id = :job"), {"job": job}).scalars()
            )

    def published(self, job: Row[Any]) -> Path:
        return self.output / result_folder(job.stem, job.input_sha256, job.recipe_sha256)

    def check_published(self, job: Row[Any]) -> dict[str, Any]:
        """Check that a job's result is complete, as its manifest says; returns the .pt file's content."""
        folder = self.published(job)
        manifest = read_manifest(folder / f"{job.stem}.manifest.json")
        assert find_faults(manifest, folder) == []
        assert manifest.recipe.demonstration
        assert manifest.counts.embeddings + sum(manifest.counts.failures.values()) == manifest.counts.records
        proteins, data = read_pt(folder / f"{job.stem}_ESM.pt")
        assert len(proteins) == len(data) == manifest.counts.embeddings
        return {"proteins": proteins, "data": data}

    def wait_for_notice(self, run: str, what: str) -> None:
        """Wait until somebody has been told so."""
        wait_until(lambda: self.told.exists() and f"{run} {what}" in self.told.read_text())

    def is_answering(self) -> bool:
        """Whether the API server answers."""
        try:
            return self.airflow.get("/dags").is_success
        except httpx.TransportError:
            return False

    @contextmanager
    def relay_at_rest(self) -> Iterator[None]:
        """Nothing is published meanwhile, so that a job stays where it is."""
        relay = self.supervisor.pid("relay")
        assert relay, "it does not run: 0 would stop this process's own group"
        os.kill(relay, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(relay, signal.SIGCONT)


def wait_until(condition: Condition, told: Condition | None = None) -> Any:
    """Wait for what another process does; returns the condition's first true value. `told` explains a failure."""
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen in time: {told() if told else condition}"
        time.sleep(0.3)
    return value


@pytest.fixture(scope="module")
def house(stack: RunningStack) -> Iterator[House]:
    checkpoint = write_demo_weights(stack.settings.model_root / demo.MODEL, layers=1)
    ledger = open_ledger(stack.read_url("owner_database"))
    try:
        in_transaction(ledger, register_checkpoint, demo.MODEL, checkpoint, stack.settings.model_root)
        with stack.log_in() as airflow:
            airflow.timeout = SECONDS
            demo.wait_for_dag(airflow)
            yield House(stack, ledger, airflow)
    finally:
        ledger.dispose()


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    """A FASTA file that no other test has, of several chunks."""
    draw = random.Random(str(tmp_path))
    records = [
        f">p{k}\n{''.join(draw.choices('ACDEFGHIKLMNPQRSTVWY', k=draw.randint(20, 300)))}\n"
        for k in range(60)
    ]
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(records))
    return path
