"""Verification: a job's files, looked at again and compared with what the ledger says of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Connection, Engine

from virnucpro_core.errors import ArtifactError, ServiceError
from virnucpro_core.features.files import hash_file, is_unreadable
from virnucpro_core.features.manifests import read_manifest
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.queries import (
    UNREADABLE_ADVICE,
    ArtifactRow,
    artifacts_of,
    find_lost,
    find_size,
    get_job,
    submissions_of,
)
from virnucpro_core.ledger.transitions import VALIDATE
from virnucpro_core.ledger.work import FAILURES, JOBS, MANIFEST, MERGED, REPORT, SUFFIXES, file_name


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is not as the ledger says, or cannot be compared with it.

    Attributes:
        path: relative to the output root.
        readable: whether it could be looked at; one that could not may be intact, and does not count as lost.
    """

    path: str
    what: str
    readable: bool = True


@dataclass(frozen=True, slots=True)
class Verification:
    """What looking at a job's files found.

    Attributes:
        files: files that were looked at, published ones included.
        bytes: size of the artifacts, by the ledger.
        faults: the files that are missing or altered.
        lost: ids of the artifacts that `resume` has to be told are lost, so that the faults are mended.
    """

    job_id: int
    files: int
    bytes: int
    faults: tuple[Fault, ...]
    lost: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    def require_readable(self) -> None:
        """Refuse to have files made again while others may be intact behind a fault of the file system.

        Raises:
            ServiceError: a file could not be read.
        """
        unread = [fault for fault in self.faults if not fault.readable]
        if unread:
            raise ServiceError(
                f"{len(unread)} of job {self.job_id}'s files cannot be read",
                where=f"{unread[0].path}: {unread[0].what}",
                todo=UNREADABLE_ADVICE,
            )


@dataclass(frozen=True, slots=True)
class JobFiles:
    """The files that a job should have.

    Attributes:
        artifacts: of its current generation.
        published: for each published path, relative to the output root, the checksums that it may have.
    """

    artifacts: list[ArtifactRow]
    published: dict[str, Collection[str]]


@dataclass(slots=True)
class Reader:
    """Compares files with checksums; a file that has several names (hard links) is read once."""

    digests: dict[tuple[int, int], str] = field(default_factory=dict)

    def compare(self, output_root: Path, name: str, expected: Collection[str]) -> Fault | None:
        """How a file differs from what is expected; None if its sha256 is one of `expected`."""
        path = output_root / name
        try:
            status = path.stat()
            inode = (status.st_dev, status.st_ino)
            if inode not in self.digests:
                self.digests[inode] = hash_file(path)
        except (OSError, ArtifactError) as error:
            cause = error.__cause__ if isinstance(error, ArtifactError) else error
            if isinstance(cause, FileNotFoundError):
                return Fault(name, "it is missing")
            # What is cut short while it is read is lost, too.
            return Fault(name, f"it cannot be read: {error}", readable=not is_unreadable(error))
        found = self.digests[inode]
        if found in expected:
            return None
        return Fault(name, f"its sha256 is {found}, which is not what was recorded")


def verify_job(
    ledger: Engine, output_root: Path, job_id: int, *, on_progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read all files of a job's current generation, and compare their bytes with the ledger's checksums.

    Args:
        on_progress: called with the bytes of artifacts compared so far, and with all there are.

    Raises:
        JobError: there is no such job.
        ServiceError: this host does not see the output folder.
    """
    files = in_transaction(ledger, find_files, output_root, job_id)
    total = sum(artifact.bytes for artifact in files.artifacts)
    reader = Reader()
    faults: dict[str, Fault | None] = {}
    done = 0
    for artifact in files.artifacts:
        faults[artifact.path] = reader.compare(output_root, artifact.path, {artifact.sha256})
        done += artifact.bytes
        if on_progress is not None:
            on_progress(done, total)
    for path, expected in files.published.items():
        faults[path] = reader.compare(output_root, path, expected)
    return conclude(job_id, files, faults)


def look_at_job(ledger: Engine, output_root: Path, job_id: int) -> Verification:
    """As `verify_job`, but reads no contents: files have to exist, and artifacts to have their size.

    Raises:
        JobError: there is no such job.
        ServiceError: this host does not see the output folder, or may not look into it.
    """
    files = in_transaction(ledger, find_files, output_root, job_id)
    lost = set(find_lost(files.artifacts, output_root))
    faults = {
        a.path: Fault(a.path, "it is missing or has another size") if a.id in lost else None
        for a in files.artifacts
    }
    faults |= {
        path: Fault(path, "it is missing") if find_size(output_root / path) is None else None
        for path in files.published
    }
    return conclude(job_id, files, faults)


def find_files(tx: Connection, output_root: Path, job_id: int) -> JobFiles:
    """The files that a job should have in its current generation."""
    job = get_job(tx, job_id)
    artifacts = artifacts_of(tx, job_id)
    if artifacts:
        require_output(output_root)
    recorded = frozenset(artifact.sha256 for artifact in artifacts)
    published: dict[str, Collection[str]] = {}
    for submission in submissions_of(tx, job_id):
        if submission.published_generation != job.generation:
            continue
        base = f"{submission.folder(job.input_sha256, job.recipe_sha256)}/{submission.stem}"
        published[base + SUFFIXES[MANIFEST]] = recorded
        # A manifest that cannot be read is compared, too, and is the fault to report.
        with suppress(ArtifactError):
            for file in read_manifest(output_root / (base + SUFFIXES[MANIFEST])).files:
                published[str(Path(base).with_name(file.name))] = recorded & {file.sha256}
        if job.failed:
            published[base + SUFFIXES[FAILURES]] = recorded
        if any(Path(artifact.path).name == file_name(REPORT, submission.id) for artifact in artifacts):
            published[base + SUFFIXES[REPORT]] = recorded
        if submission.nucleotide_path and not submission.error:
            name = file_name(MERGED, submission.id)
            published[base + SUFFIXES[MERGED]] = {a.sha256 for a in artifacts if a.path.endswith(f"/{name}")}
    return JobFiles(artifacts, published)


def require_output(output_root: Path) -> None:
    """Refuse to look for files where none can be: all of them would be taken for lost, and made again.

    A volume that is not mounted is an empty folder, and a wrong setting another one: neither has workers' files.
    """
    if not (output_root / JOBS).is_dir():
        raise ServiceError(
            "this host does not see the output folder: what workers write is not in it",
            where=str(output_root / JOBS),
            todo="Mount it here, or set VIRNUCPRO_OUTPUT_ROOT. If it was emptied on purpose, make this folder.",
        )


def conclude(job_id: int, files: JobFiles, faults: dict[str, Fault | None]) -> Verification:
    """Sum up what was found per path. Published files are mended by validating, and so publishing, again."""
    lost = {path for path, fault in faults.items() if fault is not None and fault.readable}
    publish_again = not lost.isdisjoint(files.published)
    return Verification(
        job_id=job_id,
        files=len(faults),
        bytes=sum(artifact.bytes for artifact in files.artifacts),
        faults=tuple(fault for fault in faults.values() if fault is not None),
        lost=tuple(
            artifact.id
            for artifact in files.artifacts
            if artifact.path in lost or (publish_again and artifact.stage == VALIDATE)
        ),
    )
