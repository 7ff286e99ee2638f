"""Measures extraction on one GPU, from FASTA to written chunk artifacts, beside the loops that others write.

    python3 -m benchmarks.gpu_extract [--seconds 6] [--reads 1000000]

Six methods embed four workloads with the same random weights in FastESM2's full shape and in the same frame
(`benchmarks.bare`): `existing` and `padded` are loops over `transformers.EsmModel` in float16, `packed_eager`
is our packed plan in bfloat16 without kernels of our own, and `float16`, `bfloat16` and `fp8` are what we ship.
Slow methods get fewer records of a workload, so that each takes about `--seconds`; `--reads` short reads are
embedded in float16, with a look at how busy the GPU is (`benchmarks.busy`). The card is coolest for the methods
that come first, and those are not ours. Before it is timed, a loop over `EsmModel` sees the whole input, as
nearly every batch has a shape of its own; ours see a few packs.

`share` is of the burst ceiling of bfloat16 products, `own_share` of that of the method's own dtype. Ceilings are
measured before all methods and after them, and the larger counts. Each is measured while hot, too: power limits
the card, so work that lasts longer than a moment meets the hot one.

The table is printed and goes to benchmarks/results/gpu_extract.json; what it was measured under goes to
gpu_extract_conditions.json beside it, with the rate at which a job's `.pt` file is written.

It runs from the checkout alone on a machine that has torch, triton, transformers, numpy and safetensors, a C
compiler and Python's headers. To be carried there, on PYTHONPATH: structlog and zstandard.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.bare import Embed, Result, extract_chunks
from benchmarks.baselines import embed_existing, embed_padded, make_esm
from benchmarks.busy import measure_busy
from benchmarks.conditions import describe_machine, save
from benchmarks.workloads import WORKLOADS, count_flops, draw_lengths, measure_ceilings, write_fasta
from virnucpro_core.embedding import extraction
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.loading import adopt_weights, build_model
from virnucpro_core.embedding.model import Weights
from virnucpro_core.features.exports import write_export
from virnucpro_core.features.matrices import open_matrix, write_matrix
from virnucpro_core.recipe import EMBEDDING_WIDTH, Dtype

RESULTS = Path(__file__).parent / "results" / "gpu_extract.json"
CONDITIONS = RESULTS.with_name("gpu_extract_conditions.json")

EXPORT_ROWS = 100_000
PROFILED_READS = 100_000
WARM_RESIDUES = 60_000


@dataclass(frozen=True, slots=True)
class Method:
    """A way to embed.

    Attributes:
        dtype: of its matrix products.
        rate: residues per second to expect, which only decides how many records it gets.
        loop: the loop over `EsmModel`; None for ours.
        plan: the kernel plan of ours, so that no slower one steps in; None where the dtype has only one.
    """

    dtype: Dtype
    rate: int
    loop: Callable[..., Any] | None = None
    plan: KernelPlan | None = None


METHODS = {
    "existing": Method("float16", 80_000, loop=embed_existing),
    "padded": Method("float16", 170_000, loop=embed_padded),
    "packed_eager": Method("bfloat16", 220_000, plan=KernelPlan.PACKED_VARLEN),
    "float16": Method("float16", 390_000, plan=KernelPlan.PACKED_FUSED),
    "bfloat16": Method("bfloat16", 410_000, plan=KernelPlan.PACKED_FUSED),
    "fp8": Method("fp8", 550_000),
}


def prepare(
    method: Method, module: nn.Module, weights: Weights, device: torch.device
) -> functools.partial[Any]:
    """What embeds by a method; its first argument is the model.

    Args:
        method: the method.
        module: an `EsmModel` in float32.
        weights: the same, for our models.
        device: where to compute.
    """
    if method.loop is None:
        return functools.partial(extraction.embed, build_model(weights, device, method.dtype, method.plan))
    return functools.partial(method.loop, copy.deepcopy(module).to(device, getattr(torch, method.dtype)))


def count_records(residues: float, workload: str) -> int:
    """Records of a workload that have about so many residues."""
    return max(round(residues / float(draw_lengths(workload, 10_000).mean())), 1)


def run(embed: Embed, workload: str, records: int) -> Result:
    """Embeds so many records of a workload, in a folder that is gone afterwards.

    Raises:
        RuntimeError: not every record has an embedding.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-extract-") as folder:
        path = Path(folder, "input.fasta")
        write_fasta(path, workload, records)
        result = extract_chunks(path, Path(folder), embed)
    if result.rows != records:
        raise RuntimeError(f"{result.rows} embeddings of {records} records of {workload}")
    return result


@dataclass(frozen=True, slots=True)
class Measured:
    """A method's run on a workload, and the GPU memory that was allocated at most, in bytes."""

    workload: str
    method: str
    result: Result
    peak_bytes: int


def make_rows(measured: Sequence[Measured], bursts: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of the table; `bursts` are the burst ceilings by dtype, TFLOP/s."""
    existing = {each.workload: each.result for each in measured if each.method == "existing"}
    return [
        _make_row(each.workload, each.method, each.result, each.peak_bytes, existing[each.workload], bursts)
        for each in measured
    ]


def largest_bursts(ceilings: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """By dtype the largest burst ceiling that was measured, whenever that was."""
    return {dtype: max(each[dtype]["burst"] for each in ceilings.values()) for dtype in ceilings["before"]}


def _make_row(
    workload: str,
    name: str,
    result: Result,
    peak_bytes: int,
    existing: Result,
    bursts: Mapping[str, float],
) -> dict[str, Any]:
    reached = count_flops(draw_lengths(workload, result.records)) / result.seconds / 1e12
    return {
        "workload": workload,
        "method": name,
        "residues_per_s": round(result.residues_per_s),
        "ratio": round(result.residues_per_s / existing.residues_per_s, 3),
        "share": round(reached / bursts["bfloat16"], 4),
        "own_share": round(reached / bursts[METHODS[name].dtype], 4),
        "peak_gib": round(peak_bytes / 2**30, 2),
        "sequences_per_s": round(result.records / result.seconds),
        "records": result.records,
    }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown, by workload."""
    lines = [
        "| workload | method | residues/s | of `existing` | share | own share | peak GiB | sequences/s | records |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['workload']} | {row['method']} | {row['residues_per_s']:,} | {row['ratio']:.2f} |"
        f" {row['share']:.1%} | {row['own_share']:.1%} | {row['peak_gib']:.2f} | {row['sequences_per_s']:,} |"
        f" {row['records']:,} |"
        for workload in WORKLOADS
        for row in rows
        if row["workload"] == workload
    ]
    return "\n".join(lines)


def measure_export(rows: int) -> dict[str, float]:
    """How fast a job's `.pt` file is written, from a matrix in the page cache."""
    embeddings = np.random.default_rng(0).random((rows, EMBEDDING_WIDTH), dtype=np.float32)
    ids = [f"reads_{number:09d}" for number in range(1, rows + 1)]
    with tempfile.TemporaryDirectory(prefix="gpu-extract-") as folder:
        written = write_matrix(Path(folder, "a.safetensors"), ids, np.arange(1, rows + 1), embeddings, {})
        started = time.perf_counter()
        write_export(Path(folder, "a.pt"), open_matrix(written.path))
        seconds = time.perf_counter() - started
    return {"rows": rows, "seconds": seconds, "rows_per_s": round(rows / seconds)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure extraction on one GPU beside other loops.")
    parser.add_argument("--seconds", type=float, default=6.0, help="time of each method on each workload")
    parser.add_argument("--reads", type=int, default=1_000_000, help="short reads to embed in float16")
    arguments = parser.parse_args()
    device = torch.device("cuda")

    conditions = describe_machine()
    conditions["ceilings_tflops"] = {"before": measure_ceilings()}
    conditions["execution"] = {}
    print(json.dumps(conditions, indent=2), flush=True)
    # On the host, so that it does not count in any method's memory.
    module = make_esm(device).cpu()
    weights = adopt_weights(module)

    measured: list[Measured] = []
    for name, method in METHODS.items():
        embed = prepare(method, module, weights, device)
        model = embed.args[0]
        if method.loop is None:
            conditions["execution"][name] = str(model.execution())
        for workload in WORKLOADS:
            records = count_records(method.rate * arguments.seconds, workload)
            run(embed, workload, records if method.loop else count_records(WARM_RESIDUES, workload))
            torch.cuda.reset_peak_memory_stats()
            if (name, workload) == ("float16", "reads"):
                result, conditions["gpu_busy"] = measure_busy(
                    model,
                    functools.partial(run, embed, workload, arguments.reads),
                    functools.partial(run, embed, workload, min(arguments.reads, PROFILED_READS)),
                )
                print(json.dumps(conditions["gpu_busy"]), flush=True)
            else:
                result = run(embed, workload, records)
            measured.append(Measured(workload, name, result, torch.cuda.max_memory_allocated()))
            rows = make_rows(measured, largest_bursts(conditions["ceilings_tflops"]))
            print(json.dumps(rows[-1]), flush=True)
        del embed, model
        gc.collect()
        torch.cuda.empty_cache()
        # After each method: what was measured is not lost if a later one fails.
        save(RESULTS, rows)
        save(CONDITIONS, conditions)

    conditions["export"] = measure_export(EXPORT_ROWS)
    conditions["ceilings_tflops"]["after"] = measure_ceilings()
    rows = make_rows(measured, largest_bursts(conditions["ceilings_tflops"]))
    save(RESULTS, rows)
    save(CONDITIONS, conditions)
    print(json.dumps(conditions, indent=2), format_table(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
