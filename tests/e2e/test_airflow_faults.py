"""Airflow breaks, or two runs come at once, while a file waits: the work goes on, and nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from tests.fixtures_airflow import House, wait_until
from virnucpro_core.stack.supervisor import children_of, kill

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.timeout(600)]

COMPONENTS = ["triggerer", "scheduler", "api-server"]


def kill_component(house: House, component: str) -> int:
    """SIGKILL a component with all its children; returns the process id that it had."""
    process = psutil.Process(house.supervisor.pid(component))
    for one in [*children_of(process), process]:
        kill(one)
    return process.pid


def attempts(house: House, job: int) -> set[int]:
    """How often each chunk of a job was claimed."""
    with house.ledger.connect() as tx:
        return set(
            tx.execute(text("SELECT attempts FROM chunks WHERE job_id = :job"), {"job": job}).scalars()
        )


def test_components_are_killed_while_a_file_waits(house: House, proteins: Path) -> None:
    with house.relay_at_rest():
        run = house.trigger(proteins)
        house.wait_for_task(run, "extract", "deferred", attempt=1)
        killed = {component: kill_component(house, component) for component in COMPONENTS}
        for component, pid in killed.items():
            wait_until(lambda component=component, pid=pid: house.supervisor.pid(component) not in (0, pid))
        assert len(house.waiters(house.job_of(proteins).id)) == 1, "its row is what says that it waits"
    wait_until(house.is_answering)
    assert house.wait_for_run(run) == "success"
    job = house.job_of(proteins)
    house.check_published(job)
    assert house.waiters(job.id) == []
    assert attempts(house, job.id) == {1}
    assert house.tasks(run)["extract", 0]["try_number"] == 1, "the wait was resumed, not tried again"


def test_two_runs_at_once_share_the_job_of_a_file(house: House, proteins: Path) -> None:
    runs = [house.trigger(proteins) for _ in range(2)]
    assert [house.wait_for_run(run) for run in runs] == ["success", "success"]
    job = house.job_of(proteins)
    assert (job.generation, job.state) == (1, "succeeded")
    assert attempts(house, job.id) == {1}
    assert house.waiters(job.id) == []
    house.check_published(job)
    assert [len(house.features_told(run)) for run in runs] == [1, 1]
