"""Reports as files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from virnucpro_core.features.files import Written, new_file
from virnucpro_core.htmlreport.contents import Gathered
from virnucpro_core.htmlreport.page import render
from virnucpro_core.ledger.work import NewArtifact


def write_report(
    path: Path,
    gathered: Gathered,
    submission_id: int | None = None,
    artifacts: Iterable[NewArtifact] = (),
) -> Written:
    """Writes a submission's report, in one step; the arguments are those of `Gathered.contents_for`.

    Raises:
        JobError: the job has no such submission.
        ArtifactError: the file cannot be written.
    """
    contents = gathered.contents_for(submission_id, artifacts)
    with new_file(path) as file:
        file.write(render(contents).encode())
    return Written(path, file.sha256, file.bytes, 0 if contents.sample is None else contents.sample.rows)
