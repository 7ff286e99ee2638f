"""On an NVIDIA GPU: faithful to transformers in float32, the same bytes always, and no record lost to memory.

Where the test servers' packages are missing, run it without the suite's conftest and configuration:
`python -m pytest -c /dev/null --rootdir . --noconftest -p tests.fixtures_model -p tests.fixtures_gpu tests/gpu`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from torch import Tensor

from tests.fixtures_gpu import CUDA, load_under
from virnucpro_core.embedding import loading
from virnucpro_core.embedding.checkpoint import WEIGHTS_NAME, inspect_checkpoint
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.extraction import Extraction, embed
from virnucpro_core.embedding.loading import build_model, explain_missing, load_fast_esm, open_weights
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.embedding.packing import PACK_TOKENS
from virnucpro_core.embedding.reference import Reference
from virnucpro_core.embedding.selftest import LIMITS, run_selftest
from virnucpro_core.embedding.verdicts import keep_verdict
from virnucpro_core.errors import ExecutionError
from virnucpro_core.failures import FailureReason
from virnucpro_core.recipe import Dtype
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.residues import VOCABULARY

pytestmark = pytest.mark.gpu

MakeProteins = Callable[..., list[str]]

LENGTHS = (1, 2, 20, 50, 51, 96, 127, 128, 165, 166, 333, 512, 777, 1023, 1024)


def parse(sequences: list[str], truncation: int = 1024) -> RecordBatch:
    fasta = "".join(f">protein_{index}\n{sequence}\n" for index, sequence in enumerate(sequences))
    return parse_records(fasta.encode(), first_record=1, truncation=truncation)


def measure_distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest relative L2 distance of a row."""
    return float((np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max())


def test_half_precision_is_packed_and_float32_is_not(demo_checkpoint: Path) -> None:
    half = load_fast_esm(demo_checkpoint, device="cuda")
    fastest = KernelPlan.PACKED_VARLEN if explain_missing(CUDA) else KernelPlan.PACKED_FUSED
    assert (half.dtype, half.plan, half.execution().pack_tokens) == ("float16", fastest, PACK_TOKENS)
    assert bool(half.execution().triton) is fastest.fused
    assert load_fast_esm(demo_checkpoint, device="cuda", dtype="float32").plan is KernelPlan.SINGLE_SDPA


def test_a_slower_plan_is_logged_with_its_reason(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "explain_missing", lambda _: "Triton is missing")
    with capture_logs() as logs:
        assert load_fast_esm(demo_checkpoint, device="cuda").plan is KernelPlan.PACKED_VARLEN
    [entry] = logs
    assert (entry["event"], entry["reason"], entry["plan"]) == (
        "fused_kernels_missing",
        "Triton is missing",
        KernelPlan.PACKED_VARLEN,
    )


def test_packs_are_close_to_transformers(
    demo_checkpoint: Path, any_packed_model: FastEsm, make_proteins: MakeProteins
) -> None:
    sequences = make_proteins(*LENGTHS)
    ours = embed(any_packed_model, parse(sequences)).embeddings
    theirs = Reference(inspect_checkpoint(demo_checkpoint), CUDA).embed(sequences).numpy()
    assert measure_distance(ours, theirs) <= LIMITS[any_packed_model.dtype]


def test_float32_is_close_to_transformers(demo_checkpoint: Path, make_proteins: MakeProteins) -> None:
    sequences = make_proteins(*LENGTHS)
    ours = embed(load_fast_esm(demo_checkpoint, device="cuda", dtype="float32"), parse(sequences)).embeddings
    theirs = Reference(inspect_checkpoint(demo_checkpoint), CUDA).embed(sequences).numpy()
    assert measure_distance(ours, theirs) <= LIMITS["float32"]


def test_all_plans_agree(demo_checkpoint: Path, packed_model: FastEsm, make_proteins: MakeProteins) -> None:
    batch = parse(make_proteins(*LENGTHS, 2500), truncation=3000)
    eager = embed(load_under(demo_checkpoint, "float16", KernelPlan.PACKED_VARLEN), batch).embeddings
    assert measure_distance(embed(packed_model, batch).embeddings, eager) <= LIMITS[packed_model.dtype]


def test_nothing_beside_a_sequence_changes_a_byte(
    any_packed_model: FastEsm, make_proteins: MakeProteins
) -> None:
    check_neighbours(any_packed_model, make_proteins)


def test_nothing_beside_a_sequence_changes_a_byte_in_float32(
    demo_checkpoint: Path, make_proteins: MakeProteins
) -> None:
    check_neighbours(load_fast_esm(demo_checkpoint, device="cuda", dtype="float32"), make_proteins)


def check_neighbours(model: FastEsm, make_proteins: MakeProteins) -> None:
    sequences = make_proteins(*LENGTHS * 8)
    expected = embed(model, parse(sequences)).embeddings
    assert expected.tobytes() == embed(model, parse(sequences)).embeddings.tobytes()
    assert expected.tobytes() == embed(model, parse(sequences[::-1])).embeddings[::-1].tobytes()
    alone = [embed(model, parse([sequence])).embeddings for sequence in sequences[: len(LENGTHS)]]
    assert expected[: len(LENGTHS)].tobytes() == np.concatenate(alone).tobytes()


@pytest.mark.parametrize("toks_per_batch", [512, 1000, 4096, 10_001, 65_536])
def test_the_size_of_packs_changes_no_byte(
    packed_model: FastEsm, make_proteins: MakeProteins, toks_per_batch: int
) -> None:
    batch = parse(make_proteins(*LENGTHS * 8))
    expected = embed(packed_model, batch).embeddings
    assert (
        embed(packed_model, batch, toks_per_batch=toks_per_batch).embeddings.tobytes() == expected.tobytes()
    )


def test_what_a_caller_has_chosen_for_torch_changes_no_byte(
    any_packed_model: FastEsm, make_proteins: MakeProteins
) -> None:
    batch = parse(make_proteins(50, 165))
    expected = embed(any_packed_model, batch).embeddings.tobytes()
    with torch.autocast("cuda", torch.bfloat16):
        assert embed(any_packed_model, batch).embeddings.tobytes() == expected
    with CUDA:
        assert embed(any_packed_model, batch).embeddings.tobytes() == expected


def test_float32_is_exact_whatever_a_caller_has_chosen_for_torch(
    demo_checkpoint: Path, make_proteins: MakeProteins, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = (
        load_fast_esm(demo_checkpoint, device="cuda", dtype="float32"),
        parse(make_proteins(50, 165)),
    )
    expected = embed(model, batch).embeddings.tobytes()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    with torch.autocast("cuda", torch.bfloat16), CUDA:
        assert embed(model, batch).embeddings.tobytes() == expected
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_packs_are_halved_until_they_fit_with_the_same_bytes(
    packed_model: FastEsm, make_proteins: MakeProteins, limit_memory: Callable[[int], None]
) -> None:
    batch = parse(make_proteins(*LENGTHS * 16))
    expected = embed(packed_model, batch)
    done: list[int] = []
    limit_memory(200 << 20)
    halved = embed(packed_model, batch, on_progress=done.append)
    assert halved.failures == []
    assert halved.embeddings.tobytes() == expected.embeddings.tobytes()
    assert packed_model.fitting_tokens is not None
    assert packed_model.fitting_tokens <= PACK_TOKENS // 2
    assert halved.execution == expected.execution
    assert sum(done) == len(batch.ids)


def test_a_record_that_does_not_fit_fails_alone(
    packed_model: FastEsm, make_proteins: MakeProteins, limit_memory: Callable[[int], None]
) -> None:
    batch = parse(make_proteins(50, 120_000, 165), truncation=1_000_000)
    expected = embed(packed_model, batch)
    assert expected.failures == []
    limit_memory(400 << 20)
    extraction = embed(packed_model, batch)
    assert [(failure.record, failure.reason) for failure in extraction.failures] == [(2, FailureReason.OOM)]
    assert extraction.embeddings.tobytes() == expected.embeddings[[0, 2]].tobytes()


def test_rows_that_overflow_are_computed_in_float32(
    demo_checkpoint: Path, packed_model: FastEsm, make_proteins: MakeProteins
) -> None:
    weights = open_weights(inspect_checkpoint(demo_checkpoint))

    def read_tensor(name: str) -> Tensor:
        tensor = weights.read_tensor(name)
        if "word_embeddings" in name:
            tensor = tensor.clone()
            tensor[VOCABULARY.index("B")] *= 1e5  # beyond float16
            tensor[VOCABULARY.index("Z")] = torch.nan
        return tensor

    changed = replace(weights, read_tensor=read_tensor)
    sequences = make_proteins(50, 165)
    batch = parse([sequences[0], "MKBVL", sequences[1], "MKZVL"])
    extraction = embed(build_model(changed, CUDA, packed_model.dtype, packed_model.plan), batch)
    wide = embed(build_model(changed, CUDA, "float32"), batch)
    assert [(failure.record, failure.reason) for failure in extraction.failures] == [
        (4, FailureReason.NON_FINITE)
    ]
    assert extraction.repaired == 1
    assert extraction.embeddings[1].tobytes() == wide.embeddings[1].tobytes()
    expected: Extraction = embed(packed_model, parse(sequences))
    assert extraction.embeddings[[0, 2]].tobytes() == expected.embeddings.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "fp8"])
def test_the_selftest_passes(demo_checkpoint: Path, dtype: Dtype) -> None:
    if dtype == "fp8" and (missing := explain_missing(CUDA)):
        pytest.skip(missing)
    verdict = run_selftest(demo_checkpoint, device="cuda", dtype=dtype)
    assert [check for check in verdict.checks if not check.passed] == []
    assert len(verdict.checks) == (12 if dtype == "fp8" else 11)


def test_fp8_is_refused_until_its_selftest_has_passed(demo_checkpoint: Path, tmp_path: Path) -> None:
    if missing := explain_missing(CUDA):
        pytest.skip(missing)
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    with pytest.raises(ExecutionError, match="have not passed the selftest in FP8"):
        load_fast_esm(folder, device="cuda", dtype="fp8")
    passed = run_selftest(folder, device="cuda", dtype="fp8")
    keep_verdict(folder, replace(passed, checks=[replace(passed.checks[0], passed=False)]))
    with pytest.raises(ExecutionError, match="have not passed the selftest in FP8"):
        load_fast_esm(folder, device="cuda", dtype="fp8")
    keep_verdict(folder, passed)
    assert load_fast_esm(folder, device="cuda", dtype="fp8").plan is KernelPlan.PACKED_FP8


@pytest.mark.parametrize("dtype", ["float16", "fp8"])
def test_the_selftest_fails_where_only_the_repair_is_finite(
    demo_checkpoint: Path, tmp_path: Path, dtype: Dtype
) -> None:
    if dtype == "fp8" and (missing := explain_missing(CUDA)):
        pytest.skip(missing)
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    tensors = load_file(folder / WEIGHTS_NAME)
    for name, tensor in tensors.items():
        if "word_embeddings" in name:
            tensor *= 1e6
    save_file(tensors, folder / WEIGHTS_NAME)
    failed = {
        check.name for check in run_selftest(folder, device="cuda", dtype=dtype).checks if not check.passed
    }
    assert any("without NaN and Inf" in name for name in failed)
    assert any("nearest neighbours" in name for name in failed) is (dtype == "fp8")


def test_fp8_refuses_weights_whose_infinite_values_it_would_hide(demo_checkpoint: Path) -> None:
    if missing := explain_missing(CUDA):
        pytest.skip(missing)
    weights = open_weights(inspect_checkpoint(demo_checkpoint))

    def read_tensor(name: str) -> Tensor:
        return weights.read_tensor(name) * (1e4 if "self.value.weight" in name else 1.0)

    with pytest.raises(ExecutionError, match="values may reach"):
        build_model(replace(weights, read_tensor=read_tensor), CUDA, "fp8")
