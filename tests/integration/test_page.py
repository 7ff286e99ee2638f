"""The page VirNucPro on a real ledger, as the DAG's role, behind Airflow's logins and permissions."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, text

from dags.links import JobLink
from dags.page import content
from dags.page.plugin import VirnucproPlugin
from tests import ledger_jobs as jobs
from virnucpro_core.features.files import hash_file
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction, open_ledger
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from tests.fixtures_page import TokenOf, Visit

pytest_plugins = ["tests.fixtures_page"]
pytestmark = pytest.mark.integration

HOSTILE = """<script>alert("1")</script>'"><img src=x onerror=alert(2)>{{ 7 * 7 }}"""
"""A record's id, an error, a file's name: whoever made the input chose it."""

VIEWS = ["", "live/jobs", "jobs/1", "live/jobs/1", "jobs/1/failures", "jobs/1/failures.csv", "jobs/1/chunks"]
RUN_VIEWS = ["run?run_id=a", "live/run?run_id=a"]
ACTIONS = ["retry", "cancel", "verify", "mend"]


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Engine]:
    """The ledger as its owner sees it, to play the workers and to look at what became of it."""
    engine = open_ledger(ledger_url)
    with engine.begin() as tx:
        jobs.add_model(tx)
    yield engine
    engine.dispose()


def enter_job(ledger: Engine, content: str = "a", path: str = "/in/reads.fasta") -> int:
    submission = replace(jobs.SUBMISSION, path=path, stem=Path(path).stem)
    return in_transaction(ledger, jobs.register, jobs.scan(content=content), submission).job_id


def run_job(ledger: Engine, job: int, failures: int = 0) -> list[Path]:
    """Play the workers until the job is done; returns the files that the ledger tells of, with their checksums."""
    paths = []
    with ledger.begin() as tx:
        jobs.run_job(tx, job, jobs.start_worker(tx), failures)
        for artifact in queries.artifacts_of(tx, job):
            path = load_settings().output_root / artifact.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(artifact.bytes))
            tx.execute(
                text("UPDATE artifacts SET sha256 = :sha256 WHERE id = :id"),
                {"sha256": hash_file(path), "id": artifact.id},
            )
            paths.append(path)
        tx.execute(text("UPDATE submissions SET published_at = NULL, published_generation = NULL"))
    return paths


def state_of(ledger: Engine, job: int) -> str:
    return str(in_transaction(ledger, queries.get_job, job).state)


def test_strangers_see_nothing(ledger: Engine, visit: Visit) -> None:
    enter_job(ledger)
    stranger = visit(None)
    for view in VIEWS + RUN_VIEWS:
        answer = stranger.get(f"/virnucpro/{view}")
        assert (answer.status_code, "reads" in answer.text) == (401, False), view
    for action in ACTIONS:
        assert stranger.post(f"/virnucpro/jobs/1/{action}").status_code == 401
    assert "/api/v2/auth/login?next=" in stranger.get("/virnucpro/jobs/1").text
    forged = visit(None)
    forged.cookies.set("_token", "e30.e30.e30")
    assert forged.get("/virnucpro/").status_code == 403


def test_every_route_asks_who_is_there(visit: Visit) -> None:
    """A view that somebody adds without a guard is found here."""
    [mounted] = VirnucproPlugin().fastapi_apps
    stranger = visit(None)
    tried = 0
    for route in mounted["app"].router.routes:
        for method in getattr(route, "methods", None) or ():
            path = route.path.replace("{job_id}", "1")
            answer = stranger.request(method, f"/virnucpro{path}?run_id=a")
            assert answer.status_code == 401, (method, path)
            tried += 1
    assert tried >= len(VIEWS) + len(RUN_VIEWS) + len(ACTIONS)


def test_viewers_read_and_do_nothing(ledger: Engine, visit: Visit, token_of: TokenOf) -> None:
    job = enter_job(ledger)
    viewer = visit("viewer")
    for view in VIEWS + RUN_VIEWS:
        assert viewer.get(f"/virnucpro/{view}").status_code == 200, view
    assert "hx-post" not in viewer.get(f"/virnucpro/jobs/{job}").text
    for action in ACTIONS:
        answer = viewer.post(f"/virnucpro/jobs/{job}/{action}", headers=token_of(viewer))
        assert answer.status_code == 403, action
    assert state_of(ledger, job) == "running"


def test_actions_want_a_post_from_our_own_page(ledger: Engine, visit: Visit, token_of: TokenOf) -> None:
    job = enter_job(ledger)
    user = visit("user")
    other = token_of(visit("admin"))
    for action in ACTIONS:
        path = f"/virnucpro/jobs/{job}/{action}"
        assert user.get(path, headers=token_of(user)).status_code == 405
        for headers in ({}, {"X-CSRF-Token": "0" * 64}, {"X-CSRF-Token": "é".encode()}, other):
            assert user.post(path, headers=headers).status_code == 403, (action, headers)
    assert state_of(ledger, job) == "running"


def test_user_cancels_and_retries_and_airflow_remembers_who(
    ledger: Engine, visit: Visit, token_of: TokenOf
) -> None:
    from airflow.models import Log
    from airflow.utils.session import create_session

    job = enter_job(ledger)
    user = visit("user")
    page = f"/virnucpro/jobs/{job}"
    assert 'id="cancel"' in user.get(page).text
    assert user.post(f"{page}/cancel", headers=token_of(user)).status_code == 200
    assert state_of(ledger, job) == "cancelled"
    again = user.post(f"{page}/cancel", headers=token_of(user))
    assert (again.status_code, "Only a running job" in again.text) == (409, True)
    assert 'id="retry"' in user.get(page).text
    retried = user.post(f"{page}/retry", headers=token_of(user))
    assert retried.headers["HX-Trigger"] == "virnucpro:changed"
    assert "0 of 3 chunks were lost, 0 are kept; 3 wait to run." in retried.text
    assert state_of(ledger, job) == "running"
    with create_session() as session:
        events = [(row.event, row.owner) for row in session.query(Log).order_by(Log.id)]
    assert events[-3:] == [(f"virnucpro_{name}", "a user") for name in ("cancel", "cancel", "retry")]


def test_retry_makes_lost_files_again_and_keeps_the_others(
    ledger: Engine, visit: Visit, token_of: TokenOf
) -> None:
    job = enter_job(ledger)
    files = run_job(ledger, job)
    for path in (files[0], files[-1]):  # of a chunk, and the merged ones that all could be made from
        path.unlink()
    user = visit("user")
    answer = user.post(f"/virnucpro/jobs/{job}/retry", headers=token_of(user))
    assert "1 of 3 chunks were lost, 2 are kept; 1 wait to run." in answer.text
    assert state_of(ledger, job) == "running"


def test_nothing_is_taken_for_lost_where_the_output_folder_is_not_seen(
    ledger: Engine, visit: Visit, token_of: TokenOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = enter_job(ledger)
    run_job(ledger, job)
    user = visit("user")
    token = token_of(user)
    load_settings().output_root.rename(load_settings().output_root.with_name("elsewhere"))
    for found in ("nothing", "the folder that a volume is mounted on"):
        for action in ("retry", "verify", "mend"):
            answer = user.post(f"/virnucpro/jobs/{job}/{action}", headers=token)
            assert "does not see the output folder" in answer.text, found
        assert state_of(ledger, job) == "succeeded"
        load_settings().output_root.mkdir(exist_ok=True)


def test_verify_names_the_altered_file_and_mend_makes_it_again(
    ledger: Engine, visit: Visit, token_of: TokenOf
) -> None:
    job = enter_job(ledger)
    files = run_job(ledger, job)
    user = visit("user")
    page, token = f"/virnucpro/jobs/{job}", token_of(user)
    answer = user.post(f"{page}/verify", headers=token)
    assert f"{len(files)} files" in answer.text
    assert "every byte is as it was recorded" in answer.text
    files[-1].write_bytes(b"x" * files[-1].stat().st_size)
    answer = user.post(f"{page}/verify", headers=token)
    assert f"1 of {len(files)} files are at fault" in answer.text
    assert str(files[-1].relative_to(load_settings().output_root)) in answer.text
    assert state_of(ledger, job) == "succeeded"
    answer = user.post(f"{page}/mend", headers=token)
    assert "wait to run" in answer.text
    assert state_of(ledger, job) == "running"


def test_job_is_told_with_counts_checksums_and_files(ledger: Engine, visit: Visit) -> None:
    job = enter_job(ledger)
    files = run_job(ledger, job, failures=2)
    viewer = visit("viewer")
    page = viewer.get(f"/virnucpro/jobs/{job}").text
    told = in_transaction(ledger, queries.get_job, job)
    assert f"{told.embeddings:,} embedded, {told.failed:,} failed" in page
    assert f"{told.failed} empty" in page
    assert "/in/reads.fasta" in page
    assert hash_file(files[-1]) in page
    assert hash_file(files[0]) in viewer.get(f"/virnucpro/jobs/{job}/chunks").text
    assert "RANDOM" in page or not told.recipe["demonstration"]


def test_hostile_text_stays_text(ledger: Engine, visit: Visit) -> None:
    job = enter_job(ledger, path=f"/in/{HOSTILE}.fasta")
    run_job(ledger, job, failures=3)
    with ledger.begin() as tx:
        tx.execute(text("UPDATE failures SET record_id = :id, detail = :id"), {"id": HOSTILE})
        tx.execute(text("UPDATE jobs SET state = 'failed', error = :id"), {"id": HOSTILE})
        tx.execute(
            text("UPDATE submissions SET stem = :id, error = :id, requested_by = :id"), {"id": HOSTILE}
        )
    user = visit("user")
    pages = [
        user.get(f"/virnucpro/{view}").text
        for view in (*VIEWS, "?named=" + HOSTILE, "run?run_id=" + HOSTILE, "run?run_id=a&dag_id=" + HOSTILE)
        if not view.endswith(".csv")
    ]
    assert sum("&lt;script&gt;alert(" in page and "{{ 7 * 7 }}" in page for page in pages) == 8
    for page in pages:
        assert "<script>alert" not in page
        assert "<img" not in page


def test_browser_is_told_to_take_nothing_from_elsewhere(ledger: Engine, visit: Visit) -> None:
    enter_job(ledger)
    viewer = visit("viewer")
    for view in (*VIEWS, "nowhere", "static/page.css"):
        headers = viewer.get(f"/virnucpro/{view}").headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert set(policy.values()) <= {"'none'", "'self'"}
        assert "frame-ancestors" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
    html = viewer.get("/virnucpro/jobs/1").text
    assert re.findall(r"""(?:src|href)=["'](?!/virnucpro/)""", html) == []
    assert "style=" not in html
    for name in re.findall(r'(?:src|href)="(/virnucpro/static/[^"]+)"', html):
        assert viewer.get(name).status_code == 200


def test_failures_come_by_reason_page_by_page_and_as_csv(
    ledger: Engine, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dags.page.views.FAILURES_SHOWN", 2)
    monkeypatch.setattr(content, "CSV_RECORDS", 2)
    job = enter_job(ledger)
    run_job(ledger, job, failures=2)
    with ledger.begin() as tx:
        tx.execute(text("UPDATE failures SET reason = 'oom' WHERE record = 1"))
        all_of_them = list(queries.failures_of(tx, job))
    assert len(all_of_them) == 6
    viewer = visit("viewer")
    page = f"/virnucpro/jobs/{job}"
    html = viewer.get(f"{page}/failures?reason=oom").text
    assert re.findall(r'<td class="number">(\d+)</td>', html) == ["1"]
    seen: list[str] = []
    url: str | None = f"{page}/failures?reason=empty"
    while url:
        html = viewer.get(url).text
        seen += re.findall(r'<td class="number">(\d+)</td>', html)
        following = re.search(r'hx-get="([^"]+)"', html)
        url = following[1].replace("&amp;", "&") if following else None
    assert seen == [str(failure.record) for failure in all_of_them[1:]]
    answer = viewer.get(f"{page}/failures.csv")
    assert answer.headers["Content-Disposition"] == f'attachment; filename="job-{job}-failures.csv"'
    rows = list(csv.reader(StringIO(answer.text)))
    assert rows[0] == ["record", "id", "reason", "detail"]
    assert [int(row[0]) for row in rows[1:]] == [failure.record for failure in all_of_them]


def test_jobs_are_found_by_file_and_state(
    ledger: Engine, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = enter_job(ledger, "a", "/in/Gut_sample.fasta")
    run_job(ledger, done)
    enter_job(ledger, "b", "/in/soil%.fasta")
    viewer = visit("viewer")

    def found(query: str) -> list[str]:
        return re.findall(
            r'<a href="/virnucpro/jobs/\d+">([^<]+)</a></td>', viewer.get(f"/virnucpro/?{query}").text
        )

    assert found("") == ["soil%", "Gut_sample"]
    assert found("named=gut_") == ["Gut_sample"]
    assert found("named=%25") == ["soil%"]
    assert found("state=succeeded") == ["Gut_sample"]
    assert found("named=soil&state=succeeded") == []
    assert viewer.get("/virnucpro/?state=nothing").status_code == 422
    monkeypatch.setattr(content, "JOBS_SHOWN", 1)
    html = viewer.get("/virnucpro/").text
    older = re.search(r'<a href="([^"]+)">Older', html)
    assert older
    assert "Gut_sample" in viewer.get(older[1].replace("&amp;", "&")).text


def test_what_the_browser_has_already_is_not_sent_again(ledger: Engine, visit: Visit) -> None:
    job = enter_job(ledger)
    viewer = visit("viewer")
    url = next_look(viewer.get(f"/virnucpro/jobs/{job}").text)
    assert viewer.get(url).status_code == 204
    run_job(ledger, job)
    answer = viewer.get(url)
    assert (answer.status_code, "succeeded" in answer.text) == (200, True)
    assert next_look(answer.text) != url


def next_look(html: str) -> str:
    found = re.search(r'hx-get="(/virnucpro/live/[^"]+)"', html)
    assert found
    return found[1].replace("&amp;", "&")


def test_unknown_jobs_are_told(ledger: Engine, visit: Visit) -> None:
    viewer = visit("viewer")
    assert viewer.get("/virnucpro/jobs/7").status_code == 404
    assert viewer.get("/virnucpro/jobs/99999999999999999999").status_code == 422


def test_ledger_that_cannot_be_used_is_told(
    visit: Visit, settings_environment: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRNUCPRO_DAG_DATABASE_URL", "postgresql://dag:secret@127.0.0.1:9/none")
    load_settings.cache_clear()
    answer = visit("viewer").get("/virnucpro/")
    assert answer.status_code == 503
    assert "secret" not in answer.text


def test_task_leads_to_its_job_or_to_the_jobs_of_its_run() -> None:
    def link(*jobs: int | None) -> str:
        files = [{"path": f"/in/{job}", "job": job, "refused": ""} for job in jobs]
        key: Any = SimpleNamespace(run_id="manual__2026-01-01T00:00:00+00:00")
        return JobLink().get_link(SimpleNamespace(files=files), ti_key=key)

    assert link(7) == link(7, 7) == "/plugin/virnucpro/virnucpro/jobs/7"
    run = "/plugin/virnucpro/virnucpro/run?run_id=manual__2026-01-01T00%3A00%3A00%2B00%3A00"
    assert link(7, 8) == link(None) == run
