"""Jobs for the page to show: registered without a file, run without a model, with files that are as recorded."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path

from sqlalchemy import Engine, text

from tests import ledger_jobs as jobs
from virnucpro_core.features.files import hash_file
from virnucpro_core.ledger import queries
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.settings import load_settings

SECONDS = 60.0  # until somebody reads a pipe


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


def release(path: Path) -> None:
    """Let whoever reads a pipe, or is about to, come to its end."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # nobody reads it yet
        else:
            return
