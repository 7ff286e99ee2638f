"""The share of failed records that is allowed: one answer, wherever it is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import Connection

from dags.outcomes import read_outcome
from tests import ledger_jobs as jobs
from virnucpro_core.status import read_status

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("failures", "too_many"), [(29, False), (30, True)])
def test_exactly_the_allowed_share_is_allowed(tx: Connection, failures: int, too_many: bool) -> None:
    allowed = 0.29  # of 100 records, by a multiplication of floats, 28.999…
    submission = replace(jobs.SUBMISSION, max_failed_share=allowed)
    job_id = jobs.register(tx, jobs.scan(chunks=1, records_each=100), submission).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx), failures=failures)
    [told] = read_status(tx, job_id).submissions
    outcome = read_outcome(tx, {"path": submission.path, "job": job_id, "refused": ""}, allowed)
    assert [told.too_many_failed, bool(outcome["fault"])] == [too_many, too_many]
