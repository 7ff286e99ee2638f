"""The GPU benchmarks compare what they say they compare, as far as a CPU can tell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import bare, workloads
from benchmarks.baselines import Rows, embed_existing, embed_padded, make_esm, plan_padded
from benchmarks.busy import cover, find_kernels
from benchmarks.gpu_extract import Measured, format_table, largest_bursts, make_rows
from benchmarks.gpu_fidelity import compare, make_batch
from benchmarks.workloads import count_flops, draw_lengths, write_fasta
from virnucpro_core.embedding.extraction import embed
from virnucpro_core.embedding.loading import adopt_weights, build_model
from virnucpro_core.features.matrices import open_matrix
from virnucpro_core.sequences.fasta import RecordBatch, parse_records

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def esm() -> nn.Module:
    torch.set_num_threads(1)
    return make_esm(CPU, layers=1)


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_a_workload_is_written_as_it_was_drawn(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "_BLOCK_RECORDS", 40)
    path = tmp_path / "input.fasta"
    write_fasta(path, name, 100)
    batch = parse_records(path.read_bytes(), first_record=1, residues="strict")
    assert not batch.failures
    assert np.diff(batch.offsets).tolist() == draw_lengths(name, 100).tolist()
    assert batch.ids == [f"{name}_{number:09d}" for number in range(1, 101)]


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_fewer_records_are_the_first_of_more(name: str) -> None:
    assert draw_lengths(name, 10).tolist() == draw_lengths(name, 2000)[:10].tolist()


def test_mixed_lengths_stay_within_what_the_model_takes() -> None:
    lengths = draw_lengths("mixed", 20_000)
    assert lengths.min() >= 20
    assert lengths.max() == 1024


def test_operations_are_counted_by_token_and_by_pair_of_tokens() -> None:
    once = count_flops(np.array([98]))
    assert once == pytest.approx(2 * 637e6 * 100 + 4 * 33 * 1280 * 100**2)
    assert count_flops(np.array([98, 98])) == 2 * once


def sum_tokens(batch: RecordBatch) -> Rows:
    """Stands in for a model: the embedding of a record is full of the sum of its tokens."""
    sums = np.add.reduceat(batch.tokens, batch.offsets[:-1], dtype=np.float32)
    embeddings = np.repeat(sums[:, None], 1280, axis=1)
    return Rows([batch.ids[row] for row in batch.rows], batch.first_record + batch.rows, embeddings)


def test_the_frame_writes_every_record_once_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "input.fasta"
    write_fasta(path, "viral300", 50)
    result = bare.extract_chunks(path, tmp_path / "chunks", sum_tokens, chunk_tokens=1000)
    artifacts = [open_matrix(file) for file in sorted((tmp_path / "chunks").iterdir())]
    whole = sum_tokens(parse_records(path.read_bytes(), first_record=1))
    assert len(artifacts) == 6
    assert [name for artifact in artifacts for name in artifact.ids()] == whole.ids
    assert np.concatenate([artifact.records for artifact in artifacts]).tolist() == whole.records.tolist()
    assert np.array_equal(np.concatenate([artifact.embeddings for artifact in artifacts]), whole.embeddings)
    assert (result.records, result.rows, result.residues) == (50, 50, int(draw_lengths("viral300", 50).sum()))
    assert 0 < result.scan_seconds < result.seconds


@given(st.lists(st.integers(1, 1024), max_size=100), st.integers(1, 5000))
def test_padded_batches_keep_every_sequence_and_the_budget(lengths: list[int], tokens: int) -> None:
    batches = [batch.tolist() for batch in plan_padded(np.array(lengths, dtype=np.int64), tokens)]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch) + 2
        assert len(batch) == 1 or len(batch) * longest <= tokens


@pytest.mark.parametrize(
    "loop",
    [
        embed_existing,
        functools.partial(embed_existing, tokens=1),
        embed_padded,
        functools.partial(embed_padded, tokens=300),
    ],
)
def test_the_loops_compute_what_our_model_computes(
    loop: Callable[[nn.Module, RecordBatch], Rows], esm: nn.Module
) -> None:
    batch = make_batch(4)
    ours = embed(build_model(adopt_weights(esm), CPU, "float32"), batch)
    theirs = loop(esm, batch)
    assert theirs.ids == ours.ids
    assert theirs.records.tolist() == ours.records.tolist()
    assert np.allclose(theirs.embeddings, ours.embeddings, rtol=0, atol=1e-4)
    assert np.abs(np.diff(ours.embeddings, axis=0)).max() > 0.01  # else it would not matter which is which


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=30))
def test_the_union_of_intervals_counts_no_moment_twice(intervals: list[tuple[int, int]]) -> None:
    moments = {moment for begin, length in intervals for moment in range(begin, begin + length)}
    pairs = np.array([(begin, begin + length) for begin, length in intervals], dtype=np.int64)
    assert cover(pairs.reshape(-1, 2)) == len(moments)


@dataclass
class Event:
    """What the profiler hands out, as far as `find_kernels` asks."""

    called: str
    begin: int
    device: str = "CUDA"

    def name(self) -> str:
        return self.called

    def start_ns(self) -> int:
        return self.begin

    def duration_ns(self) -> int:
        return 10

    def device_type(self) -> Any:
        return getattr(torch.autograd.DeviceType, self.device)


def test_only_kernels_count_as_computing() -> None:
    names = ["Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "Event Sync", "Stream Wait Event"]
    events = [Event("norm_kernel", 5), Event("cudaLaunchKernel", 0, device="CPU"), Event("gemm", 40)]
    events += [Event(name, 100) for name in names]
    results = SimpleNamespace(events=lambda: events)
    profiler: Any = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    assert find_kernels(profiler).tolist() == [[5, 15], [40, 50]]


def test_a_profile_without_a_gpu_has_no_kernels() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    assert find_kernels(profiler).shape == (0, 2)


def test_a_row_relates_a_run_to_the_ceilings_and_the_existing_loop() -> None:
    bursts = {"bfloat16": 800.0, "float16": 750.0, "fp8": 1400.0}
    slow = bare.Result(records=100, residues=16_550, rows=100, seconds=0.2, scan_seconds=0.1)
    fast = bare.Result(records=1000, residues=165_500, rows=1000, seconds=0.5, scan_seconds=0.1)
    first, row = make_rows(
        [Measured("viral500", "existing", slow, 0), Measured("viral500", "fp8", fast, 3 << 29)], bursts
    )
    assert first["ratio"] == 1.0
    reached = count_flops(draw_lengths("viral500", 1000)) / 0.5 / 1e12
    assert row == {
        "workload": "viral500",
        "method": "fp8",
        "residues_per_s": 331_000,
        "ratio": 4.0,
        "share": pytest.approx(reached / 800, abs=1e-4),
        "own_share": pytest.approx(reached / 1400, abs=1e-4),
        "peak_gib": 1.5,
        "sequences_per_s": 2000,
        "records": 1000,
    }


def test_the_table_is_ordered_by_workload_then_by_method() -> None:
    def row(workload: str, method: str) -> dict[str, Any]:
        numbers = dict.fromkeys(
            ("residues_per_s", "ratio", "share", "own_share", "peak_gib", "sequences_per_s", "records"), 1
        )
        return {"workload": workload, "method": method, **numbers}

    lines = format_table([row("reads", "existing"), row("viral500", "existing"), row("viral500", "fp8")])
    cells = [line.split(" | ")[:2] for line in lines.splitlines()[2:]]
    assert cells == [["| viral500", "existing"], ["| viral500", "fp8"], ["| reads", "existing"]]


def test_fidelity_is_told_for_each_sequence() -> None:
    batch = make_batch(5)
    theirs = np.random.default_rng(0).standard_normal((5, 1280)).astype(np.float32)
    ours = theirs.copy()
    ours[3, 7] += 2.0
    rows = compare("fp8", batch, ours, theirs)
    assert [row["sequence"] for row in rows] == batch.ids
    assert [row["residues"] for row in rows] == draw_lengths("mixed", 5).tolist()
    assert [row["max_abs"] for row in rows] == [0, 0, 0, pytest.approx(2, abs=1e-6), 0]
    assert rows[3]["relative_l2"] == pytest.approx(2 / np.linalg.norm(theirs[3]), rel=1e-5)


def test_the_larger_reading_of_a_ceiling_counts() -> None:
    before = {"bfloat16": {"burst": 750.0, "hot": 650.0}, "fp8": {"burst": 1500.0, "hot": 1300.0}}
    after = {"bfloat16": {"burst": 780.0, "hot": 640.0}, "fp8": {"burst": 1490.0, "hot": 1500.0}}
    assert largest_bursts({"before": before}) == {"bfloat16": 750.0, "fp8": 1500.0}
    assert largest_bursts({"before": before, "after": after}) == {"bfloat16": 780.0, "fp8": 1500.0}
