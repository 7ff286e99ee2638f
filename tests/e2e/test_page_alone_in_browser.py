"""The page VirNucPro in a browser, without the stack around it: what happens when something else goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from sqlalchemy import Engine, text

from tests.page_jobs import enter_job, release, state_of
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.waiters import add_waiter

if TYPE_CHECKING:
    from tests.fixtures_browser import Browser

pytest_plugins = ["tests.fixtures_browser", "tests.fixtures_page"]
pytestmark = [pytest.mark.system, pytest.mark.timeout(300), pytest.mark.usefixtures("page_model")]

SOON = 5.0  # seconds: before the page would look again by itself


def rename(ledger: Engine, table: str, name: str) -> None:
    with ledger.begin() as tx:
        tx.execute(text(f"ALTER TABLE {table} RENAME TO {name}"))


def test_page_says_that_it_is_old_and_why_until_it_is_not(
    browser: Browser, airflow: FastAPI, page_url: str, log_in: Callable[[str], None], ledger: Engine
) -> None:
    browser.allowed += [
        "status of 50",
        "Response Status Error Code 50",
        "ERR_INTERNET_DISCONNECTED",
        "htmx:sendError",
        "htmx:afterRequest",  # that of a request without an answer
    ]
    job = enter_job(ledger)
    log_in("user")
    browser.open(f"{page_url}jobs/{job}")
    browser.click("#ask-cancel")
    browser.see("No run waits for job", "#notice")
    assert not browser.driver.find_element("id", "stale").is_displayed()

    rename(ledger, "jobs", "away")
    browser.see("what you see may be old", "#stale")
    browser.see("the ledger's tables are missing", "#why")
    browser.picture("page-stale")

    airflow.state.instead = HTMLResponse("<!doctype html><body><h1>Bad Gateway</h1></body>", 502)
    browser.wait(lambda driver: not driver.find_element("id", "why").text, "a proxy's answer")
    browser.see("what you see may be old", "#stale")
    assert "Bad Gateway" not in browser.text()
    browser.see("No run waits for job", "#notice")

    airflow.state.instead = None
    rename(ledger, "away", "jobs")
    browser.wait(lambda driver: not driver.find_element("id", "stale").is_displayed(), "a good answer")
    browser.see("No run waits for job", "#notice")

    rename(ledger, "jobs", "away")
    browser.see("the ledger's tables are missing", "#why")
    browser.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    browser.wait(lambda driver: not driver.find_element("id", "why").text, "a look without an answer")
    browser.see("what you see may be old", "#stale")


def test_cancel_takes_a_second_click_that_knows_who_waits(
    browser: Browser, page_url: str, log_in: Callable[[str], None], ledger: Engine
) -> None:
    job = enter_job(ledger)
    in_transaction(ledger, add_waiter, job, "virnucpro_ingest nightly extract [0]", 1)
    log_in("user")
    browser.open(f"{page_url}jobs/{job}")
    browser.click("#ask-cancel")
    browser.see("1 task of a run waits for job", "#ask")
    browser.see("virnucpro_ingest nightly extract [0]", "#ask")
    browser.picture("page-cancel")
    assert state_of(ledger, job) == "running"
    browser.click("#cancel")
    browser.see("The job is cancelled", "#notice")
    browser.see("cancelled", ".state")
    browser.click("#retry")
    browser.wait(lambda driver: driver.find_element("css selector", ".state.running"), "the job's run", SOON)


def test_verification_is_seen_while_it_runs_and_dropped_when_the_job_goes_on(
    browser: Browser, page_url: str, log_in: Callable[[str], None], ledger: Engine, slow_file: Path
) -> None:
    log_in("user")
    browser.open(f"{page_url}jobs/1")
    browser.click("#verify")
    # The page has looked again meanwhile, and the button is another one.
    browser.see("The files are being read", "#reading:not(.htmx-indicator)")
    assert not browser.find("#verify").is_enabled()
    browser.picture("page-verifying")
    release(slow_file)
    browser.see("1 of 4 files are at fault", "#faults")
    slow_file.unlink()  # the next one to read it would wait, too
    browser.find("#verify:enabled")
    browser.click("#mend")
    browser.see("1 of 3 chunks were lost", "#notice")
    browser.see("running", ".state")
    assert "files are at fault" not in browser.find(".live").text
