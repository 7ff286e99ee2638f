"""The page VirNucPro on a real ledger, as the DAG's role, behind Airflow's logins and permissions."""

from __future__ import annotations

import csv
import re
from io import StringIO
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine, text
from starlette.routing import Mount

from dags.links import JobLink
from dags.page import content
from dags.page.plugin import VirnucproPlugin
from dags.page.rendering import FOLDER
from tests import ledger_jobs as jobs
from tests.page_jobs import enter_job, run_job, state_of
from virnucpro_core.features.files import hash_file
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from tests.fixtures_page import TokenOf, Visit

pytest_plugins = ["tests.fixtures_page"]
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("page_model")]

HOSTILE = """<script>alert("1")</script>'"><img src=x onerror=alert(2)>{{ 7 * 7 }}"""
"""A record's id, an error, a file's name: whoever made the input chose it."""

VIEWS = [
    *("", "live/jobs", "jobs/1", "live/jobs/1"),
    *(f"jobs/1/{part}" for part in ("failures", "failures.csv", "chunks", "waiters")),
]
RUN_VIEWS = ["run?run_id=a", "live/run?run_id=a"]
ACTIONS = ["retry", "cancel", "verify", "mend"]


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


def test_a_page_whose_login_has_expired_is_loaded_again(ledger: Engine, visit: Visit) -> None:
    answer = visit(None).get("/virnucpro/live/jobs", headers={"HX-Request": "true"})
    assert (answer.status_code, answer.headers["HX-Refresh"]) == (401, "true")
    assert (
        "HX-Refresh" not in visit("viewer").get("/virnucpro/jobs/7", headers={"HX-Request": "true"}).headers
    )


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
        if not getattr(route, "methods", None):
            # What is the same for everybody: our style, icon and scripts.
            assert (type(route), route.path) == (Mount, "/static")
    assert tried >= len(VIEWS) + len(RUN_VIEWS) + len(ACTIONS)
    assert {file.suffix for file in (FOLDER / "static").iterdir()} == {".css", ".js", ".svg"}


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


def test_job_is_told_with_counts_checksums_and_files(ledger: Engine, visit: Visit) -> None:
    job = enter_job(ledger)
    files = run_job(ledger, job, failures=2)
    viewer = visit("viewer")
    page = viewer.get(f"/virnucpro/jobs/{job}").text
    told = in_transaction(ledger, queries.get_job, job)
    assert f"{told.embeddings:,} embedded, {told.failed:,} failed" in page
    assert f"{told.failed} empty" in page
    assert "/in/reads.fasta" in page
    [submission] = in_transaction(ledger, queries.submissions_of, job)
    assert submission.folder(told.input_sha256, told.recipe_sha256) not in page, "it is not published yet"
    assert hash_file(files[-1]) in page
    assert hash_file(files[0]) in viewer.get(f"/virnucpro/jobs/{job}/chunks").text
    assert "RANDOM" not in page
    with ledger.begin() as tx:
        tx.execute(
            text("""UPDATE jobs SET recipe = jsonb_set(CAST(recipe AS jsonb), '{demonstration}', 'true')""")
        )
        tx.execute(text("UPDATE submissions SET published_at = now(), published_generation = 1"))
    page = viewer.get(f"/virnucpro/jobs/{job}").text
    assert "RANDOM" in page
    assert f"<code>{submission.folder(told.input_sha256, told.recipe_sha256)}</code>" in page


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
    monkeypatch.setattr(queries, "BATCH_RECORDS", 2)
    job = enter_job(ledger)
    run_job(ledger, job, failures=2)
    with ledger.begin() as tx:
        tx.execute(text("UPDATE failures SET reason = 'oom' WHERE record = 1"))
        all_of_them = list(queries.failures_of(tx, job))
        tx.execute(text("UPDATE failures SET record_id = '=1+1', detail = '\t@SUM(A1)' WHERE record = 1"))
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
    assert rows[1] == ["1", "'=1+1", "oom", "'\t@SUM(A1)"], "a spreadsheet would compute it"
    assert rows[2][1] == all_of_them[1].id
    some = viewer.get(f"{page}/failures.csv?reason=empty")
    assert some.headers["Content-Disposition"] == f'attachment; filename="job-{job}-empty-failures.csv"'
    assert list(csv.reader(StringIO(some.text))) == [rows[0], *rows[2:]]
    assert f'href="{page}/failures.csv?reason=empty"' in viewer.get(f"{page}/failures?reason=empty").text


def test_an_id_as_long_as_a_file_is_cut_on_the_page_and_whole_in_the_csv(
    ledger: Engine, visit: Visit
) -> None:
    """What has lost its line ends is one header."""
    job = enter_job(ledger)
    run_job(ledger, job, failures=2)
    with ledger.begin() as tx:
        tx.execute(
            text("UPDATE failures SET record_id = repeat('x', 1000000), detail = repeat('y', 1000000)")
        )
    viewer = visit("viewer")
    page = viewer.get(f"/virnucpro/jobs/{job}/failures")
    assert len(page.content) < 20_000
    assert "x" * 900 in page.text
    assert "x" * 1_000_000 in viewer.get(f"/virnucpro/jobs/{job}/failures.csv").text


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
    enter_job(ledger, "a", "/in/equal.fasta")
    assert found("") == ["soil%", "Gut_sample and 1 more"]
    assert found("named=equal") == ["equal and 1 more"]
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
    assert 'hx-trigger="every 2s' in viewer.get("/virnucpro/").text
    run_job(ledger, job)
    answer = viewer.get(url)
    assert (answer.status_code, "succeeded" in answer.text) == (200, True)
    assert next_look(answer.text) != url
    assert 'hx-trigger="every 10s' in answer.text
    assert 'hx-trigger="every 10s' in viewer.get("/virnucpro/").text, "no job in it runs"


def test_what_was_shown_of_files_is_dropped_when_the_job_goes_on(ledger: Engine, visit: Visit) -> None:
    """The browser keeps these parts as long as their ids are the same."""
    job = enter_job(ledger)
    viewer = visit("viewer")
    seen = set()

    def kept() -> str:
        return str(
            re.findall(r'<div id="([^"]+)"[^>]* hx-preserve>', viewer.get(f"/virnucpro/jobs/{job}").text)
        )

    for _ in range(2):
        seen.add(kept())
        run_job(ledger, job)
        seen.add(kept())
        in_transaction(ledger, jobs.register, jobs.scan(), force=True)
    assert len(seen) == 4


def next_look(html: str) -> str:
    found = re.search(r'hx-get="(/virnucpro/live/[^"]+)"', html)
    assert found
    return found[1].replace("&amp;", "&")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("jobs/7", 404),
        ("nowhere", 404),
        ("jobs/7/retry", 405),
        ("jobs/99999999999999999999", 422),
        ("?state=nothing", 422),
        ("?named=a%00b", 422),
        ("run?run_id=%00", 422),
        ("live/run?run_id=%00", 422),
        ("run", 422),
    ],
)
def test_whatever_is_wrong_with_an_address_is_told_on_a_page(
    ledger: Engine, visit: Visit, path: str, status: int
) -> None:
    answer = visit("viewer").get(f"/virnucpro/{path}")
    assert (answer.status_code, "<h1>VirNucPro</h1>" in answer.text) == (status, True), answer.text
    part = visit("viewer").get(f"/virnucpro/{path}", headers={"HX-Request": "true"})
    assert (part.status_code, part.text.startswith('<p class="notice">')) == (status, True)


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
