"""What passes between the ledger and those who use it: work to do, claims, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from virnucpro_core.failures import Failure
from virnucpro_core.recipe import Recipe
from virnucpro_core.sequences.chunks import ChunkRange
from virnucpro_core.sequences.compression import Compression

RESULTS, JOBS = "results", "jobs"
"""The folders below the output root that results are published in, and that jobs keep their artifacts in."""

EXPORT, MERGED, FAILURES, MANIFEST, REPORT = "export", "merged", "failures", "manifest", "report"
"""Kinds of artifacts, beside the matrix."""


SUFFIXES = {
    MERGED: "_merged.pt",
    FAILURES: ".failures.jsonl",
    MANIFEST: ".manifest.json",
    REPORT: ".report.html",
}
"""What follows the stem in the name that a file is published under, by its kind; exports have `export_name`."""


def export_name(stem: str, artifact: str) -> str:
    """The name that an exported file is published under; as an artifact it is `result.pt`, or a shard of that."""
    return artifact.replace("result", f"{stem}_ESM", 1)


def file_name(kind: str, submission_id: int) -> str:
    """The file name of an artifact made for one submission: `merged_7.pt`, `manifest_7.json`, `report_7.html`."""
    return f"{kind}_{submission_id}{PurePath(SUFFIXES[kind]).suffix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What somebody asks of a job: the file, the name of its result, who asked and how much may fail."""

    path: str
    stem: str
    requested_by: str
    max_failed_share: float
    label: str = ""
    nucleotide_path: str = ""
    nucleotide_sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """The job that a registration found or made (`created`)."""

    job_id: int
    generation: int
    created: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """What a job has to do (again).

    Attributes:
        chunks: extract chunks in all.
        kept: those that are done and stay so.
        lost: those whose artifact was lost and that have to run again.
        waiting: chunks of the current stage that are due to run.
    """

    chunks: int
    kept: int
    lost: int
    waiting: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One chunk and all that is needed to run it. Reading it claims nothing."""

    chunk_id: int
    job_id: int
    generation: int
    stage: str
    chunks_total: int
    range: ChunkRange
    input_sha256: str
    location: str
    compression: Compression
    stem: str
    model: str
    model_path: str
    recipe: Recipe

    @property
    def title(self) -> str:
        """What a person reads in a queue: job, file, chunk k of n."""
        return f"job {self.job_id} {self.stem}: {self.stage} chunk {self.range.ordinal + 1} of {self.chunks_total}"

    def artifact_folder(self) -> str:
        """Where the chunk's artifacts go, relative to the output root."""
        return artifact_folder(self.job_id, self.generation, self.stage)


@dataclass(frozen=True, slots=True)
class Claim:
    """A lease on a chunk. Only the holder of `token` may commit.

    Attributes:
        attempt: the number of this claim, counted from 1.
        deaths: how many of those before ended with their worker's process.
        setback: how the last one ended, if it did not end well.
    """

    work: Work
    worker_id: int
    token: int
    attempt: int
    deaths: int = 0
    setback: str | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether a worker has died while it held the chunk."""
        return self.deaths > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NewArtifact:
    """A file to record: path relative to the output root, sha256, bytes and rows."""

    kind: str
    path: str
    sha256: str
    bytes: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a chunk's run produced. Later stages carry the job's own counts over.

    Attributes:
        tokens, positions: tokens of the sequences, and those that the model took in, padding and repeats included.
        published: ids of the submissions that have a result now.
        unmerged: why a submission's nucleotides were not merged, by the submission's id.
    """

    artifacts: Sequence[NewArtifact]
    embeddings: int = 0
    failures: Sequence[Failure] = ()
    truncated: int = 0
    unknown: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    execution: dict[str, Any] | None = None
    published: Sequence[int] = ()
    unmerged: Mapping[int, str] = field(default_factory=dict)


def job_folder(job_id: int) -> str:
    """A job's folder, relative to the output root."""
    return f"{JOBS}/{job_id:08d}"


def artifact_folder(job_id: int, generation: int, stage: str) -> str:
    """Where a stage of a job's generation keeps its artifacts, relative to the output root."""
    return f"{job_folder(job_id)}/g{generation}/{stage}"


def result_folder(
    stem: str, input_sha256: str, recipe_sha256: str, *, label: str = "", nucleotide_sha256: str = ""
) -> str:
    """Where a result is published, relative to the output root.

    Equal stems do not collide: the name holds the content, the recipe and, if the result is merged, what with.
    """
    folder = f"{RESULTS}/{stem}-{input_sha256[:12]}-{recipe_sha256[:8]}"
    if not nucleotide_sha256:
        return folder
    return f"{folder}-{nucleotide_sha256[:8]}{label and '-'}{label}"
