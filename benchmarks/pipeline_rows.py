"""The rows of `gpu_pipeline`: from passes and from the ledger's times, with ratios, as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sqlalchemy import Row

from benchmarks.bare_process import Pass
from virnucpro_core.errors import ExecutionError

HEAD = """\
| | GPUs | residues/s | of bare | of one | GPU share | between chunks, ms | tail, s | seconds | whole, s | chunks |
|---|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row.

    Attributes:
        seconds: from the first read to the last artifact, or from the first claim to the last commit.
        gpu_share: for each GPU, the share of `seconds` that its chunks took to embed.
        between_chunks_ms: median time from a claim to the same worker's next one, less that chunk's embedding.
        tail_seconds: time from the last commit of the worker that was done first to that of the other.
        whole_seconds: from submission to the end of the job: scanned, extracted, merged, exported, validated.
    """

    name: str
    gpus: int
    residues_per_s: float
    seconds: float
    chunks: int
    gpu_share: list[float]
    ratio_to_bare: float | None = None
    ratio_to_one: float | None = None
    between_chunks_ms: float | None = None
    tail_seconds: float | None = None
    whole_seconds: float | None = None


def row_of_passes(name: str, passes: Sequence[Pass]) -> Measured:
    """The row of bare passes that ran at the same time, a GPU each."""
    return Measured(
        name=name,
        gpus=len(passes),
        residues_per_s=sum(each.residues / each.seconds for each in passes),
        seconds=max(each.seconds for each in passes),
        chunks=sum(each.chunks for each in passes),
        gpu_share=[each.embed_seconds / each.seconds for each in passes],
    )


def row_of_job(name: str, chunks: Sequence[Row[Any]], gpus: int, whole_seconds: float) -> Measured:
    """The row of a job's extract chunks, as `Pipeline.extracted` returns them.

    Raises:
        ExecutionError: they are not what was to be measured: a worker took no part, or a chunk ran twice.
    """
    by_worker: dict[int, list[Row[Any]]] = {}
    for chunk in chunks:
        by_worker.setdefault(chunk.worker_id, []).append(chunk)
    devices = {chunk.device for chunk in chunks}
    if len(by_worker) != gpus or (len(devices) != gpus and devices != {"cpu"}):
        raise ExecutionError(
            f"{len(by_worker)} workers on {sorted(devices)} ran {name!r}, not one on each GPU"
        )
    if any(chunk.attempts != 1 for chunk in chunks):
        raise ExecutionError(f"a chunk of {name!r} was claimed twice: its times mean nothing")
    parts = [by_worker[worker] for worker in sorted(by_worker)]
    seconds = max(chunk.finished for chunk in chunks) - min(chunk.claimed for chunk in chunks)
    ends = [max(chunk.finished for chunk in part) for part in parts]
    gaps = [b.claimed - a.claimed - a.seconds for part in parts for a, b in pairwise(part)]
    return Measured(
        name=name,
        gpus=gpus,
        residues_per_s=sum(chunk.residues for chunk in chunks) / seconds,
        seconds=seconds,
        chunks=len(chunks),
        gpu_share=[sum(chunk.seconds for chunk in part) / seconds for part in parts],
        between_chunks_ms=1000 * statistics.median(gaps) if gaps else None,
        tail_seconds=max(ends) - min(ends),
        whole_seconds=whole_seconds,
    )


def add_ratios(rows: Sequence[Measured]) -> list[Measured]:
    """The rows with their rates compared to those of `bare` and `one`."""
    rate = {row.name: row.residues_per_s for row in rows}
    return [
        replace(
            row,
            ratio_to_bare=row.residues_per_s / rate["bare"],
            ratio_to_one=row.residues_per_s / rate["one"],
        )
        for row in rows
    ]


def format_row(row: Measured) -> str:
    """A row of the table that HEAD begins."""

    def show(number: float | None, digits: int) -> str:
        return "" if number is None else f"{number:.{digits}f}"

    cells = [
        row.name,
        str(row.gpus),
        f"{row.residues_per_s:,.0f}",
        show(row.ratio_to_bare, 3),
        show(row.ratio_to_one, 3),
        ", ".join(f"{share:.1%}" for share in row.gpu_share),
        show(row.between_chunks_ms, 1),
        show(row.tail_seconds, 2),
        show(row.seconds, 2),
        show(row.whole_seconds, 2),
        str(row.chunks),
    ]
    return f"| {' | '.join(cells)} |"


def explain(bare_both: Measured, one: Measured, two: Measured) -> str:
    """The ratios that count, and what bounds them."""
    assert two.tail_seconds is not None
    idle = two.tail_seconds / (two.gpus * two.seconds)
    best = two.chunks / math.ceil(two.chunks / two.gpus)
    return (
        f"two / one: {two.ratio_to_one:.3f} (at least 1.9, aim 1.95). one / bare: {one.ratio_to_bare:.3f} (at least "
        f"0.95, aim 0.97).\n{two.chunks} equal chunks on two workers allow {best:.3f} at most. For the last "
        f"{two.tail_seconds:.2f} s one of the two had nothing left to do: {idle:.1%} of their time.\nWithout ledger "
        f"and broker, two GPUs at once did {bare_both.ratio_to_bare:.3f} times what the first did alone."
    )
