"""Our forward pass equals that of transformers, and what lies beside a sequence does not change it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EsmModel, EsmTokenizer

from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.extraction import embed
from virnucpro_core.embedding.loading import load_fast_esm
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.errors import ExecutionError
from virnucpro_core.failures import FailureReason
from virnucpro_core.sequences.fasta import RecordBatch, parse_records
from virnucpro_core.sequences.residues import VOCABULARY

pytestmark = pytest.mark.integration

MakeProteins = Callable[..., list[str]]


def parse(sequences: list[str]) -> RecordBatch:
    fasta = "".join(f">protein_{index}\n{sequence}\n" for index, sequence in enumerate(sequences))
    return parse_records(fasta.encode(), first_record=1)


def embed_with_transformers(model: EsmModel, folder: Path, sequences: list[str]) -> np.ndarray:
    """Mean over residues of the last hidden state, by the model and tokenizer of transformers."""
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = EsmTokenizer(str(folder / "vocab.txt"))
    rows = []
    with torch.inference_mode():
        for sequence in sequences:
            hidden = model(**tokenizer(sequence, return_tensors="pt")).last_hidden_state
            rows.append(hidden[0, 1 : len(sequence) + 1].mean(dim=0))
    return torch.stack(rows).numpy()


@pytest.fixture(params=[True, False], ids=["token_dropout", "no_token_dropout"])
def checkpoint(request: pytest.FixtureRequest, demo_checkpoint: Path, tmp_path: Path) -> Path:
    """The demonstration weights under either meaning of token_dropout."""
    config = json.loads((demo_checkpoint / "config.json").read_text()) | {"token_dropout": request.param}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(demo_checkpoint / "model.safetensors")
    return tmp_path


@pytest.fixture
def reference(checkpoint: Path) -> EsmModel:
    return EsmModel.from_pretrained(checkpoint, add_pooling_layer=False, dtype=torch.float32).eval()


def test_embeddings_equal_those_of_transformers(
    checkpoint: Path, reference: EsmModel, make_proteins: MakeProteins, tmp_path: Path
) -> None:
    sequences = [*make_proteins(1, 2, 20, 52, 200, 1024), "MKXBUZO", "A" * 100]
    ours = embed(load_fast_esm(checkpoint, device="cpu"), parse(sequences)).embeddings
    theirs = embed_with_transformers(reference, tmp_path, sequences)
    assert np.abs(ours - theirs).max() <= 1e-5
    assert np.abs(theirs).max() > 0.1


def test_an_adopted_model_gives_the_same_bytes(
    checkpoint: Path, reference: EsmModel, make_proteins: MakeProteins
) -> None:
    batch = parse(make_proteins(20, 52))
    adopted, loaded = load_fast_esm(reference, device="cpu"), load_fast_esm(checkpoint, device="cpu")
    assert np.array_equal(embed(adopted, batch).embeddings, embed(loaded, batch).embeddings)
    assert adopted.weights.token_dropout == loaded.weights.token_dropout
    assert adopted.weights.demonstration


def test_token_dropout_changes_embeddings(demo_checkpoint: Path, demo_model: FastEsm) -> None:
    without = load_fast_esm(demo_checkpoint, device="cpu")
    without.encoder.scale = 1.0
    batch = parse(["MKVLAAGIVG"])
    assert np.abs(embed(demo_model, batch).embeddings - embed(without, batch).embeddings).max() > 1e-2


def test_neither_batch_mates_nor_order_change_a_byte(
    demo_model: FastEsm, make_proteins: MakeProteins
) -> None:
    sequences = make_proteins(7, 100, 50, 1, 50, 33)
    together = embed(demo_model, parse(sequences)).embeddings
    backwards = embed(demo_model, parse(sequences[::-1])).embeddings[::-1]
    alone = np.concatenate([embed(demo_model, parse([sequence])).embeddings for sequence in sequences])
    assert together.tobytes() == backwards.tobytes() == alone.tobytes()


def test_a_callers_autocast_changes_no_byte(demo_model: FastEsm, make_proteins: MakeProteins) -> None:
    batch = parse(make_proteins(20, 52))
    with torch.autocast("cpu", torch.bfloat16):
        inside = embed(demo_model, batch).embeddings
    assert inside.tobytes() == embed(demo_model, batch).embeddings.tobytes()


PRODUCTS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def choose_nothing() -> None:
    pass


def choose_by_the_older_setting() -> None:
    torch.set_float32_matmul_precision("medium")


def choose_by_the_newer_settings() -> None:
    for product in PRODUCTS:
        product.fp32_precision = "tf32"


@pytest.fixture
def default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for product in PRODUCTS:
        product.fp32_precision = "none"


@pytest.mark.parametrize(
    "choose", [choose_nothing, choose_by_the_older_setting, choose_by_the_newer_settings]
)
@pytest.mark.usefixtures("default_precision")
def test_a_callers_choice_of_precision_changes_no_byte_and_stays(
    demo_model: FastEsm, make_proteins: MakeProteins, choose: Callable[[], None]
) -> None:
    batch = parse(make_proteins(20, 52))
    expected = embed(demo_model, batch).embeddings
    choose()
    before = [product.fp32_precision for product in PRODUCTS]
    assert embed(demo_model, batch).embeddings.tobytes() == expected.tobytes()
    assert [product.fp32_precision for product in PRODUCTS] == before


def attend_segments(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *_: object) -> Tensor:
    """What `varlen_attn` computes, for a CPU: attention within each segment."""
    attended = torch.empty_like(query)
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        part = (tensor[begin:end].transpose(0, 1) for tensor in (query, key, value))
        attended[begin:end] = functional.scaled_dot_product_attention(*part).transpose(0, 1)
    return attended


@pytest.fixture
def packing_model(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> FastEsm:
    """A model that takes the GPU's way, packs and all, on a CPU."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_segments)
    model = load_fast_esm(demo_checkpoint, device="cpu")
    model.plan = KernelPlan.PACKED_VARLEN
    return model


@pytest.mark.parametrize("toks_per_batch", [512, 700])
def test_packed_sequences_equal_single_ones(
    demo_model: FastEsm, packing_model: FastEsm, make_proteins: MakeProteins, toks_per_batch: int
) -> None:
    batch = parse(make_proteins(3, 300, 50, 1, 50, 165, 254, 255))
    packed = embed(packing_model, batch, toks_per_batch=toks_per_batch)
    single = embed(demo_model, batch)
    scale = np.abs(single.embeddings).max(axis=1, keepdims=True)
    assert (np.abs(packed.embeddings - single.embeddings) / scale).max() <= 1e-6
    assert packed.execution.pack_tokens == toks_per_batch
    assert packed.execution.sha256 != single.execution.sha256


FULL = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
"""As torch says that memory is full, and as it says so of cuBLAS."""


@pytest.mark.parametrize("full", FULL)
def test_packs_are_halved_until_they_fit(
    packing_model: FastEsm, make_proteins: MakeProteins, monkeypatch: pytest.MonkeyPatch, full: RuntimeError
) -> None:
    batch = parse(make_proteins(100, 300, 50, 1, 700, 165, 33))
    whole = embed(packing_model, batch, toks_per_batch=2400)

    def attend_if_it_fits(query: Tensor, *rest: Tensor) -> Tensor:
        if len(query) > 700:
            raise full
        return attend_segments(query, *rest)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_if_it_fits)
    done: list[int] = []
    halved = embed(packing_model, batch, toks_per_batch=2400, on_progress=done.append)
    assert packing_model.fitting_tokens == 600
    assert [(failure.record, failure.reason) for failure in halved.failures] == [(5, FailureReason.OOM)]
    assert "702 tokens" in halved.failures[0].detail
    kept = np.isin(whole.records, halved.records)
    assert np.abs(whole.embeddings[kept] - halved.embeddings).max() <= 1e-6
    assert sum(done) == 7


def test_memory_that_others_took_is_no_fault_of_the_records(
    packing_model: FastEsm, make_proteins: MakeProteins, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend_never(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attend_never)
    with pytest.raises(ExecutionError, match="another program has taken the memory"):
        embed(packing_model, parse(make_proteins(100, 50, 300)), toks_per_batch=1024)
    with pytest.raises(ExecutionError, match="another program has taken the memory"):
        embed(packing_model, parse(make_proteins(100, 50, 700)), toks_per_batch=1024)


def test_any_other_error_is_no_lack_of_memory(
    packing_model: FastEsm, make_proteins: MakeProteins, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", break_down)
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        embed(packing_model, parse(make_proteins(100)), toks_per_batch=1024)
