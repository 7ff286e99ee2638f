"""`extract` accounts for every record of a file, in input order, whatever is wrong with some."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from structlog.testing import capture_logs

from virnucpro_core import extract
from virnucpro_core.embedding import loading
from virnucpro_core.embedding.checkpoint import WEIGHTS_NAME, inspect_checkpoint
from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.extraction import InputRange
from virnucpro_core.embedding.loading import build_model, load_fast_esm, open_weights
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.errors import ExecutionError, InputError, NucleotideInputError, WeightsError
from virnucpro_core.failures import FailureReason
from virnucpro_core.sequences.residues import VOCABULARY
from virnucpro_core.sequences.scan import scan_input

pytestmark = pytest.mark.integration

MakeProteins = Callable[..., list[str]]

MIXED = (
    b">good_1 with words\nMKV\nLAA*\n"
    b">\nMKVL\n"
    b">empty\n\n"
    b">lower\nmkvlaa\n"
    b">nul\nMK\x00VL\n"
    b">bad_\xff\nMKVL\n"
    b">good_1\r\nMKJJVL\r\n"
    b">digits\nMKV1\n"
    b">long\n" + b"MKVLAAGIVG" * 120 + b"\n"
)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.fasta"
    path.write_bytes(MIXED)
    return path


def test_every_record_is_an_embedding_or_a_failure(mixed: Path, demo_model: FastEsm) -> None:
    done: list[int] = []
    extraction = extract(mixed, demo_model, on_progress=done.append)
    assert extraction.ids == ["good_1", "lower", "good_1", "long"]
    assert extraction.records.tolist() == [1, 4, 7, 9]
    assert [(failure.record, failure.reason) for failure in extraction.failures] == [
        (2, FailureReason.NO_ID),
        (3, FailureReason.EMPTY),
        (5, FailureReason.INVALID_RESIDUE),
        (6, FailureReason.BAD_HEADER),
        (8, FailureReason.INVALID_RESIDUE),
    ]
    counts = extraction.counts
    assert counts.records == counts.embeddings + sum(counts.failures.values()) == sum(done) == 9
    assert (counts.truncated, counts.unknown) == (1, 2)
    # What the ledger and a worker's manifest say of the same file.
    scanned = scan_input(mixed, chunk_tokens=100, spool_root=None)
    assert (counts.residues, counts.records) == (scanned.residues, scanned.records)
    assert counts.tokens == 6 + 6 + 6 + 1024 + 4 * 2
    assert extraction.embeddings.shape == (4, 1280)
    assert extraction.embeddings.dtype == np.float32
    assert np.array_equal(extraction.embeddings[0], extraction.embeddings[1])


def test_strict_residues_fail_a_record(mixed: Path, demo_model: FastEsm) -> None:
    extraction = extract(mixed, demo_model, residues="strict")
    assert extraction.records.tolist() == [1, 4, 9]
    assert "'J' at residue 3" in extraction.failures[4].detail


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_compressed_files_give_the_same(
    mixed: Path, demo_model: FastEsm, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    packed.write_bytes(compress(MIXED))
    assert extract(packed, demo_model).embeddings.tobytes() == extract(mixed, demo_model).embeddings.tobytes()


def test_ranges_give_the_same_bytes_as_the_file(
    demo_model: FastEsm, make_proteins: MakeProteins, tmp_path: Path
) -> None:
    path = tmp_path / "proteins.fasta"
    sequences = make_proteins(*range(5, 25))
    path.write_text("".join(f">{index}\n{sequence}\n" for index, sequence in enumerate(sequences)))
    whole = extract(path, demo_model)
    scanned = scan_input(path, chunk_tokens=100, spool_root=tmp_path)
    parts = [
        extract(InputRange(scanned.location, scanned.compression, chunk), demo_model)
        for chunk in scanned.chunks
    ]
    assert len(parts) > 3
    assert whole.input_sha256 == scanned.sha256
    assert [part.input_sha256 for part in parts] == [chunk.sha256 for chunk in scanned.chunks]
    assert np.concatenate([part.records for part in parts]).tolist() == whole.records.tolist()
    assert b"".join(part.embeddings.tobytes() for part in parts) == whole.embeddings.tobytes()


def test_a_file_of_many_chunks_is_joined(
    demo_model: FastEsm, make_proteins: MakeProteins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "proteins.fasta"
    records = [f">{index}\n{sequence}\n" for index, sequence in enumerate(make_proteins(*range(5, 25)))]
    path.write_text("".join([*records[:8], ">empty\n", *records[8:]]))
    whole = extract(path, demo_model)
    monkeypatch.setattr("virnucpro_core.embedding.extraction.CHUNK_TOKENS", 100)
    joined = extract(path, demo_model)
    assert joined.embeddings.tobytes() == whole.embeddings.tobytes()
    assert (joined.ids, joined.failures, joined.counts) == (whole.ids, whole.failures, whole.counts)
    assert joined.records.tolist() == whole.records.tolist()


def test_rows_that_are_not_finite_fail_alone(
    demo_checkpoint: Path, demo_model: FastEsm, tmp_path: Path
) -> None:
    path = tmp_path / "proteins.fasta"
    path.write_text(">a\nMKVLAAG\n>b\nMKWLAAG\n>c\nMKVLA\n")
    broken = load_fast_esm(demo_checkpoint, device="cpu")
    broken.encoder.words.weight[VOCABULARY.index("W")] = torch.nan
    extraction = extract(path, broken)
    assert [(failure.record, failure.reason) for failure in extraction.failures] == [
        (2, FailureReason.NON_FINITE)
    ]
    expected = extract(path, demo_model).embeddings[[0, 2]]
    assert extraction.embeddings.tobytes() == expected.tobytes()


def test_a_file_with_failures_only_gives_no_embeddings(demo_model: FastEsm, tmp_path: Path) -> None:
    path = tmp_path / "empty_records.fasta"
    path.write_text(">a\n>b\n")
    extraction = extract(path, demo_model)
    assert extraction.embeddings.shape == (0, 1280)
    assert extraction.counts.failures == {FailureReason.EMPTY: 2}


def test_files_that_cannot_be_used_are_refused(demo_model: FastEsm, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        extract(tmp_path / "absent.fasta", demo_model)
    reads = tmp_path / "reads.fasta"
    reads.write_text(">read\n" + "ACGT" * 50 + "\n")
    with pytest.raises(NucleotideInputError):
        extract(reads, demo_model)
    assert extract(reads, demo_model, allow_nucleotides=True).ids == ["read"]


def test_devices_and_dtypes_that_are_not_there_are_refused(
    demo_checkpoint: Path, demo_model: FastEsm
) -> None:
    with pytest.raises(ExecutionError, match="does not compute in float16"):
        load_fast_esm(demo_checkpoint, device="cpu", dtype="float16")
    with pytest.raises(ExecutionError, match="no such device"):
        load_fast_esm(demo_checkpoint, device="abacus")
    with pytest.raises(ExecutionError, match="not supported"):
        load_fast_esm(demo_checkpoint, device="mps")
    with pytest.raises(ExecutionError, match="GPUs here"):
        load_fast_esm(demo_checkpoint, device="cuda:99")
    assert load_fast_esm(demo_model, device="cpu") is demo_model


def test_models_are_found_by_name_below_the_model_root(
    demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from virnucpro_core.settings import load_settings

    monkeypatch.setenv("VIRNUCPRO_MODEL_ROOT", str(tmp_path))
    load_settings.cache_clear()
    try:
        (tmp_path / "mine").symlink_to(demo_checkpoint)
        (tmp_path / f"Owner--Name@{'0' * 40}").symlink_to(demo_checkpoint)
        assert load_fast_esm("mine", device="cpu").weights.demonstration
        assert load_fast_esm("Owner/Name", device="cpu").weights.demonstration
        assert load_fast_esm("Owner/Name", revision="0" * 40, device="cpu").weights.demonstration
        for name in ("other", "min*", "Owner/N*", "**", "/absent"):
            with pytest.raises(WeightsError, match="there is no model"):
                load_fast_esm(name, device="cpu")
    finally:
        load_settings.cache_clear()


def test_a_model_that_cannot_be_looked_at_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be looked at: File name too long"):
        load_fast_esm(tmp_path / ("m" * 256), device="cpu")


def test_weights_that_are_replaced_after_they_were_hashed_are_refused(tmp_path: Path) -> None:
    checkpoint = write_demo_weights(tmp_path / "model", layers=1)
    other = write_demo_weights(tmp_path / "other", layers=1, seed=1)
    (other.folder / WEIGHTS_NAME).replace(checkpoint.folder / WEIGHTS_NAME)
    with pytest.raises(WeightsError, match="replaced"):
        open_weights(checkpoint)
    (checkpoint.folder / WEIGHTS_NAME).unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        open_weights(checkpoint)


def test_the_execution_class_names_what_bytes_depend_on(demo_model: FastEsm) -> None:
    execution = demo_model.execution()
    assert execution.to_json() == {
        "torch": torch.__version__,
        "triton": "",
        "device": "cpu",
        "hardware": execution.hardware,
        "dtype": "float32",
        "plan": "single-sdpa-eager",
        "pack_tokens": 0,
        "threads": torch.get_num_threads(),
    }
    assert demo_model.execution(512) == execution


def test_kernels_that_cannot_be_loaded_are_logged(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = open_weights(inspect_checkpoint(demo_checkpoint))
    monkeypatch.setitem(sys.modules, "virnucpro_core.embedding.fused", None)
    monkeypatch.setattr(loading, "choose_plan", lambda *_: KernelPlan.PACKED_FUSED)
    with capture_logs() as logs:
        assert build_model(weights, torch.device("cpu"), "float32").plan is KernelPlan.PACKED_VARLEN
    [entry] = logs
    assert (entry["event"], entry["plan"]) == ("fused_kernels_failed", KernelPlan.PACKED_VARLEN)
    with pytest.raises(ImportError):
        build_model(weights, torch.device("cpu"), "float32", KernelPlan.PACKED_FUSED)
