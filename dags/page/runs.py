"""The files of one run of the DAG: Airflow's database says which they are, the ledger what became of them.

The ledger alone does not know: it remembers the last run that submitted a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.state import State
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from dags.links import DAG_ID, task_path
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.overview import JobOverview, list_job_overviews

FIND, REGISTER = "find_files", "register"  # tasks of the DAG


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A file that a run set out with.

    Attributes:
        job: its job; None if it has none, or none yet.
        refused: why it has none, if `register` said so.
        failed: Airflow's page of the task that ended without a word on it; empty if there is none.
    """

    path: str
    job: JobOverview | None = None
    refused: str = ""
    failed: str = ""

    @property
    def changes(self) -> bool:
        """Whether something will become of it by itself."""
        return self.job.state == "running" if self.job else not (self.refused or self.failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What became of a run's files.

    Attributes:
        files: in the run's order; None if it has not found them, or not yet.
        failed: Airflow's page of the task that ended without finding them; empty if there is none.
    """

    files: list[RunFile] | None
    failed: str = ""

    @property
    def changes(self) -> bool:
        """Whether something will become of it by itself."""
        return not self.failed if self.files is None else any(file.changes for file in self.files)


def read_run(session: Session, ledger: Engine, run_id: str) -> Run:
    """What became of a run's files.

    Args:
        session: of Airflow's own database.
    """
    found = read_results(session, run_id, FIND)
    ended = find_ended(session, run_id)
    if not found:
        return Run(files=None, failed=task_path(run_id, FIND) if (FIND, -1) in ended else "")
    registered = read_results(session, run_id, REGISTER)
    ids = {file["job"] for batch in registered.values() for file in batch if file["job"] is not None}
    overviews = in_transaction(ledger, list_job_overviews, limit=len(ids), jobs=sorted(ids))
    jobs = {job.id: job for job in overviews}
    files = []
    for index, batch in enumerate(found[-1]):
        if index in registered:
            files += [
                RunFile(path=file["path"], job=jobs.get(file["job"]), refused=file["refused"])
                for file in registered[index]
            ]
        else:
            failed = task_path(run_id, REGISTER, index) if (REGISTER, index) in ended else ""
            files += [RunFile(path=path, failed=failed) for path in batch]
    return Run(files=files)


def read_results(session: Session, run_id: str, task_id: str) -> dict[int, Any]:
    """What a task has returned, by map index; -1 for one that is not mapped."""
    query = XComModel.get_many(dag_ids=DAG_ID, run_id=run_id, task_ids=task_id, key="return_value")
    rows: Any = session.scalars(query)
    return {row.map_index: XComModel.deserialize_value(row) for row in rows}


def find_ended(session: Session, run_id: str) -> set[tuple[str, int]]:
    """The tasks that will do nothing more by themselves, with their map indices."""
    query = select(TaskInstance.task_id, TaskInstance.map_index).where(
        TaskInstance.dag_id == DAG_ID,
        TaskInstance.run_id == run_id,
        TaskInstance.task_id.in_([FIND, REGISTER]),
        TaskInstance.state.in_(State.finished),
    )
    return {(row.task_id, row.map_index) for row in session.execute(query)}
