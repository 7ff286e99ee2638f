"""Measures how far our embeddings lie from `transformers.EsmModel` in float32, sequence by sequence.

    python3 -m benchmarks.gpu_fidelity [--records 300]

The sequences are those of the workload `mixed`, the weights random in FastESM2's full shape, the same for all.
The reference computes each sequence alone and without padding. Of each embedding the report tells the relative
L2 distance from the reference's, the largest difference of a number, and whether its nearest neighbour among
the other sequences is the reference's. Random sequences through random weights lie close together,
so neighbours change places more easily here than among proteins.

Prints the worst and the median of each method; benchmarks/results/gpu_fidelity.json has a row for each method
and sequence. To be carried along: what `benchmarks.gpu_extract` names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.baselines import embed_existing, make_esm
from benchmarks.conditions import describe_machine, save
from benchmarks.workloads import write_fasta
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.extraction import embed
from virnucpro_core.embedding.loading import adopt_weights, build_model
from virnucpro_core.embedding.model import exact_products
from virnucpro_core.embedding.reference import find_nearest, relative_l2
from virnucpro_core.recipe import Dtype
from virnucpro_core.sequences.fasta import RecordBatch, parse_records

RESULTS = Path(__file__).parent / "results" / "gpu_fidelity.json"

METHODS: dict[str, tuple[Dtype, KernelPlan | None]] = {
    "float16": ("float16", KernelPlan.PACKED_FUSED),
    "bfloat16": ("bfloat16", KernelPlan.PACKED_FUSED),
    "fp8": ("fp8", None),
    "packed_eager": ("bfloat16", KernelPlan.PACKED_VARLEN),
}
"""Dtype and kernel plan; None where the dtype has only one."""


def make_batch(records: int) -> RecordBatch:
    with tempfile.TemporaryDirectory(prefix="gpu-fidelity-") as folder:
        path = Path(folder, "input.fasta")
        write_fasta(path, "mixed", records)
        return parse_records(path.read_bytes(), first_record=1)


def compare(
    method: str, batch: RecordBatch, ours: NDArray[np.float32], theirs: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """A row for each sequence; the embeddings are float32 (n, 1280)."""
    rows = torch.from_numpy(ours), torch.from_numpy(theirs)
    difference = (rows[0] - rows[1]).abs().amax(dim=1).tolist()
    relative = relative_l2(*rows).tolist()
    same = (find_nearest(rows[0]) == find_nearest(rows[1])).tolist()
    return [
        {
            "method": method,
            "sequence": batch.ids[index],
            "residues": int(batch.offsets[index + 1] - batch.offsets[index]),
            "relative_l2": relative[index],
            "max_abs": difference[index],
            "same_nearest": same[index],
        }
        for index in range(len(ours))
    ]


def format_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The worst and the median of each method as a table in Markdown."""
    lines = [
        "| method | relative L2, worst | median | largest difference | same nearest neighbour |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        relative = [row["relative_l2"] for row in mine]
        lines.append(
            f"| {method} | {max(relative):.1e} | {np.median(relative):.1e} |"
            f" {max(row['max_abs'] for row in mine):.1e} |"
            f" {sum(row['same_nearest'] for row in mine)} of {len(mine)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our embeddings with transformers' in float32.")
    parser.add_argument("--records", type=int, default=300, help="sequences of the mixed workload")
    records = parser.parse_args().records
    device = torch.device("cuda")
    batch = make_batch(records)
    module = make_esm(device)
    with exact_products():
        theirs = embed_existing(module, batch, tokens=1).embeddings
    weights = adopt_weights(module)
    rows: list[dict[str, Any]] = []
    for method, (dtype, plan) in METHODS.items():
        model = build_model(weights, device, dtype, plan)
        extracted = embed(model, batch)
        if extracted.failures:
            raise RuntimeError(f"{method}: {extracted.failures[0]}")
        rows += compare(method, batch, extracted.embeddings, theirs)
        print(f"{method}: {model.execution()}", flush=True)
    save(RESULTS, {"conditions": describe_machine(), "rows": rows})
    print(format_summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
