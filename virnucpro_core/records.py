"""Records: finding one of a job's by its number or id, and reading those of a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, text

from virnucpro_core.errors import JobError
from virnucpro_core.features.matrices import Matrix, open_matrix
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import ArtifactRow, artifacts_of, chunk_ranges, get_job
from virnucpro_core.ledger.transitions import MATRIX, MERGE
from virnucpro_core.roots import OUTPUT_ADVICE, resolve_below
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.scan import read_range
from virnucpro_core.settings import Settings

WHOLE = 1 << 62  # residues: no record is cut
IDS_AT_ONCE = 100_000
MOST_DIGITS = 18  # of a record's number


def look_up_records(
    ledger: Engine, settings: Settings, job_id: int, wanted: str, *, as_id: bool = False
) -> list[int]:
    """The numbers of the records that a person means by a number or an id; several if the id is not unique.

    Digits are a number if the job has that many records, unless they are said to be an id. Ids are looked up among
    the failures and in the result; before there is one, in the input.

    Raises:
        JobError: there is no such job, or no such record in it.
        InputError: there is no result yet, and the input cannot be read.
        ArtifactError: there is a result, and it cannot be read.
    """
    job = in_transaction(ledger, get_job, job_id)
    is_short = len(wanted) <= MOST_DIGITS  # Python refuses to read a number of thousands of digits
    if not as_id and is_short and wanted.isdecimal() and 1 <= int(wanted) <= job.records:
        return [int(wanted)]
    result = find_result(settings, in_transaction(ledger, artifacts_of, job_id, stage=MERGE))
    if result is None:
        found = list(search_input(ledger, settings, job, wanted))
    else:
        found = [*in_transaction(ledger, failed_records, job_id, wanted), *search_result(result, wanted)]
    if not found:
        raise JobError(
            f"job {job_id} has no record with the id {wanted!r}",
            todo=f"An id is the first word of its header; a record's number, 1 to {job.records}, will do, too.",
        )
    return sorted(found)


def find_result(settings: Settings, merged: Sequence[ArtifactRow]) -> Matrix | None:
    """A job's merged embeddings, once there are any.

    Args:
        merged: the artifacts of its merge.

    Raises:
        ArtifactError: they are recorded, and cannot be read.
        OutsideError: they are recorded as lying elsewhere.
    """
    root = settings.output_root.resolve()
    for row in merged:
        if row.kind == MATRIX:
            return open_matrix(resolve_below(root / row.path, [root], todo=OUTPUT_ADVICE))
    return None


def search_result(result: Matrix, wanted: str) -> Iterator[int]:
    for start in range(0, len(result), IDS_AT_ONCE):
        for row, found in enumerate(result.ids(start, start + IDS_AT_ONCE), start):
            if found == wanted:
                yield int(result.records[row])


def search_input(ledger: Engine, settings: Settings, job: Row[Any], wanted: str) -> Iterator[int]:
    for chunk in in_transaction(ledger, chunk_ranges, job.id):
        batch = read_records(settings, job, chunk)
        yield from (batch.first_record + row for row, found in enumerate(batch.ids) if found == wanted)


def failed_records(tx: Connection, job_id: int, wanted: str) -> list[int]:
    rows = tx.execute(
        text("""
            SELECT f.record FROM failures f JOIN jobs j ON j.id = f.job_id AND j.generation = f.generation
             WHERE f.job_id = :job AND f.record_id = :id
        """),
        {"job": job_id, "id": wanted},
    )
    return list(rows.scalars())


def read_records(settings: Settings, job: Row[Any], chunk: ChunkRange) -> RecordBatch:
    """A chunk's records, as its recipe takes them, but whole.

    Raises:
        InputError: the input is gone, changed, or outside the folders that inputs are read from.
    """
    compression = Compression(job.compression)
    data = read_range(job.location, compression, chunk, roots=settings.input_folders)
    return parse_records(
        data, first_record=chunk.first_record, residues=job.recipe["residues"], truncation=WHOLE
    )
