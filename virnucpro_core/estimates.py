"""Estimates: what a file will ask for, before any time of a GPU is spent on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from virnucpro_core.ledger.queries import find_job as find_job_id
from virnucpro_core.ledger.queries import get_job
from virnucpro_core.ledger.rates import Rate, rates_of
from virnucpro_core.ledger.registration import recipe_for
from virnucpro_core.ledger.submissions import find_nucleotides
from virnucpro_core.recipe import EMBEDDING_WIDTH, TRUNCATION
from virnucpro_core.sequences.compression import Compression
from virnucpro_core.sequences.inspection import RecordInspector
from virnucpro_core.sequences.scan import scan_input
from virnucpro_core.settings import Settings

ROW_BYTES = 4 * EMBEDDING_WIDTH
ROW_BYTES_OF_MATRIX = ROW_BYTES + 16  # a record number, and where the id ends
ROW_BYTES_OF_MERGED = 4 * (768 + EMBEDDING_WIDTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEstimate:
    """What follows from a file alone.

    Attributes:
        chunks: as its job will have.
        embeddings: records that can be embedded, unless memory or the numbers fail them.
        rejects: records that cannot, by reason.
        truncated: records that will be cut; `unknown` counts residues that become <unk>.
        tokens: to be computed.
        disk: bytes at least, by what they are for. Published files are links, and take none.
    """

    path: str
    sha256: str
    records: int
    residues: int
    chunks: int
    embeddings: int
    rejects: dict[str, int]
    truncated: int
    unknown: int
    tokens: int
    disk: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownJob:
    """A file's job, if it has one under the present recipe."""

    id: int
    state: str
    chunks_left: int
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Hours of computing, at the rate of one host in one execution class.

    Attributes:
        hours: on one worker.
        hours_now: on all workers of that host and kind of device that live now; None if none does.
    """

    rate: Rate
    hours: float
    hours_now: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DurationNow:
    """Hours of computing on all `workers` that live now, on hosts that have a rate, side by side."""

    hours: float
    workers: int


def estimate_file(
    path: Path,
    settings: Settings,
    *,
    allow_nucleotides: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> FileEstimate:
    """Read a file once, in bounded memory; nothing is written.

    Raises:
        OutsideError: the file lies outside the folders that inputs are read from.
        InputError: it cannot be used as a whole.
    """
    inspector = RecordInspector(residues=settings.residues, truncation=TRUNCATION)
    scanned = scan_input(
        path,
        chunk_tokens=settings.chunk_tokens,
        spool_root=None,
        roots=settings.input_folders,
        max_expansion=settings.max_expansion,
        truncation=TRUNCATION,
        allow_nucleotides=allow_nucleotides,
        on_progress=on_progress,
        on_block=inspector.feed,
    )
    inspector.finish()
    rows = inspector.embeddings
    matrix = rows * ROW_BYTES_OF_MATRIX + inspector.id_bytes
    disk = {
        "chunk artifacts": matrix,
        "result matrix": matrix,
        "export": rows * ROW_BYTES + inspector.id_bytes,
    }
    if scanned.compression in (Compression.GZIP, Compression.ZSTD):
        disk["uncompressed copy"] = inspector.bytes
    if find_nucleotides(path) is not None:
        disk["merged with nucleotides"] = rows * ROW_BYTES_OF_MERGED
    return FileEstimate(
        path=scanned.path,
        sha256=scanned.sha256,
        records=scanned.records,
        residues=scanned.residues,
        chunks=len(scanned.chunks),
        embeddings=rows,
        rejects={str(reason): count for reason, count in inspector.rejects.most_common()},
        truncated=inspector.truncated,
        unknown=inspector.unknown,
        tokens=inspector.tokens,
        disk=disk,
    )


def find_known_job(tx: Connection, settings: Settings, sha256: str, model: str) -> KnownJob | None:
    """The job that a file would lead to if it was submitted now.

    Raises:
        WeightsError: no model has that name.
    """
    recipe = recipe_for(tx, model, dtype=settings.dtype, residues=settings.residues)
    job_id = find_job_id(tx, sha256, recipe.sha256)
    if job_id is None:
        return None
    job = get_job(tx, job_id)
    return KnownJob(id=job.id, state=job.state, chunks_left=job.chunks_left, stage=job.stage)


def find_durations(tx: Connection, settings: Settings, tokens: int, model: str | None) -> list[Duration]:
    """How long so many tokens take, by what the ledger knows of earlier jobs in the settings' dtype."""
    return [durations_at(rate, tokens) for rate in rates_of(tx, dtype=settings.dtype, model=model)]


def durations_at(rate: Rate, tokens: int) -> Duration:
    hours = tokens / rate.tokens_per_second / 3600
    return Duration(rate=rate, hours=hours, hours_now=hours / rate.workers_now if rate.workers_now else None)


def sum_up_now(durations: Sequence[Duration]) -> DurationNow | None:
    """What the live workers of all these hosts take together; None if none lives.

    Args:
        durations: the newest first; of a host's older classes on the same kind of device, the workers that live
            now are the same.
    """
    newest: dict[tuple[str, bool], Duration] = {}
    for duration in durations:
        newest.setdefault((duration.rate.host, duration.rate.execution["device"] == "cpu"), duration)
    shares = [one.rate.workers_now / one.hours for one in newest.values()]
    workers = sum(one.rate.workers_now for one in newest.values())
    return DurationNow(hours=1 / sum(shares), workers=workers) if workers else None


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def total_disk(estimates: Sequence[FileEstimate]) -> int:
    """Bytes at least that the files together need."""
    return sum(sum(estimate.disk.values()) for estimate in estimates)
