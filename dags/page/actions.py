"""What can be done: retry, cancel, verify. By POST alone, and Airflow's audit log remembers who did it."""

from __future__ import annotations

import asyncio

import structlog
from airflow.api_fastapi.core_api.security import GetUserDep
from airflow.api_fastapi.logging.decorators import action_logging
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from sqlalchemy import Engine

from dags.page.rendering import render
from dags.page.security import MAY_ACT
from dags.page.verifying import Verifier, stream_when_done
from dags.page.views import JobId, Ledger
from virnucpro_core.errors import VirnucproError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.queries import get_job
from virnucpro_core.ledger.work import Resumed
from virnucpro_core.settings import load_settings
from virnucpro_core.verification import Verification, look_at_job

FAULTS_SHOWN = 500

log = structlog.get_logger()

router = APIRouter(dependencies=MAY_ACT, default_response_class=HTMLResponse)


@router.post("/jobs/{job_id}/retry", dependencies=[Depends(action_logging("virnucpro_retry"))])
def retry_job(job_id: JobId, ledger: Ledger, user: GetUserDep) -> Response:
    """Have a job do what is missing or failed, and nothing else."""
    found = look_at_job(ledger, load_settings().output_root, job_id)
    resumed = in_transaction(ledger, resume, job_id, found.lost)
    log.info("a person retries a job", job=job_id, user=user.get_name(), chunks=resumed.chunks)
    return HTMLResponse(render("notice.html", text=tell(resumed)))


@router.post("/jobs/{job_id}/cancel", dependencies=[Depends(action_logging("virnucpro_cancel"))])
def cancel_job(job_id: JobId, ledger: Ledger, user: GetUserDep) -> Response:
    """Stop a running job; its finished chunks are kept."""
    in_transaction(ledger, cancel, job_id, by=user.get_name())
    log.info("a person cancels a job", job=job_id, user=user.get_name())
    text = "The job is cancelled. Its finished chunks are kept: Retry goes on with the others."
    return HTMLResponse(render("notice.html", text=text))


@router.post("/jobs/{job_id}/verify", dependencies=[Depends(action_logging("virnucpro_verify"))])
def verify_files(request: Request, job_id: JobId, ledger: Ledger, user: GetUserDep) -> Response:
    """Read a job's files again and compare them with the ledger's checksums."""
    return stream_verification(request, ledger, job_id, by=user.get_name(), mend=False)


@router.post("/jobs/{job_id}/mend", dependencies=[Depends(action_logging("virnucpro_mend"))])
def mend_files(request: Request, job_id: JobId, ledger: Ledger, user: GetUserDep) -> Response:
    """Read a job's files again, and have those made again that are missing or altered."""
    return stream_verification(request, ledger, job_id, by=user.get_name(), mend=True)


def stream_verification(request: Request, ledger: Engine, job_id: int, *, by: str, mend: bool) -> Response:
    in_transaction(ledger, get_job, job_id)
    verifier: Verifier = request.app.state.verifier
    log.info("a person verifies a job's files", job=job_id, user=by)

    def conclude(reading: asyncio.Future[Verification]) -> str:
        try:
            found = reading.result()
            if mend:
                found.require_readable()
            resumed = in_transaction(ledger, resume, job_id, found.lost) if mend else None
            if resumed is not None:
                log.info("a person has files made again", job=job_id, user=by, files=len(found.lost))
        except VirnucproError as error:  # the answer has begun: it is too late for another status
            return render("notice.html", text=str(error))
        return render(
            "verification.html",
            job_id=job_id,
            found=found,
            faults_shown=FAULTS_SHOWN,
            resumed=None if resumed is None else tell(resumed),
        )

    return StreamingResponse(
        stream_when_done(verifier.submit(ledger, job_id), conclude),
        media_type="text/html; charset=utf-8",
        # Airflow would compress it, and keep the first bytes back.
        headers={"Content-Encoding": "identity"},
    )


def tell(resumed: Resumed) -> str:
    return (
        f"{resumed.lost} of {resumed.chunks} chunks were lost, {resumed.kept} are kept; "
        f"{resumed.waiting} wait to run."
    )
