"""What can be looked at. Nothing here writes."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dags.connections import share_ledger
from dags.links import DAG_ID, page_path
from dags.page.content import (
    CHUNKS_SHOWN,
    FAILURES_SHOWN,
    read_failures,
    read_job,
    read_jobs,
    write_csv,
)
from dags.page.rendering import Live, show
from dags.page.runs import read_run
from dags.page.security import MAY_READ, make_token, may_act
from virnucpro_core.failures import FailureReason
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import artifacts_of, count_artifacts, get_job
from virnucpro_core.ledger.transitions import EXTRACT
from virnucpro_core.ledger.waiters import list_waiters

STATES = ("running", "succeeded", "failed", "cancelled")

Ledger = Annotated[Engine, Depends(share_ledger)]
State = Annotated[str, Query(pattern=f"^({'|'.join(STATES)})?$")]
JobId = Annotated[int, Path(ge=1, lt=2**63)]
Before = Annotated[int | None, Query(ge=1, lt=2**63)]
Reason = FailureReason | None
PlainText = Annotated[str, Query(pattern=r"^[^\x00]*$")]  # PostgreSQL knows no NUL

router = APIRouter(dependencies=[MAY_READ], default_response_class=HTMLResponse)


@router.get("/")
def show_jobs(
    ledger: Ledger, user: GetUserDep, state: State = "", named: PlainText = "", before: Before = None
) -> Response:
    """The newest jobs, and the workers."""
    part = live_jobs(ledger, state, named, before)
    return show(
        "jobs.html", token=make_token(user), part=part, states=STATES, state=state, named=named, before=before
    )


@router.get("/live/jobs")
def refresh_jobs(
    request: Request, ledger: Ledger, state: State = "", named: PlainText = "", before: Before = None
) -> Response:
    return live_jobs(ledger, state, named, before).answer(request)


@router.get("/jobs/{job_id}")
def show_job(request: Request, job_id: JobId, ledger: Ledger, user: GetUserDep) -> Response:
    """One job with all that belongs to it."""
    part = live_job(request, ledger, job_id, acts=may_act(user))
    return show("job.html", token=make_token(user), part=part, job_id=job_id)


@router.get("/live/jobs/{job_id}")
def refresh_job(request: Request, job_id: JobId, ledger: Ledger, user: GetUserDep) -> Response:
    return live_job(request, ledger, job_id, acts=may_act(user)).answer(request)


@router.get("/run")
def show_run(
    ledger: Ledger, user: GetUserDep, session: SessionDep, run_id: PlainText, dag_id: str = DAG_ID
) -> Response:
    """The files of one run of the DAG and their jobs. Airflow offers the tab on the runs of every DAG."""
    part = live_run(ledger, session, run_id) if dag_id == DAG_ID else None
    return show("run.html", token=make_token(user), part=part, run_id=run_id, dag_id=dag_id)


@router.get("/live/run")
def refresh_run(request: Request, ledger: Ledger, session: SessionDep, run_id: PlainText) -> Response:
    return live_run(ledger, session, run_id).answer(request)


@router.get("/jobs/{job_id}/failures")
def show_failures(
    job_id: JobId,
    ledger: Ledger,
    reason: Reason = None,
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
) -> Response:
    """The next records of a job without an embedding."""
    failures = in_transaction(ledger, read_failures, job_id, reason=reason, after=after)
    shown = failures[:FAILURES_SHOWN]
    return show(
        "failures.html",
        job_id=job_id,
        reason=reason,
        after=after,
        failures=shown,
        following=shown[-1].record if len(failures) > FAILURES_SHOWN else None,
    )


@router.get("/jobs/{job_id}/failures.csv")
def download_failures(job_id: JobId, ledger: Ledger, reason: Reason = None) -> Response:
    """All of them, as a file."""
    in_transaction(ledger, get_job, job_id)
    name = f"job-{job_id}-{f'{reason}-' if reason else ''}failures.csv"
    return StreamingResponse(
        write_csv(ledger, job_id, reason=reason),
        media_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


@router.get("/jobs/{job_id}/waiters")
def show_waiters(job_id: JobId, ledger: Ledger) -> Response:
    """Who waits for a job: what a person is told who wants to cancel it."""
    in_transaction(ledger, get_job, job_id)
    return show("cancel.html", job_id=job_id, waiters=in_transaction(ledger, list_waiters, job_id))


@router.get("/jobs/{job_id}/chunks")
def show_chunk_files(job_id: JobId, ledger: Ledger) -> Response:
    """The files that a job's chunks made."""
    in_transaction(ledger, get_job, job_id)
    files = in_transaction(ledger, artifacts_of, job_id, stage=EXTRACT, limit=CHUNKS_SHOWN)
    total = in_transaction(ledger, count_artifacts, job_id, stage=EXTRACT)
    return show("chunks.html", files=files, total=total)


def live_jobs(ledger: Engine, state: str, named: str, before: int | None) -> Live:
    listed = in_transaction(ledger, read_jobs, state=state, named=named, before=before)
    query = {"state": state, "named": named}
    return Live(
        "job_list.html",
        make_url("live", "jobs", **query, **({} if before is None else {"before": before})),
        busy=any(job.state == "running" for job in listed.jobs),
        listed=listed,
        older=None if listed.older is None else make_url("", **query, before=listed.older),
    )


def live_job(request: Request, ledger: Engine, job_id: int, *, acts: bool) -> Live:
    page = in_transaction(ledger, read_job, job_id)
    reading = request.app.state.verifier.state_of(job_id)
    return Live(
        "job_live.html",
        make_url("live", "jobs", str(job_id)),
        busy=page.overview.state == "running" or bool(reading),
        page=page,
        reading=reading,
        job=page.overview,
        status=page.status,
        acts=acts,
    )


def live_run(ledger: Engine, session: Session, run_id: str) -> Live:
    run = read_run(session, ledger, run_id)
    return Live("run_live.html", make_url("live", "run", run_id=run_id), busy=run.changes, run=run)


def make_url(*parts: str, **query: object) -> str:
    """The path of a view with its query; there is always a `?`."""
    return f"{page_path(*parts)}?{urlencode(query)}"
