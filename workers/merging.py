"""Merging: the finish worker's first stage. A job's chunks become one matrix, its exports, and nucleotides join."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import structlog
from sqlalchemy import Engine

from virnucpro_core.errors import ArtifactError, InputChangedError, InputError, MismatchError, VirnucproError
from virnucpro_core.features.exports import write_export
from virnucpro_core.features.matrices import Matrix, open_matrix
from virnucpro_core.features.merging import Nucleotides, merge_chunks, merge_features, read_nucleotides
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import ArtifactRow, SubmissionRow, artifacts_of, submissions_of
from virnucpro_core.ledger.transitions import EXTRACT, MATRIX, MERGE
from virnucpro_core.ledger.work import EXPORT, MERGED, NewArtifact, Result, Work, file_name
from virnucpro_core.roots import open_below
from virnucpro_core.settings import Settings
from workers.artifacts import as_new, describe_file, find_unsound, locate, stage_folder
from workers.stages import Outcome

log = structlog.get_logger()

RESULT_NAME = "result.safetensors"


def merge(ledger: Engine, work: Work, settings: Settings) -> Outcome:
    """Join a job's chunk artifacts, export them, and join them with the nucleotides that were submitted.

    What an earlier run made and is still sound is kept, so that nucleotides may come when the chunks are gone.

    Raises:
        ArtifactError: a chunk artifact is missing or damaged, or a file cannot be written.
        MismatchError: chunks do not belong together.
    """
    started = time.perf_counter()
    folder = stage_folder(work, settings)
    made = in_transaction(ledger, artifacts_of, work.job_id, stage=MERGE)
    artifacts = [keep_matrix(made, settings) or merge_rows(ledger, work, settings)]
    matrix = open_matrix(folder / RESULT_NAME)
    artifacts += keep_exports(made, matrix, settings) or export_rows(matrix, settings)
    unmerged: dict[int, str] = {}
    for submission in in_transaction(ledger, submissions_of, work.job_id):
        if not submission.nucleotide_path:
            continue
        kept = keep_merged(made, submission, work, settings)
        if kept is not None:
            artifacts.append(kept)
            continue
        try:
            nucleotides = read_submitted(submission, settings)
            merged = merge_features(
                nucleotides,
                matrix,
                folder / file_name(MERGED, submission.id),
                records=work.range.records,
                data_type=cast("Literal['host', 'viral'] | None", submission.label or None),
            )
        except (InputChangedError, MismatchError) as error:
            # one submission's mistake; the others, and the proteins alone, are fine
            log.error("nucleotides_not_merged", submission=submission.id, reason=str(error))  # noqa: TRY400
            unmerged[submission.id] = str(error)
        else:
            artifacts.append(describe_file(merged, MERGED, settings))
    return Outcome(Result(artifacts=artifacts, seconds=time.perf_counter() - started, unmerged=unmerged))


def keep_matrix(made: Sequence[ArtifactRow], settings: Settings) -> NewArtifact | None:
    """The matrix that an earlier run of merge made, if it is sound."""
    rows = [row for row in made if row.kind == MATRIX]
    return as_new(rows[0]) if rows and not find_unsound(rows, settings) else None


def keep_exports(made: Sequence[ArtifactRow], matrix: Matrix, settings: Settings) -> list[NewArtifact]:
    """The exports that an earlier run of merge made, if they are sound and hold every row; else none."""
    rows = [row for row in made if row.kind == EXPORT]
    complete = sum(row.rows for row in rows) == len(matrix)
    return [as_new(row) for row in rows] if complete and not find_unsound(rows, settings) else []


def keep_merged(
    made: Sequence[ArtifactRow], submission: SubmissionRow, work: Work, settings: Settings
) -> NewArtifact | None:
    """What a submission's nucleotides were merged to before, if it was published and is sound.

    Without this, a later submission would take it away where the nucleotides' file is gone by now.
    """
    if submission.published_generation != work.generation:
        return None  # its nucleotides may be others than those that were merged
    name = file_name(MERGED, submission.id)
    rows = [row for row in made if Path(row.path).name == name]
    return as_new(rows[0]) if rows and not find_unsound(rows, settings) else None


def merge_rows(ledger: Engine, work: Work, settings: Settings) -> NewArtifact:
    """Join a job's chunk artifacts into one matrix."""
    chunks = in_transaction(ledger, artifacts_of, work.job_id, stage=EXTRACT)
    sources = [(locate(chunk, settings), chunk.sha256) for chunk in chunks]
    written = merge_chunks(sources, stage_folder(work, settings) / RESULT_NAME)
    return describe_file(written, MATRIX, settings)


def export_rows(matrix: Matrix, settings: Settings) -> list[NewArtifact]:
    """Write the `.pt` files of a matrix beside it."""
    exports = write_export(matrix.path.with_suffix(".pt"), matrix, rows_per_file=settings.export_rows)
    return [describe_file(export, EXPORT, settings) for export in exports]


def read_submitted(submission: SubmissionRow, settings: Settings) -> Nucleotides:
    """The nucleotides that came with a submission.

    Raises:
        InputChangedError: the file is gone, unreadable, not the one that was submitted, or outside the folders
            that inputs are read from.
    """
    path = Path(submission.nucleotide_path)
    try:
        with open_below(path, settings.input_folders) as file:
            changed = hashlib.file_digest(file, "sha256").hexdigest() != submission.nucleotide_sha256
            if not changed:
                file.seek(0)
                return read_nucleotides(path, file)
    except (ArtifactError, InputError, OSError) as error:
        why = error.what if isinstance(error, VirnucproError) else error.strerror
        raise InputChangedError(
            f"the nucleotide embeddings cannot be used: {why}",
            where=str(path),
            todo="Submit a sound file.",
        ) from error
    raise InputChangedError(
        "the nucleotide embeddings were changed after registration",
        where=str(path),
        todo="Submit the file again.",
    )
