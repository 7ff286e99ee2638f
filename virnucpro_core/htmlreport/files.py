"""Reports as files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Engine

from virnucpro_core.features.files import Written, new_file
from virnucpro_core.htmlreport.contents import OnProgress, gather
from virnucpro_core.htmlreport.page import render
from virnucpro_core.ledger.work import NewArtifact
from virnucpro_core.settings import Settings


def write_report(
    path: Path,
    ledger: Engine,
    settings: Settings,
    job_id: int,
    submission_id: int | None = None,
    *,
    artifacts: Iterable[NewArtifact] = (),
    on_progress: OnProgress | None = None,
) -> Written:
    """Writes a job's report, in one step; the arguments are those of `gather`.

    Raises:
        JobError: there is no such job, or it has no such submission.
        ArtifactError: the file cannot be written.
    """
    contents = gather(ledger, settings, job_id, submission_id, artifacts=artifacts, on_progress=on_progress)
    with new_file(path) as file:
        file.write(render(contents).encode())
    return Written(path, file.sha256, file.bytes, 0 if contents.sample is None else contents.sample.rows)
