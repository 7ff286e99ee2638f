"""Flower, as a person reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.fixtures_airflow import SECONDS, House, wait_until
from virnucpro_core.ledger.submissions import submit_file
from virnucpro_core.stack import demo

if TYPE_CHECKING:
    from tests.conftest import RunningStack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_tasks_are_named_by_job_file_and_chunk(house: House, stack: RunningStack, proteins: Path) -> None:
    job = submit_file(
        house.ledger, proteins, settings=stack.settings, requested_by="test", model=demo.MODEL
    ).job_id
    chunks = len(house.chunks(job, "extract"))
    assert chunks > 2
    extract = {f"job {job} proteins: extract chunk {k} of {chunks}" for k in range(1, chunks + 1)}
    finish = {f"job {job} proteins: {stage} chunk 1 of 1" for stage in ("merge", "validate")}
    password = (stack.stack.folder / "secrets" / "flower-admin").read_text()
    login = ("admin", password)
    with httpx.Client(base_url=stack.description.urls["Flower"], auth=login, timeout=SECONDS) as flower:

        def done() -> dict[str, Any] | None:
            told = flower.get("/api/tasks", params={"limit": 1000}).json().values()
            tasks = {task["args"]: task for task in told if task["state"] == "SUCCESS"}
            return tasks if tasks.keys() >= extract | finish else None

        tasks = wait_until(done)
        assert all(tasks[title]["worker"].startswith("cpu") for title in extract)
        assert all(tasks[title]["worker"].startswith("finish") for title in finish)
        assert 'data-column="args"' in flower.get("/tasks").text
