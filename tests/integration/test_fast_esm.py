"""`extract_fast_esm`: the contract's eleven checks, and a kept result that must be verified."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EsmModel, EsmTokenizer

from virnucpro_core import extract_fast_esm, load_fast_esm
from virnucpro_core.embedding.fast_esm import failures_path, manifest_path
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.embedding.selftest import LENGTHS, run_selftest
from virnucpro_core.embedding.verdicts import Verdict, keep_verdict, read_verdicts
from virnucpro_core.errors import (
    ArtifactError,
    InputError,
    MismatchError,
    NucleotideInputError,
    SettingsError,
    WeightsError,
)
from virnucpro_core.features.manifests import read_manifest
from virnucpro_core.sequences.residues import VOCABULARY

pytestmark = pytest.mark.integration

MakeProteins = Callable[..., list[str]]


class Untouchable:
    """A model that must not be touched."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the model was touched: {name}")

    def __call__(self, *_: object, **__: object) -> None:
        raise AssertionError("the model was called")


class UntouchableModule(torch.nn.Module):
    """A module of torch's that must not be called."""

    def forward(self, *_: object, **__: object) -> None:
        raise AssertionError("the model was called")


@pytest.fixture
def fasta(tmp_path: Path, make_proteins: MakeProteins) -> Path:
    """Two short proteins."""
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">protein_{n}\n{sequence}\n" for n, sequence in enumerate(make_proteins(12, 9))))
    return path


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory, demo_model: FastEsm) -> tuple[Path, Path]:
    """The contract's six proteins, and the file that their embeddings were written to."""
    folder = tmp_path_factory.mktemp("six")
    fasta, out = folder / "six.fasta", folder / "six_ESM.pt"
    sequences = [
        ("MKVLAAGIVGWYHCDEFNPQ" * 61)[start : start + length] for start, length in enumerate(LENGTHS)
    ]
    fasta.write_text("".join(f">protein_{n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    extract_fast_esm(fasta, out, demo_model)
    return fasta, out


@pytest.fixture(scope="module")
def six_content(six: tuple[Path, Path]) -> dict[str, Any]:
    content = torch.load(six[1], weights_only=True)
    assert isinstance(content, dict)
    return content


def test_1_the_file_is_created(six: tuple[Path, Path]) -> None:
    assert six[0].read_text().count(">") == 6


def test_2_the_model_loads(demo_checkpoint: Path) -> None:
    assert len(load_fast_esm(demo_checkpoint, device="cpu").encoder.layers) == 2


def test_3_extraction_runs(six: tuple[Path, Path], demo_model: FastEsm) -> None:
    ids, data = extract_fast_esm(six[0], model=demo_model)
    assert len(ids) == len(data) == 6


def test_4_the_output_file_exists(six: tuple[Path, Path]) -> None:
    assert six[1].is_file()
    assert not failures_path(six[1]).exists()


def test_5_its_keys_are_proteins_and_data(six_content: dict[str, Any]) -> None:
    assert set(six_content) == {"proteins", "data"}


def test_6_it_has_six_entries_in_input_order(six_content: dict[str, Any]) -> None:
    assert six_content["proteins"] == [f"protein_{n}" for n in range(6)]


def test_7_both_lists_are_equally_long(six_content: dict[str, Any]) -> None:
    assert len(six_content["proteins"]) == len(six_content["data"])


def test_8_every_embedding_is_a_finite_float32_vector(six_content: dict[str, Any]) -> None:
    for row in six_content["data"]:
        assert row.shape == (1280,)
        assert row.dtype == torch.float32
        assert row.isfinite().all()


def test_9_embeddings_are_not_zero_and_differ(six_content: dict[str, Any]) -> None:
    rows = torch.stack(six_content["data"])
    assert rows.any(dim=1).all()
    assert len(torch.unique(rows, dim=0)) == 6


def test_10_each_concatenates_to_2048(six_content: dict[str, Any]) -> None:
    for row in six_content["data"]:
        assert torch.cat((torch.zeros(768), row)).shape == (2048,)


def test_11_a_second_call_reads_the_file(
    six: tuple[Path, Path], six_content: dict[str, Any], demo_checkpoint: Path
) -> None:
    before = six[1].stat()
    for model in (Untouchable(), UntouchableModule(), demo_checkpoint, None):
        ids, data = extract_fast_esm(six[0], six[1], model)
        assert ids == six_content["proteins"]
        assert all(map(torch.equal, data, six_content["data"]))
    assert six[1].stat().st_mtime_ns == before.st_mtime_ns


@pytest.fixture(scope="module")
def verdict(demo_checkpoint: Path) -> Verdict:
    return run_selftest(demo_checkpoint, device="cpu")


def test_the_selftest_passes_eleven_checks(verdict: Verdict) -> None:
    assert [check for check in verdict.checks if not check.passed] == []
    assert len(verdict.checks) == 11
    assert verdict.passed


def test_the_selftest_fails_where_transformers_disagrees(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virnucpro_core.embedding.model.TOKEN_DROPOUT_SCALE", 0.87)
    verdict = run_selftest(demo_checkpoint, device="cpu")
    assert [number for number, check in enumerate(verdict.checks, 1) if not check.passed] == [9]
    assert not verdict.passed


def test_a_configuration_that_transformers_refuses_fails_the_selftest(
    demo_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"hidden_dropout_prob": "none"}
    (folder / "config.json").write_text(json.dumps(config))
    [failed] = [check for check in run_selftest(folder, device="cpu").checks if not check.passed]
    assert "transformers.EsmModel" in failed.name
    assert "hidden_dropout_prob" in failed.detail


def test_verdicts_are_kept_by_execution_class(verdict: Verdict, tmp_path: Path) -> None:
    assert read_verdicts(tmp_path) == {}
    keep_verdict(tmp_path, verdict)
    keep_verdict(tmp_path, replace(verdict, execution=None, checks=[]))
    assert verdict.execution is not None
    kept = read_verdicts(tmp_path)
    assert kept.keys() == {verdict.execution.sha256, "not_loaded"}
    assert kept[verdict.execution.sha256] == verdict.to_json()


def test_failures_are_listed_and_warned_of(fasta: Path, demo_model: FastEsm, tmp_path: Path) -> None:
    fasta.write_text(">a\nMKVL\n>b\n\n>a\nMK1L\n>a\nMKVLA\n")
    out = tmp_path / "out.pt"
    for _ in range(2):  # computed, then read
        with pytest.warns(UserWarning, match="2 records have no embedding"):
            ids, data = extract_fast_esm(fasta, out, demo_model)
        assert ids == ["a", "a"]
        assert len(data) == 2
    listed = [json.loads(line) for line in failures_path(out).read_text().splitlines()]
    assert [(line["record"], line["id"], line["reason"]) for line in listed] == [
        (2, "b", "empty"),
        (3, "a", "invalid_residue"),
    ]
    manifest = read_manifest(manifest_path(out))
    assert manifest.counts.records == manifest.counts.embeddings + sum(manifest.counts.failures.values()) == 4

    fasta.write_text(">a\nMKVL\n")
    extract_fast_esm(fasta, out, demo_model)
    assert not failures_path(out).exists()


def flip_a_byte(out: Path, fasta: Path) -> None:
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)


def cut_off(out: Path, fasta: Path) -> None:
    out.write_bytes(out.read_bytes()[:-100])


def remove_manifest(out: Path, fasta: Path) -> None:
    manifest_path(out).unlink()


def damage_manifest(out: Path, fasta: Path) -> None:
    manifest_path(out).write_text("{}")


def change_input(out: Path, fasta: Path) -> None:
    fasta.write_text(fasta.read_text().replace("protein_1", "protein_2"))


def rename_result(out: Path, fasta: Path) -> None:
    shutil.copy(out, out.with_name("other.pt"))
    text = manifest_path(out).read_text()
    manifest_path(out).write_text(text.replace('"name": "out.pt"', '"name": "other.pt"'))


@pytest.mark.parametrize(
    "spoil", [flip_a_byte, cut_off, remove_manifest, damage_manifest, change_input, rename_result]
)
def test_a_result_that_is_not_verified_is_computed_again(
    spoil: Callable[[Path, Path], None], fasta: Path, demo_model: FastEsm, tmp_path: Path
) -> None:
    out = tmp_path / "out.pt"
    _, first = extract_fast_esm(fasta, out, demo_model)
    spoil(out, fasta)
    with pytest.raises(WeightsError):
        extract_fast_esm(fasta, out, model=None)
    ids, data = extract_fast_esm(fasta, out, demo_model)
    assert all(map(torch.equal, first, data))
    assert extract_fast_esm(fasta, out, model=None)[0] == ids


def test_another_recipe_is_computed_again(
    fasta: Path, demo_checkpoint: Path, demo_model: FastEsm, tmp_path: Path
) -> None:
    out = tmp_path / "out.pt"
    extract_fast_esm(fasta, out, demo_model)
    with pytest.raises(WeightsError):
        extract_fast_esm(fasta, out, model=None, truncation_seq_length=10)
    extract_fast_esm(fasta, out, demo_model, truncation_seq_length=10)
    assert read_manifest(manifest_path(out)).counts.truncated == 1

    reference = EsmModel.from_pretrained(demo_checkpoint, add_pooling_layer=False)
    with torch.no_grad():
        reference.encoder.layer[0].attention.self.query.bias += 1.0
    _, data = extract_fast_esm(fasta, out, reference, truncation_seq_length=10)
    assert not torch.equal(data[0], extract_fast_esm(fasta, model=demo_model, truncation_seq_length=10)[1][0])
    reference.forward = Untouchable()
    assert torch.equal(extract_fast_esm(fasta, out, reference, truncation_seq_length=10)[1][0], data[0])


def test_equal_calls_write_equal_bytes(fasta: Path, demo_model: FastEsm, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        extract_fast_esm(fasta, tmp_path / name, demo_model)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_model_must_be_named(fasta: Path) -> None:
    with pytest.raises(WeightsError, match="no model is named"):
        extract_fast_esm(fasta)
    with pytest.raises(WeightsError, match="a dict is no model"):
        extract_fast_esm(fasta, model={})
    with pytest.raises(WeightsError, match="no configuration"):
        extract_fast_esm(fasta, model=torch.nn.Linear(1, 1))


@pytest.mark.parametrize("truncation", [0, -1])
def test_a_truncation_that_leaves_nothing_is_refused(
    fasta: Path, demo_model: FastEsm, tmp_path: Path, truncation: int
) -> None:
    with pytest.raises(SettingsError, match=f"cannot be cut to {truncation} residues"):
        extract_fast_esm(fasta, tmp_path / "out.pt", demo_model, truncation_seq_length=truncation)
    assert not (tmp_path / "out.pt").exists()


def test_nucleotides_are_taken_if_the_caller_insists(fasta: Path, demo_model: FastEsm) -> None:
    fasta.write_text(">read\n" + "ACGT" * 10 + "\n")
    with pytest.raises(
        NucleotideInputError, match="`--allow-nucleotides`, in Python `allow_nucleotides=True`"
    ):
        extract_fast_esm(fasta, model=demo_model)
    assert extract_fast_esm(fasta, model=demo_model, allow_nucleotides=True)[0] == ["read"]


def test_a_missing_file_is_named(demo_model: FastEsm, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.fasta"):
        extract_fast_esm(tmp_path / "absent.fasta", tmp_path / "out.pt", demo_model)


@pytest.fixture
def tokenizer(tmp_path: Path) -> EsmTokenizer:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return EsmTokenizer(str(path))


def test_an_agreeing_tokenizer_is_accepted(fasta: Path, demo_model: FastEsm, tokenizer: EsmTokenizer) -> None:
    assert len(extract_fast_esm(fasta, model=demo_model, tokenizer=tokenizer)[0]) == 2


def test_a_disagreeing_tokenizer_is_refused(fasta: Path, demo_model: FastEsm, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text("\n".join(sorted(VOCABULARY)))
    with pytest.raises(MismatchError, match=r"disagrees .* on <cls>"):
        extract_fast_esm(fasta, model=demo_model, tokenizer=EsmTokenizer(str(path)))
    with pytest.raises(MismatchError, match="does not tell its vocabulary"):
        extract_fast_esm(fasta, model=demo_model, tokenizer=object())


def test_a_result_never_replaces_its_own_input(fasta: Path, demo_model: FastEsm, tmp_path: Path) -> None:
    before = fasta.read_bytes()
    link = tmp_path / "link.fasta"
    link.symlink_to(fasta)
    for out_file in (fasta, link):
        with pytest.raises(SettingsError, match="would replace its own input"):
            extract_fast_esm(fasta, out_file, demo_model)
    assert fasta.read_bytes() == before


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "occupy"),
    [
        ("n" * 255, None),  # no room for its manifest's name
        ("n" * 241, None),  # none for that of its failures
        ("\udcff.pt", None),  # not UTF-8, as its manifest is
        ("out.pt", make_folder),
        ("out.pt", make_pipe),
        ("out.pt.json", make_folder),
    ],
    ids=["long", "long with failures", "not UTF-8", "folder", "pipe", "folder beside it"],
)
def test_a_result_that_cannot_be_kept_is_told_before_a_model_is_looked_for(
    name: str, occupy: Callable[[Path], None] | None, fasta: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    if occupy is not None:
        occupy(out)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError):
        extract_fast_esm(fasta, tmp_path / name.removesuffix(".json"), model=None)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("out_file", ["", ".", "..", "/"])
def test_a_result_without_a_name_is_refused(out_file: str, fasta: Path) -> None:
    with pytest.raises(ArtifactError, match="the output is a folder"):
        extract_fast_esm(fasta, out_file, model=None)


def test_what_lies_beside_a_result_never_replaces_its_input(demo_model: FastEsm, tmp_path: Path) -> None:
    for suffix in (".json", ".failures.jsonl"):
        fasta = tmp_path / f"out.pt{suffix}"
        fasta.write_text(">a\nMKVL\n")
        with pytest.raises(SettingsError, match="would replace its own input"):
            extract_fast_esm(fasta, tmp_path / "out.pt", demo_model)
        assert fasta.read_text() == ">a\nMKVL\n"
        fasta.unlink()
