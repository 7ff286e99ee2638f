"""The selftest: the contract's eleven checks, run on a user's own weights, device and dtype."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from virnucpro_core.embedding.checkpoint import Checkpoint, expected_tensors
from virnucpro_core.embedding.execution import ExecutionClass
from virnucpro_core.embedding.fast_esm import extract_fast_esm
from virnucpro_core.embedding.loading import build_model, choose_device, find_checkpoint, open_weights
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.errors import ArtifactError, VirnucproError, WeightsError
from virnucpro_core.features.files import new_file
from virnucpro_core.features.merging import NUCLEOTIDE_WIDTH
from virnucpro_core.features.validation import validate_embeddings
from virnucpro_core.recipe import EMBEDDING_WIDTH, TRUNCATION, Dtype
from virnucpro_core.sequences.residues import CLS, EOS, VOCABULARY

VERDICT_NAME = "selftest.json"

LENGTHS = (20, 52, 96, 497, 1201, 20)
"""Residues of the six proteins; the fifth is truncated."""

LIMITS: dict[Dtype, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""Largest relative L2 distance of an embedding from `transformers.EsmModel` in float32. bfloat16 has three
significant bits less than float16, so about ten times its error."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was to be true, whether it is, and the figures."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a selftest found.

    Attributes:
        weights_sha256: of the checkpoint.
        execution: how it was run; None if the model did not load.
        checks: all eleven, in order.
    """

    weights_sha256: str
    execution: ExecutionClass | None
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "weights_sha256": self.weights_sha256,
            "execution": self.execution.to_json() if self.execution else None,
            "checks": [asdict(check) for check in self.checks],
        }


def run_selftest(
    model: str | os.PathLike[str],
    revision: str | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
) -> Verdict:
    """Runs the eleven checks; a check that cannot be made because an earlier one failed, fails.

    Raises:
        WeightsError: there is no such checkpoint, or it is not FastESM2.
        ExecutionError: the device is missing or cannot compute in `dtype`.
    """
    checkpoint = find_checkpoint(model, revision)
    place, precision = choose_device(device, dtype)
    with tempfile.TemporaryDirectory(prefix="virnucpro-selftest-") as folder:
        subject = _Subject(checkpoint, place, precision, Path(folder))
        checks = [_run_check(name, check, subject) for name, check in _CHECKS]
        execution = subject.model.execution() if subject.model else None
    return Verdict(checkpoint.sha256, execution, checks)


def keep_verdict(folder: str | os.PathLike[str], verdict: Verdict) -> Path:
    """Keeps a verdict with the checkpoint, beside those of other execution classes, and returns the file.

    Raises:
        ArtifactError: the file cannot be written, or holds something else.
    """
    path = Path(folder, VERDICT_NAME)
    verdicts = read_verdicts(folder)
    verdicts[verdict.execution.sha256 if verdict.execution else "not_loaded"] = verdict.to_json()
    with new_file(path) as file:
        file.write((json.dumps(verdicts, indent=2, sort_keys=True) + "\n").encode())
    return path


def read_verdicts(folder: str | os.PathLike[str]) -> dict[str, object]:
    """The verdicts kept with a checkpoint, by the sha256 of their execution class; none if none was kept.

    Raises:
        ArtifactError: the file holds something else.
    """
    path = Path(folder, VERDICT_NAME)
    if not path.exists():
        return {}
    try:
        verdicts = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError("the verdicts are not JSON", where=str(path), todo="Remove the file.") from error
    if not isinstance(verdicts, dict):
        raise ArtifactError("the verdicts are not an object", where=str(path), todo="Remove the file.")
    return verdicts


@dataclass(slots=True)
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

    @property
    def fasta(self) -> Path:
        return self.folder / "proteins.fasta"

    @property
    def out_file(self) -> Path:
        return self.folder / "proteins_ESM.pt"


def _run_check(name: str, check: Callable[[_Subject], tuple[bool, str]], subject: _Subject) -> Check:
    try:
        passed, detail = check(subject)
    except (VirnucproError, RuntimeError, ImportError, OSError) as error:
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
    errors += [f"{row.dtype}" for row in data if isinstance(row, Tensor) and row.dtype != torch.float32]
    return bool(data) and not errors, "; ".join(errors) or f"{len(data)} embeddings"


def _compare_with_transformers(subject: _Subject) -> tuple[bool, str]:
    if not subject.data:
        return False, "there are no embeddings"
    ours = torch.stack(subject.data)
    distinct = len(torch.unique(ours, dim=0)) == len(ours) and bool(ours.any(dim=1).all())
    theirs = embed_with_transformers(subject.checkpoint, subject.sequences, subject.device)
    difference = (ours - theirs).abs().max()
    relative = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max()
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


def embed_with_transformers(checkpoint: Checkpoint, sequences: list[str], device: torch.device) -> Tensor:
    """What `transformers.EsmModel` makes of sequences, one at a time: float32 (n, 1280) on the CPU."""
    from transformers import EsmConfig, EsmModel

    # Not by `from_pretrained`: it reports on the head's tensors at length, which embeddings do not need.
    reference: nn.Module = EsmModel(EsmConfig.from_dict(checkpoint.config), add_pooling_layer=False)
    weights = open_weights(checkpoint)
    tensors = {name: weights.read_tensor(name) for name in expected_tensors(checkpoint.layers)}
    faults = reference.load_state_dict(tensors, strict=False)
    if faults.unexpected_keys:
        raise WeightsError(
            f"transformers does not know {', '.join(faults.unexpected_keys[:5])}",
            where=str(checkpoint.folder),
            todo="Install a version of transformers that this project names.",
        )
    reference.to(device).eval()
    rows = []
    with torch.inference_mode():
        for sequence in sequences:
            residues = [VOCABULARY.index(letter) for letter in sequence[:TRUNCATION]]
            tokens = torch.tensor([[CLS, *residues, EOS]], device=device)
            hidden = reference(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
            rows.append(hidden[0, 1:-1].mean(dim=0).cpu())
    return torch.stack(rows)


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
