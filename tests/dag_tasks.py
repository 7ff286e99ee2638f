"""The DAG's tasks, run without Airflow on a real ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from dags import virnucpro_ingest as ingest
from dags.inbox import make_batches, write_path
from tests import ledger_jobs as jobs

FORM: dict[str, Any] = {
    "files": [],
    "model": "tiny",
    "force": False,
    "max_failed_share": None,
    "label": "none",
}


class Results:
    """What mapped tasks of a run have returned or left behind, and how `report` ended, as Airflow keeps it.

    It forgets what a task left when that is run again, and not before.

    Attributes:
        index: the map index of the task that plays now.
        states: of the instances of `report`, such as {"report_0": "success"}.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str, int], Any] = {}
        self.index = 0
        self.states: dict[str, str] = {}

    def xcom_push(self, key: str, value: Any, task: str = "register") -> None:
        self.kept[task, key, self.index] = json.loads(json.dumps(value))

    def xcom_pull(self, task_ids: list[str], map_indexes: list[int], key: str = "return_value") -> list[Any]:
        [task] = task_ids
        return [self.kept.get((task, key, index)) for index in map_indexes]

    def get_task_states(self, dag_id: str, task_ids: list[str], run_ids: list[str]) -> dict[str, Any]:
        assert (dag_id, task_ids) == ("virnucpro_ingest", ["report"])
        return dict.fromkeys(run_ids, self.states)


def write_fasta(path: Path, *sequences: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">protein{k}\n{sequence}\n" for k, sequence in enumerate(sequences)))
    return path


def register(*files: Path, results: Results | None = None, **form: Any) -> Any:
    names = [write_path(file) for file in files]
    return ingest.register.function(names, params=FORM | form, run_id="test", ti=results or Results())


def register_and_report(results: Results, ledger: Engine, file: Path) -> None:
    """Play a file's tasks until it has its accepted result."""
    registered = register(file)
    results.xcom_push("return_value", registered)
    finish(ledger, registered[0]["job"])
    results.xcom_push("return_value", report(registered)[0], task="report")
    results.states[f"report_{results.index}"] = "success"


def summarize(results: Results, *files: Path, **form: Any) -> None:
    ingest.summary.function(make_batches(files), params=FORM | form, run_id="test", ti=results)


def report(files: Any, **form: Any) -> tuple[Any, Any]:
    """Run `report`; returns its reports and what it tells with the asset."""

    class Event:
        extra: Any = None

    events = {ingest.FEATURES: Event()}
    reports = ingest.report.function(files, params=FORM | form, outlet_events=events)
    return reports, events[ingest.FEATURES].extra


def finish(ledger: Engine, job: int, failures: int = 0) -> None:
    """Play the workers until the job is done."""
    with ledger.begin() as tx:
        jobs.run_job(tx, job, jobs.start_worker(tx), failures)
