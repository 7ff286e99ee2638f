"""FP8 is admitted by a verdict on these weights, this execution class and this version of the selftest alone."""

from __future__ import annotations

import json
from dataclasses import replace
from operator import eq
from pathlib import Path

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from virnucpro_core.embedding.checkpoint import Checkpoint, inspect_checkpoint
from virnucpro_core.embedding.execution import ExecutionClass, KernelPlan
from virnucpro_core.embedding.reference import CHANGED, FAMILIES, draw_families, find_nearest, relative_l2
from virnucpro_core.embedding.verdicts import VERDICT_NAME, VERSION, Check, Verdict, has_passed, keep_verdict
from virnucpro_core.recipe import TRUNCATION

pytestmark = pytest.mark.unit

EXECUTION = ExecutionClass(
    torch="2.11.0",
    triton="3.6.0",
    device="cuda",
    hardware="NVIDIA H200 sm_90",
    dtype="fp8",
    plan=KernelPlan.PACKED_FP8,
    pack_tokens=16_896,
    threads=0,
)


@pytest.fixture
def checkpoint(demo_checkpoint: Path, tmp_path: Path) -> Checkpoint:
    """A checkpoint without verdicts, in a folder of its own."""
    return replace(inspect_checkpoint(demo_checkpoint), folder=tmp_path)


def keep(checkpoint: Checkpoint, *found: str) -> Path:
    checks = [Check(str(number), each == "pass", "") for number, each in enumerate(found)]
    verdict = Verdict(checkpoint.sha256, checkpoint.token_dropout, EXECUTION, checks)
    return keep_verdict(checkpoint.folder, verdict)


def test_a_passed_verdict_counts_for_its_weights_config_and_execution_class(checkpoint: Checkpoint) -> None:
    assert not has_passed(checkpoint, EXECUTION)
    keep(checkpoint, "pass", "pass")
    assert has_passed(checkpoint, EXECUTION)
    assert not has_passed(replace(checkpoint, sha256="0" * 64), EXECUTION)
    assert not has_passed(replace(checkpoint, token_dropout=not checkpoint.token_dropout), EXECUTION)
    assert not has_passed(checkpoint, replace(EXECUTION, hardware="NVIDIA H100 sm_90"))
    keep(checkpoint, "pass", "fail")
    assert not has_passed(checkpoint, EXECUTION)


def test_a_verdict_of_another_version_does_not_count(checkpoint: Checkpoint) -> None:
    path = keep(checkpoint, "pass")
    path.write_text(path.read_text().replace(f'"version": {VERSION}', f'"version": {VERSION - 1}'))
    assert not has_passed(checkpoint, EXECUTION)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({EXECUTION.sha256: True}), "[" * 100_000])
def test_verdicts_that_cannot_be_read_admit_nothing_and_are_logged(
    checkpoint: Checkpoint, content: str
) -> None:
    (checkpoint.folder / VERDICT_NAME).write_text(content)
    with capture_logs() as logs:
        assert not has_passed(checkpoint, EXECUTION)
    assert [entry["event"] for entry in logs] == ["verdicts_unusable"]


def test_relatives_drift_away_from_their_ancestor() -> None:
    proteins = draw_families()
    assert len(proteins) == FAMILIES * len(CHANGED)
    assert all(30 <= len(protein) <= TRUNCATION for protein in proteins)
    shares = [
        np.mean(
            [
                sum(map(eq, ancestor, relative)) / len(ancestor)
                for ancestor, relative in zip(
                    proteins[:: len(CHANGED)], proteins[place :: len(CHANGED)], strict=True
                )
            ]
        )
        for place in range(len(CHANGED))
    ]
    # A residue that is drawn anew is the old one in 6% of all cases.
    assert shares == pytest.approx([1 - 0.94 * share for share in CHANGED], abs=0.02)


def test_the_nearest_neighbour_is_another_row() -> None:
    rows = torch.zeros(4, 1280)
    rows[:, 0] = torch.tensor([0.0, 1.0, 5.0, 7.0])
    assert find_nearest(rows).tolist() == [1, 0, 3, 2]


def test_distances_are_relative_to_the_reference() -> None:
    theirs = torch.zeros(2, 1280)
    theirs[:, 0] = torch.tensor([2.0, 10.0])
    ours = theirs.clone()
    ours[:, 1] = 1.0
    assert relative_l2(ours, theirs).tolist() == pytest.approx([0.5, 0.1])
