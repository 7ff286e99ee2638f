"""The page VirNucPro as a person sees it in Airflow: log in, find a job, open its failures, retry, see it finish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import RunningStack
from tests.fixtures_airflow import House, wait_until
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.stack.airflow import USER, ask

if TYPE_CHECKING:
    from tests.fixtures_browser import Browser

pytest_plugins = ["tests.fixtures_browser"]
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

HOSTILE = "<img/src=x/onerror=alert(1)>"


def log_in(browser: Browser, stack: RunningStack) -> None:
    browser.open(stack.description.urls["Airflow"])
    browser.type("input[name=username]", USER)
    browser.type("input[name=password]", (stack.stack.folder / "secrets" / "airflow-admin").read_text())
    browser.click("button[type=submit]")
    browser.find("a", "VirNucPro")
    # Airflow's own page asks for its configuration to find out that nobody is logged in yet.
    browser.allowed.append("/ui/config - Failed to load resource: the server responded with a status of 401")


def test_person_finds_a_job_reads_its_failures_and_has_it_done_again(
    browser: Browser, stack: RunningStack, house: House, proteins: Path
) -> None:
    with proteins.open("a") as file:
        file.write(f">{HOSTILE}\nMKV1LAT\n>empty\n")
    run = house.run(proteins, max_failed_share=1)
    job = house.job_of(proteins)
    chunks = len(house.chunks(job.id, "extract"))
    lost = [
        *in_transaction(house.ledger, queries.artifacts_of, job.id, stage="extract")[:2],
        *in_transaction(house.ledger, queries.artifacts_of, job.id, stage="merge"),
    ]

    log_in(browser, stack)
    browser.click("a", "VirNucPro")
    with browser.frame():
        browser.type("#named", proteins.parent.name)
        browser.click("#find")
        browser.see("succeeded", "#jobs")
        browser.picture("page-jobs")
        browser.click("#jobs a", "proteins")

        browser.see("60 embedded, 2 failed")
        browser.click("#reason-invalid_residue")
        browser.see(HOSTILE, "#failures")
        browser.picture("page-failures")
        browser.click("#csv")
        csv = browser.downloads / f"job-{job.id}-failures.csv"
        wait_until(csv.exists)
        assert HOSTILE in csv.read_text()

        browser.click("#verify")
        browser.see("every byte is as it was recorded", "#verified")
        for artifact in lost:
            (house.output / artifact.path).unlink()
        browser.click("#verify")
        browser.see("are at fault", "#faults")
        browser.picture("page-verification")

        with house.relay_at_rest():
            browser.click("#retry")
            browser.see(f"2 of {chunks} chunks were lost", "#notice")
            browser.see("running", ".state")
            browser.picture("page-running")
        browser.see("succeeded", ".state")
    assert house.job_of(proteins).state == "succeeded"
    house.check_published(house.job_of(proteins))

    check_ways_to_the_page(browser, stack, house, run, job.id)


def check_ways_to_the_page(browser: Browser, stack: RunningStack, house: House, run: str, job: int) -> None:
    """The tab on the run, and the extra link on the task."""
    airflow = stack.description.urls["Airflow"]
    browser.open(f"{airflow}/dags/virnucpro_ingest/runs/{run}")
    browser.click("a[href*='/plugin/virnucpro-run']")
    with browser.frame():
        browser.see(f"Files of {run}", "h1")
        browser.see("proteins", "#jobs")
        browser.picture("page-run")

    links = ask(
        house.airflow,
        "GET",
        f"/dags/virnucpro_ingest/dagRuns/{run}/taskInstances/extract/links?map_index=0",
    )["extra_links"]
    browser.open(f"{airflow}{links['VirNucPro job']}")
    with browser.frame():
        browser.see(f"Job {job}")
