"""What a person does on the page: retry, cancel, verify; and who may."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy import Engine
from structlog.testing import capture_logs

from dags.page import verifying
from tests.page_jobs import enter_job, release, run_job, state_of
from virnucpro_core.ledger.waiters import add_waiter
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from tests.fixtures_page import TokenOf, Visit

pytest_plugins = ["tests.fixtures_page"]
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("page_model")]

THREADS = 40  # that a server has for all its requests
ACTIONS = ["retry", "cancel", "verify", "mend"]


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
    assert f'hx-get="{page}/waiters"' in user.get(page).text
    with ledger.begin() as tx:
        add_waiter(tx, job, "virnucpro_ingest nightly extract [0]", 1)
        add_waiter(tx, job, "virnucpro_ingest by hand extract [3]", 1)
    asked = user.get(f"{page}/waiters").text
    assert "2 tasks of runs wait" in asked
    assert "virnucpro_ingest by hand extract [3], try 1" in asked
    assert f'hx-post="{page}/cancel"' in asked
    assert state_of(ledger, job) == "running"
    assert user.post(f"{page}/cancel", headers=token_of(user)).status_code == 200
    assert state_of(ledger, job) == "cancelled"
    again = user.post(f"{page}/cancel", headers=token_of(user))
    assert (again.status_code, "Only a running job" in again.text) == (409, True)
    assert 'id="retry"' in user.get(page).text
    retried = user.post(f"{page}/retry", headers=token_of(user))
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


def test_a_file_that_cannot_be_read_is_told_and_nothing_is_made_again(
    ledger: Engine, visit: Visit, token_of: TokenOf
) -> None:
    job = enter_job(ledger)
    unreadable, missing, *_ = run_job(ledger, job)
    missing.unlink()
    unreadable.unlink()
    unreadable.symlink_to(unreadable)  # as with EIO or no right, nobody knows what is behind it
    user = visit("user")
    page, token = f"/virnucpro/jobs/{job}", token_of(user)
    told = user.post(f"{page}/verify", headers=token).text
    assert "2 of " in told
    assert "it cannot be read" in told
    for action in ("mend", "retry"):
        assert "nothing was changed" in user.post(f"{page}/{action}", headers=token).text
        assert state_of(ledger, job) == "succeeded"
    unreadable.unlink()
    assert "wait to run" in user.post(f"{page}/mend", headers=token).text


def test_those_who_wait_for_a_verification_keep_nobody_else_waiting(
    ledger: Engine, slow_file: Path, page_url: str, visit: Visit, token_of: TokenOf
) -> None:
    """More than the server has threads."""
    user = visit("user")
    headers = {**token_of(user), "Cookie": "; ".join(f"{k}={v}" for k, v in user.cookies.items())}
    enter_job(ledger, "b")

    async def verify(client: httpx.AsyncClient, job: int) -> str:
        return (await client.post(f"jobs/{job}/verify")).text

    async def look(client: httpx.AsyncClient) -> list[str]:
        waiting = [asyncio.create_task(verify(client, 1)) for _ in range(THREADS + 5)]
        while 'id="reading" class="quiet">' not in (page := (await client.get("jobs/1")).text):
            assert not [task.result()[:3000] for task in waiting if task.done()]
        assert "The files are being read" in page
        waiting.append(asyncio.create_task(verify(client, 2)))
        while "The files of another job are read first" not in (await client.get("jobs/2")).text:
            assert not [task.result()[:3000] for task in waiting if task.done()]
        assert 'hx-indicator="#reading" disabled' in page
        assert 'hx-trigger="every 2s' in page, "it changes by itself"
        await asyncio.to_thread(release, slow_file)
        return await asyncio.gather(*waiting)

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=page_url, headers=headers, limits=limits, timeout=120
        ) as client:
            return await look(client)

    *told, other = asyncio.run(run())
    assert len(set(told)) == 1, "they were told of different readings"
    assert "1 of 4 files are at fault" in told[0]
    assert "0 files" in other


def test_a_long_verification_gives_signs_of_life(
    ledger: Engine, slow_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "PULSE_SECONDS", 0.01)
    verifier = verifying.Verifier()

    async def listen() -> list[str]:
        heard = []
        async for sign in verifying.stream_when_done(
            verifier.submit(ledger, 1), lambda read: read.result().faults[0].path
        ):
            heard.append(sign)
            if len(heard) == 3:
                await asyncio.to_thread(release, slow_file)
        return heard

    heard = asyncio.run(listen())
    verifier.close()
    assert heard[:3] == ["\n"] * 3
    assert heard[-1] == str(slow_file.relative_to(load_settings().output_root))


def test_log_says_who_had_files_read_and_made_again(ledger: Engine, visit: Visit, token_of: TokenOf) -> None:
    run_job(ledger, enter_job(ledger))[0].unlink()
    user = visit("user")
    with capture_logs() as logs:
        user.post("/virnucpro/jobs/1/mend", headers=token_of(user))
    told = [
        {k: v for k, v in line.items() if k != "log_level"} for line in logs if "a person" in line["event"]
    ]
    assert told == [
        {"event": "a person verifies a job's files", "job": 1, "user": "a user"},
        {"event": "a person has files made again", "job": 1, "user": "a user", "files": 1},
    ]
