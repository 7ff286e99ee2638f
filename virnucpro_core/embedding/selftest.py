"""The selftest: the contract's eleven checks, run on a user's own weights, device and dtype; a twelfth in FP8."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from virnucpro_core.embedding.checkpoint import Checkpoint
from virnucpro_core.embedding.extraction import embed, extract
from virnucpro_core.embedding.fast_esm import extract_fast_esm
from virnucpro_core.embedding.loading import build_model, choose_device, find_checkpoint, open_weights
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.embedding.reference import Reference, draw_families, find_nearest, relative_l2
from virnucpro_core.embedding.verdicts import Check, Verdict
from virnucpro_core.features.merging import NUCLEOTIDE_WIDTH
from virnucpro_core.features.validation import validate_embeddings
from virnucpro_core.recipe import EMBEDDING_WIDTH, Dtype
from virnucpro_core.sequences.fasta import parse_records

LENGTHS = (20, 52, 96, 497, 1201, 20)
"""Residues of the six proteins; the fifth is truncated."""

LIMITS: dict[Dtype, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "fp8": 5e-2}
"""Largest relative L2 distance of an embedding from `transformers.EsmModel` in float32. bfloat16 has three
significant bits less than float16, so about ten times its error. FP8 has four bits less than bfloat16, but only the
operands of matrix products have them, so that most of it averages out."""

LEAST_AGREEMENT = 0.95
"""Share of the reference proteins that must have the same nearest neighbour as in float32."""


def run_selftest(
    model: str | os.PathLike[str],
    revision: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> Verdict:
    """Runs the eleven checks, in FP8 a twelfth; one that cannot be made because an earlier one failed, fails.

    Raises:
        WeightsError: there is no such checkpoint, or it is not FastESM2.
        ExecutionError: the device is missing or cannot compute in `dtype`.
    """
    checkpoint = find_checkpoint(model, revision)
    place, precision = choose_device(device, dtype)
    with tempfile.TemporaryDirectory(prefix="virnucpro-selftest-") as folder:
        subject = _Subject(checkpoint, place, precision, Path(folder))
        demanded = (*_CHECKS, _FP8_CHECK) if precision == "fp8" else _CHECKS
        checks = [_run_check(name, check, subject) for name, check in demanded]
        execution = subject.model.execution() if subject.model else None
    return Verdict(checkpoint.sha256, checkpoint.token_dropout, execution, checks)


@dataclass
class _Subject:
    """What the checks hand on to one another."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: Dtype
    folder: Path
    model: FastEsm | None = None
    sequences: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    data: list[Tensor] = field(default_factory=list)
    content: dict[str, list[object]] = field(default_factory=dict)
    seconds: float = 0.0

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.checkpoint, self.device)

    @property
    def fasta(self) -> Path:
        return self.folder / "proteins.fasta"

    @property
    def out_file(self) -> Path:
        return self.folder / "proteins_ESM.pt"


def _run_check(name: str, check: Callable[[_Subject], tuple[bool, str]], subject: _Subject) -> Check:
    try:
        passed, detail = check(subject)
    except Exception as error:  # noqa: BLE001 - whatever transformers makes of a checkpoint, it has not passed
        return Check(name, passed=False, detail=f"{type(error).__name__}: {error}")
    return Check(name, passed, detail)


def _create_file(subject: _Subject) -> tuple[bool, str]:
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    random = np.random.default_rng(0)
    subject.sequences = ["".join(random.choice(letters, length)) for length in LENGTHS]
    records = (f">protein_{number}\n{sequence}\n" for number, sequence in enumerate(subject.sequences, 1))
    subject.fasta.write_text("".join(records))
    return subject.fasta.is_file(), f"{', '.join(map(str, LENGTHS))} residues"


def _load_model(subject: _Subject) -> tuple[bool, str]:
    subject.model = build_model(open_weights(subject.checkpoint), subject.device, subject.dtype)
    note = ", random demonstration weights" if subject.checkpoint.demonstration else ""
    return True, f"{subject.checkpoint.layers} layers, {subject.model.execution()}{note}"


def _run_extraction(subject: _Subject) -> tuple[bool, str]:
    started = time.perf_counter()
    subject.ids, subject.data = extract_fast_esm(subject.fasta, subject.out_file, subject.model)
    subject.seconds = time.perf_counter() - started
    return len(subject.ids) == len(LENGTHS), f"{subject.seconds:.2f} s"


def _find_output(subject: _Subject) -> tuple[bool, str]:
    if not subject.out_file.is_file():
        return False, "there is no file"
    subject.content = torch.load(subject.out_file, weights_only=True)
    return True, f"{subject.out_file.stat().st_size} bytes"


def _check_keys(subject: _Subject) -> tuple[bool, str]:
    keys = sorted(subject.content)
    return keys == ["data", "proteins"], ", ".join(keys)


def _count_entries(subject: _Subject) -> tuple[bool, str]:
    count = len(subject.content.get("proteins", []))
    return count == len(LENGTHS), f"{count} entries"


def _compare_lengths(subject: _Subject) -> tuple[bool, str]:
    lengths = [len(subject.content.get(key, [])) for key in ("proteins", "data")]
    return lengths[0] == lengths[1] > 0, f"{lengths[0]} ids, {lengths[1]} embeddings"


def _check_values(subject: _Subject) -> tuple[bool, str]:
    data = subject.content.get("data", [])
    errors = validate_embeddings(subject.ids, data)
    if subject.model is not None and (repaired := extract(subject.fasta, subject.model).repaired):
        # Computed again in float32, as in use; but a checkpoint that needs that here needs it always.
        errors.append(f"{repaired} were not finite in {subject.dtype}")
    errors += [f"{row.dtype}" for row in data if isinstance(row, Tensor) and row.dtype != torch.float32]
    return bool(data) and not errors, "; ".join(errors) or f"{len(data)} embeddings"


def _compare_with_transformers(subject: _Subject) -> tuple[bool, str]:
    if not subject.data:
        return False, "there are no embeddings"
    ours = torch.stack(subject.data)
    distinct = len(torch.unique(ours, dim=0)) == len(ours) and bool(ours.any(dim=1).all())
    theirs = subject.reference.embed(subject.sequences)
    difference = (ours - theirs).abs().max()
    relative = relative_l2(ours, theirs).max()
    limit = LIMITS[subject.dtype]
    detail = f"relative L2 {relative:.1e} at worst (limit {limit:.0e}), |Δ| {difference:.1e} at most"
    return distinct and bool(relative <= limit), detail


def _concatenate(subject: _Subject) -> tuple[bool, str]:
    nucleotides = torch.zeros(NUCLEOTIDE_WIDTH)
    widths = {len(torch.cat((nucleotides, row))) for row in subject.data}
    return widths == {NUCLEOTIDE_WIDTH + EMBEDDING_WIDTH}, f"{', '.join(map(str, widths))} numbers"


class _Untouchable:
    def __call__(self, *_: object, **__: object) -> None:
        raise RuntimeError("the model was called although the result was there")


def _read_again(subject: _Subject) -> tuple[bool, str]:
    if subject.model is None:
        return False, "there is no model"
    encoder, subject.model.encoder = subject.model.encoder, _Untouchable()  # type: ignore[assignment]
    started = time.perf_counter()
    try:
        ids, data = extract_fast_esm(subject.fasta, subject.out_file, subject.model)
    finally:
        subject.model.encoder = encoder
    seconds = time.perf_counter() - started
    same = ids == subject.ids and all(map(torch.equal, data, subject.data)) and len(data) == len(subject.data)
    return same, f"{seconds:.4f} s, {subject.seconds / seconds:.0f} times as fast"


def _compare_neighbours(subject: _Subject) -> tuple[bool, str]:
    if subject.model is None:
        return False, "there is no model"
    sequences = draw_families()
    records = "".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences, 1))
    extraction = embed(subject.model, parse_records(records.encode(), first_record=1))
    if extraction.failures or extraction.repaired:
        # Repaired rows are float32 and would agree.
        return False, f"{len(extraction.failures) + extraction.repaired} of {len(sequences)} are not finite"
    ours, theirs = torch.from_numpy(extraction.embeddings), subject.reference.embed(sequences)
    errors = relative_l2(ours, theirs)
    agreement = float((find_nearest(ours) == find_nearest(theirs)).float().mean())
    limit = LIMITS[subject.dtype]
    detail = (
        f"{agreement:.1%} of {len(sequences)} (least {LEAST_AGREEMENT:.0%}); relative L2 {errors.max():.1e} at "
        f"worst (limit {limit:.0e}), {errors.median():.1e} in the middle"
    )
    return agreement >= LEAST_AGREEMENT and bool(errors.max() <= limit), detail


_CHECKS: tuple[tuple[str, Callable[[_Subject], tuple[bool, str]]], ...] = (
    ("a FASTA file of six proteins is created", _create_file),
    ("the model loads", _load_model),
    ("extraction runs", _run_extraction),
    ("the output file exists", _find_output),
    ("its keys are exactly proteins and data", _check_keys),
    ("it has six entries", _count_entries),
    ("both lists are equally long", _compare_lengths),
    ("every embedding is (1280,), float32, without NaN and Inf", _check_values),
    ("embeddings are not zero, differ, and equal those of transformers.EsmModel", _compare_with_transformers),
    ("each embedding concatenates with 768 numbers to 2048", _concatenate),
    ("a second call returns the same from the file, without the model", _read_again),
)

_FP8_CHECK = ("nearest neighbours among reference proteins are those in float32", _compare_neighbours)
