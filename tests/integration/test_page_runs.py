"""The tab on a run: each of its files is there, with what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from sqlalchemy import Engine, insert

from dags.links import DAG_ID
from tests.page_jobs import enter_job, run_job

if TYPE_CHECKING:
    from tests.fixtures_page import Visit

pytest_plugins = ["tests.fixtures_page"]
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("page_model")]

Tell = Callable[..., None]


@pytest.fixture
def run_id(airflow_tables: None) -> str:
    """A run that has done nothing yet."""
    run_id = f"manual__{uuid4()}"
    with create_session() as session:
        session.add(DagRun(dag_id=DAG_ID, run_id=run_id, run_type="manual", state="running"))
    return run_id


@pytest.fixture
def tell(run_id: str) -> Tell:
    """Enters how a task of the run ended and what it returned, as Airflow does."""

    def enter(task: str, index: int = -1, *, state: str | None = "success", returned: Any = None) -> None:
        name = {"dag_id": DAG_ID, "run_id": run_id, "task_id": task, "map_index": index}
        with create_session() as session:
            session.execute(insert(TaskInstance).values(**name, state=state, pool="default_pool"))
            if returned is not None:
                XComModel.set("return_value", returned, **name, session=session)

    return enter


def read_tab(visit: Visit, run_id: str) -> tuple[str, list[list[str]], int]:
    """The tab's text, its table's cells, and the seconds until it looks again."""
    html = visit("viewer").get("/virnucpro/run", params={"run_id": run_id}).text
    rows = [
        [" ".join(re.sub("<[^>]+>", "", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL)[1:]
    ]
    [seconds] = re.findall(r'hx-trigger="every (\d+)s', html)
    return html, rows, int(seconds)


def test_files_are_told_in_order_with_jobs_refusals_and_failed_tasks(
    ledger: Engine, visit: Visit, run_id: str, tell: Tell
) -> None:
    done, shared = enter_job(ledger, "a", "/in/last_month.fasta"), enter_job(ledger, "b", "/in/b.fasta")
    run_job(ledger, done)
    files = [
        "/in/a.fasta",
        "/in/b.fasta",
        "/in/equal.fasta",
        "/in/bad.fasta",
        "/in/<b>.fasta",
        "/in/late.fasta",
    ]
    tell("find_files", returned=[files[:1], files[1:4], files[4:5], files[5:]])
    tell(
        "register",
        1,
        returned=[
            {"path": files[1], "job": shared, "refused": ""},
            {"path": files[2], "job": shared, "refused": ""},
            {"path": files[3], "job": None, "refused": "line 2 is no header"},
        ],
    )
    tell("register", 0, returned=[{"path": files[0], "job": done, "refused": ""}])
    tell("register", 2, state="failed")
    tell("register", 3, state="up_for_retry")
    html, rows, seconds = read_tab(visit, run_id)
    assert [row[:3] for row in rows] == [
        [str(done), "a.fasta", "succeeded"],
        [str(shared), "b.fasta", "running"],
        [str(shared), "equal.fasta", "running"],
        ["", "bad.fasta", "refused line 2 is no header"],
        ["", "&lt;b&gt;.fasta", "not registered Its task says why."],
        ["", "late.fasta", "not registered yet"],
    ]
    assert f'href="/dags/{DAG_ID}/runs/{run_id}/tasks/register/mapped/2"' in html
    assert 'title="/in/&lt;b&gt;.fasta"' in html
    assert seconds == 2


def test_a_night_whose_one_file_is_bad_names_it(
    ledger: Engine, visit: Visit, run_id: str, tell: Tell
) -> None:
    tell("find_files", returned=[["/in/bad.fasta"]])
    assert read_tab(visit, run_id)[1:] == ([["", "bad.fasta", "not registered yet"]], 2)
    tell("register", 0, state="failed")
    assert read_tab(visit, run_id)[1:] == ([["", "bad.fasta", "not registered Its task says why."]], 10)


def test_an_empty_inbox_is_told_from_one_that_was_not_looked_at(
    ledger: Engine, visit: Visit, run_id: str, tell: Tell
) -> None:
    html, _, seconds = read_tab(visit, run_id)
    assert ("has not looked for its files yet" in html, seconds) == (True, 2)
    tell("find_files", returned=[])
    html, _, seconds = read_tab(visit, run_id)
    assert ("found no FASTA file in the inbox" in html, seconds) == (True, 10)


def test_an_inbox_that_could_not_be_looked_at_is_told(
    ledger: Engine, visit: Visit, run_id: str, tell: Tell
) -> None:
    tell("find_files", state="failed")
    tell("register", state="upstream_failed")
    html, _, seconds = read_tab(visit, run_id)
    assert (f'href="/dags/{DAG_ID}/runs/{run_id}/tasks/find_files"' in html, seconds) == (True, 10)
