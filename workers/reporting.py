"""Reporting: a page for people beside each result. It is a courtesy: nothing that goes wrong here may fail a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import structlog
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine

from virnucpro_core.errors import ServiceError
from virnucpro_core.features.files import Written
from virnucpro_core.ledger.queries import SubmissionRow
from virnucpro_core.ledger.work import REPORT, NewArtifact, Work, file_name
from virnucpro_core.settings import Settings
from workers.artifacts import stage_folder

log = structlog.get_logger()


def try_report(
    ledger: Engine,
    work: Work,
    submission: SubmissionRow,
    artifacts: Sequence[NewArtifact],
    settings: Settings,
) -> Written | None:
    """Write a submission's report; None, and a line in the log, if that cannot be done.

    Args:
        artifacts: what this stage has made so far.

    Raises:
        ServiceError: the ledger is away; the stage is tried again as a whole.
    """
    started = time.perf_counter()
    path = stage_folder(work, settings) / file_name(REPORT, submission.id)
    try:
        # Loaded late, as it brings matplotlib: a worker that cannot load it shall work nevertheless.
        from virnucpro_core.htmlreport.files import write_report

        written = write_report(path, ledger, settings, work.job_id, submission.id, artifacts=artifacts)
    except (ServiceError, SoftTimeLimitExceeded):
        raise
    except Exception:
        log.exception("report_not_made", job=work.job_id, submission=submission.id)
        with suppress(OSError):  # what an attempt before this one may have written is recorded nowhere
            path.unlink()
        return None
    log.info(
        "report_made", job=work.job_id, bytes=written.bytes, seconds=round(time.perf_counter() - started, 3)
    )
    return written
