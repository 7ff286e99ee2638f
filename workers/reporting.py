"""Reporting: a page for people beside each result. It is a courtesy: nothing that goes wrong here may fail a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

import structlog
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Engine

from virnucpro_core.errors import ServiceError
from virnucpro_core.features.files import Written
from virnucpro_core.ledger.queries import SubmissionRow
from virnucpro_core.ledger.work import REPORT, NewArtifact, Work, file_name
from virnucpro_core.settings import Settings
from workers.artifacts import stage_folder

if TYPE_CHECKING:
    from virnucpro_core.htmlreport.contents import Gathered

log = structlog.get_logger()


class Reporter:
    """Writes the reports of a job's submissions; what they have in common is gathered once, for the first."""

    def __init__(self, ledger: Engine, work: Work, settings: Settings) -> None:
        self.ledger = ledger
        self.work = work
        self.settings = settings

    @cached_property
    def gathered(self) -> Gathered:
        # Loaded late, as it brings matplotlib: a worker that cannot load it shall work nevertheless.
        from virnucpro_core.htmlreport.contents import gather

        return gather(self.ledger, self.settings, self.work.job_id)

    def try_report(self, submission: SubmissionRow, artifacts: Sequence[NewArtifact]) -> Written | None:
        """Write a submission's report; None, and a line in the log, if that cannot be done.

        Args:
            artifacts: what this stage has made so far.

        Raises:
            ServiceError: the ledger is away; the stage is tried again as a whole.
        """
        started = time.perf_counter()
        path = stage_folder(self.work, self.settings) / file_name(REPORT, submission.id)
        try:
            from virnucpro_core.htmlreport.files import write_report  # late, as above

            written = write_report(path, self.gathered, submission.id, artifacts)
        except (ServiceError, SoftTimeLimitExceeded):
            raise
        except Exception:
            log.exception("report_not_made", job=self.work.job_id, submission=submission.id)
            with suppress(OSError):  # what an attempt before this one may have written is recorded nowhere
                path.unlink()
            return None
        log.info(
            "report_made",
            job=self.work.job_id,
            bytes=written.bytes,
            seconds=round(time.perf_counter() - started, 3),
        )
        return written
