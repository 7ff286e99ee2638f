"""Flower as a person sees it: nothing without the login; then nodes by device, and tasks by job, file and chunk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text

from tests.fixtures_airflow import House, wait_until
from virnucpro_core.ledger.submissions import submit_file
from virnucpro_core.stack import demo
from virnucpro_core.stack.programs import FLOWER_USER

if TYPE_CHECKING:
    from tests.conftest import RunningStack
    from tests.fixtures_browser import Browser

pytest_plugins = ["tests.fixtures_browser"]
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def test_person_logs_in_and_finds_a_job_s_chunks(
    browser: Browser, stack: RunningStack, house: House, proteins: Path
) -> None:
    job = submit_file(
        house.ledger, proteins, settings=stack.settings, requested_by="test", model=demo.MODEL
    ).job_id
    chunks = len(house.chunks(job, "extract"))
    wait_until(lambda: house.job_of(proteins).state == "succeeded")
    with house.ledger.connect() as tx:
        nodes = tx.execute(text("SELECT node FROM workers WHERE state = 'live'")).scalars().all()
    assert {node.partition("@")[0].rstrip("0123456789") for node in nodes} == {"cpu", "finish"}

    url = urlsplit(stack.description.urls["Flower"])
    browser.open(url.geturl())
    assert [node for node in nodes if node in browser.text()] == []
    browser.allowed.append("status of 401")

    password = (stack.stack.folder / "secrets" / "flower-admin").read_text()
    browser.open(f"http://{FLOWER_USER}:{password}@{url.netloc}/")
    for node in nodes:
        browser.see(node, "table")
    browser.picture("flower-workers")

    browser.click("a", "Tasks")
    browser.see(f"job {job} proteins: validate chunk 1 of 1", "table")
    browser.see(f"job {job} proteins: extract chunk {chunks} of {chunks}", "table")
    browser.picture("flower-tasks")

    browser.click("td a[href*='/task/']")
    browser.see("SUCCESS")
    browser.see(f"job {job} proteins:")
