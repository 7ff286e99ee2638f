"""Artifacts: where a job's files lie below the output root, and how the ledger speaks of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog

from virnucpro_core.errors import ArtifactError, OutsideError, ServiceError
from virnucpro_core.features.files import Written, hash_file, is_unreadable
from virnucpro_core.ledger.queries import UNREADABLE_ADVICE, ArtifactRow, SubmissionRow
from virnucpro_core.ledger.work import RESULTS, NewArtifact, Work
from virnucpro_core.roots import OUTPUT_ADVICE, resolve_below
from virnucpro_core.settings import Settings

log = structlog.get_logger()


def output_root(settings: Settings) -> Path:
    """The real path of the folder below which everything is written."""
    return settings.output_root.resolve()


def below_output(path: str, settings: Settings, *, folder: str = ".") -> Path:
    """The real path of what the ledger names below a folder of the output root.

    Raises:
        OutsideError: it lies elsewhere.
    """
    root = output_root(settings)
    top = resolve_below(root / folder, [root], todo=OUTPUT_ADVICE)
    return resolve_below(root / path, [top], todo=OUTPUT_ADVICE)


def stage_folder(work: Work, settings: Settings) -> Path:
    return below_output(work.artifact_folder(), settings)


def published_folder(work: Work, submission: SubmissionRow, settings: Settings) -> Path:
    """The real path of the folder for a submission's readers; its stem may begin the names of files in it.

    Raises:
        OutsideError: one or the other would lie elsewhere.
    """
    if Path(submission.stem).name != submission.stem:
        what = f"the stem {submission.stem!r} leads out of its folder"
        raise OutsideError(what, where=f"submission {submission.id}", todo=OUTPUT_ADVICE)
    folder = submission.folder(work.input_sha256, work.recipe.sha256)
    return below_output(folder, settings, folder=RESULTS)


def locate(row: ArtifactRow, settings: Settings) -> Path:
    return below_output(row.path, settings)


def describe_file(written: Written, kind: str, settings: Settings) -> NewArtifact:
    path = written.path.relative_to(output_root(settings)).as_posix()
    return NewArtifact(kind=kind, path=path, sha256=written.sha256, bytes=written.bytes, rows=written.rows)


def as_new(row: ArtifactRow) -> NewArtifact:
    return NewArtifact(kind=row.kind, path=row.path, sha256=row.sha256, bytes=row.bytes, rows=row.rows)


def as_written(row: ArtifactRow, settings: Settings) -> Written:
    return Written(locate(row, settings), row.sha256, row.bytes, row.rows)


def find_unsound(artifacts: Sequence[ArtifactRow], settings: Settings) -> list[int]:
    """Ids of the artifacts whose bytes are gone or are not those that were recorded.

    Raises:
        ServiceError: one cannot be read. It may be intact, so none is told to be made again.
    """
    unsound = []
    for row in artifacts:
        try:
            sound = hash_file(locate(row, settings)) == row.sha256
        except ArtifactError as error:
            if is_unreadable(error):
                raise ServiceError(error.what, where=error.where, todo=UNREADABLE_ADVICE) from error
            log.warning("artifact_unreadable", reason=str(error))
            sound = False
        if not sound:
            log.warning("artifact_damaged", artifact=row.id, path=row.path)
            unsound.append(row.id)
    return unsound
