"""Checkpoints of FastESM2: checked, hashed, fetched from the Hub. No torch here."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from virnucpro_core.errors import WeightsError
from virnucpro_core.recipe import EMBEDDING_WIDTH

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

HEADS = 20
HEAD_WIDTH = EMBEDDING_WIDTH // HEADS
MLP_WIDTH = 5120
VOCABULARY_SIZE = 33
NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0

SHAPE: dict[str, object] = {
    "hidden_size": EMBEDDING_WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP_WIDTH,
    "vocab_size": VOCABULARY_SIZE,
    "layer_norm_eps": NORM_EPSILON,
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
}
"""Fields of config.json that the forward pass relies on, as on the Hub."""

_IGNORED = re.compile(
    r"lm_head\.|pooler\.|contact_head\.|.*rotary_embeddings\.inv_freq$|embeddings\.position_ids$"
)
"""Names, without `esm.`, that embeddings do not need: heads, and tables that are computed instead."""

INVERSE_FREQUENCIES = re.compile(r".*rotary_embeddings\.inv_freq$")
"""Names of the stored rotary frequencies, which the forward pass computes itself."""

_REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that was found to hold complete FastESM2 weights.

    Attributes:
        folder: where config.json and model.safetensors lie.
        sha256: of model.safetensors.
        layers: transformer layers (33 in FastESM2_650).
        token_dropout: whether embeddings are scaled by 0.88.
        demonstration: whether the weights are random.
        prefix: what stands before every tensor's name: `esm.` or nothing.
        config: config.json.
        stamp: of model.safetensors, from before it was hashed; see `read_stamp`.
    """

    folder: Path
    sha256: str
    layers: int
    token_dropout: bool
    demonstration: bool
    prefix: str
    config: dict[str, Any]
    stamp: tuple[int, int]


def inverse_frequencies() -> NDArray[np.float32]:
    """Rotary frequencies, float32 (32,): base^(-2i/64), as every ESM2 has them."""
    exponents = np.arange(0, HEAD_WIDTH, 2, dtype=np.float32) / np.float32(HEAD_WIDTH)
    return (1.0 / np.float32(ROTARY_BASE) ** exponents).astype(np.float32)


def expected_tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Name (without `esm.`) and shape of every tensor that the forward pass uses: 16 a layer and 3 more."""
    width = (EMBEDDING_WIDTH,)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY_SIZE, EMBEDDING_WIDTH),
        "encoder.emb_layer_norm_after.weight": width,
        "encoder.emb_layer_norm_after.bias": width,
    }
    for layer in range(layers):
        inside = f"encoder.layer.{layer}."
        for norm in ("attention.LayerNorm", "LayerNorm"):
            shapes[f"{inside}{norm}.weight"] = width
            shapes[f"{inside}{norm}.bias"] = width
        for linear, outputs, inputs in (
            ("attention.self.query", EMBEDDING_WIDTH, EMBEDDING_WIDTH),
            ("attention.self.key", EMBEDDING_WIDTH, EMBEDDING_WIDTH),
            ("attention.self.value", EMBEDDING_WIDTH, EMBEDDING_WIDTH),
            ("attention.output.dense", EMBEDDING_WIDTH, EMBEDDING_WIDTH),
            ("intermediate.dense", MLP_WIDTH, EMBEDDING_WIDTH),
            ("output.dense", EMBEDDING_WIDTH, MLP_WIDTH),
        ):
            shapes[f"{inside}{linear}.weight"] = (outputs, inputs)
            shapes[f"{inside}{linear}.bias"] = (outputs,)
    return shapes


def inspect_checkpoint(folder: str | Path) -> Checkpoint:
    """Checks that a folder holds FastESM2 weights which fit to the last tensor, and hashes them.

    Raises:
        WeightsError: a file is missing or unreadable, a field of config.json differs, or tensors are missing,
            unknown, or of another shape or dtype than float32; it names the file and the tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    layers, token_dropout = check_config(config, where=str(folder / CONFIG_NAME))
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise WeightsError(
            f"the checkpoint has no {WEIGHTS_NAME}",
            where=str(folder),
            todo="Copy it there; pickled (.bin) and sharded checkpoints are not read.",
        )
    try:
        stamp = read_stamp(path)
        with safe_open(path, framework="numpy") as tensors:
            names = list(tensors.keys())
            slices = {name: tensors.get_slice(name) for name in names}
            prefix = check_tensors(
                {n: tuple(s.get_shape()) for n, s in slices.items()}, layers, where=str(path)
            )
            _check_dtypes({n: str(s.get_dtype()) for n, s in slices.items()}, where=str(path))
            for name in filter(INVERSE_FREQUENCIES.match, names):
                _check_frequencies(name, tensors.get_tensor(name), where=str(path))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (SafetensorError, OSError) as error:
        raise unreadable_weights(error, path) from error
    return Checkpoint(
        folder=folder,
        sha256=sha256,
        layers=layers,
        token_dropout=token_dropout,
        demonstration=bool(config.get("virnucpro_demonstration", False)),
        prefix=prefix,
        config=config,
        stamp=stamp,
    )


def read_stamp(path: Path) -> tuple[int, int]:
    """What tells whether a file was replaced or written to since: its size, and when it was last written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def unreadable_weights(error: Exception, path: Path) -> WeightsError:
    """The error for a model.safetensors that cannot be read."""
    return WeightsError(
        f"the weights cannot be read: {error}", where=str(path), todo="Fetch or copy the file again."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        WeightsError: it is missing, unreadable, or no JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(
            f"the checkpoint has no readable {CONFIG_NAME}: {error.strerror}",
            where=str(path),
            todo="Name a folder that holds config.json and model.safetensors.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{CONFIG_NAME} is not JSON: {error}", where=str(path), todo="Fetch or copy it again."
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{CONFIG_NAME} holds no object", where=str(path), todo="Fetch or copy it again.")
    return config


def check_config(config: Mapping[str, Any], *, where: str) -> tuple[int, bool]:
    """Returns the number of layers and token_dropout of a configuration that describes FastESM2.

    `token_dropout` has to be said: transformers takes a missing one for False, the Hub means True, and the
    embeddings differ.

    Raises:
        WeightsError: a field is missing or has another value than the forward pass is written for.
    """
    wrong = [
        f"{name} is {config.get(name)!r} instead of {value!r}"
        for name, value in SHAPE.items()
        if config.get(name) != value
    ]
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        wrong.append(f"num_hidden_layers is {layers!r}")
    if wrong:
        raise WeightsError(
            f"this is not FastESM2: {'; '.join(wrong)}", where=where, todo="Name a FastESM2_650 checkpoint."
        )
    token_dropout = config.get("token_dropout")
    if not isinstance(token_dropout, bool):
        raise WeightsError(
            "token_dropout is not stated",
            where=where,
            todo='Add "token_dropout": true (the Hub since July 2025) or false (before).',
        )
    assert isinstance(layers, int)
    return layers, token_dropout


def check_tensors(shapes: Mapping[str, tuple[int, ...]], layers: int, *, where: str) -> str:
    """Checks names and shapes of a checkpoint's tensors, and returns the prefix of the names.

    Raises:
        WeightsError: naming what is missing, unknown or misshapen.
    """
    prefix = "esm." if any(name.startswith("esm.") for name in shapes) else ""
    expected = {prefix + name: shape for name, shape in expected_tensors(layers).items()}
    faults = _name_some("missing", expected.keys() - shapes.keys())
    unknown = (
        name for name in shapes.keys() - expected.keys() if not _IGNORED.match(name.removeprefix(prefix))
    )
    faults += _name_some("unknown", unknown)
    misshapen = (name for name in expected.keys() & shapes.keys() if shapes[name] != expected[name])
    faults += _name_some("of another shape", (f"{name} {shapes[name]}" for name in misshapen))
    if faults:
        raise WeightsError(
            f"the tensors do not fit: {'; '.join(faults)}",
            where=where,
            todo="Fetch a complete FastESM2_650 checkpoint.",
        )
    return prefix


def fetched_folder(model_root: Path, repository: str, revision: str) -> Path:
    """Where `fetch_weights` puts a revision of a Hub repository."""
    return model_root / f"{repository.replace('/', '--')}@{revision}"


def fetch_weights(repository: str, revision: str, model_root: str | Path) -> Checkpoint:
    """Fetches config.json and model.safetensors of one pinned revision from the Hub; no code, no pickles.

    Args:
        repository: `owner/name`, as `Synthyra/FastESM2_650`.
        revision: the commit, all 40 hex digits: a branch's name may mean other weights tomorrow.
        model_root: folder below which the checkpoint gets a folder of its own.

    Raises:
        WeightsError: the revision is not pinned, the Hub cannot be reached, or what came does not fit.
    """
    if not _REVISION.fullmatch(revision or ""):
        raise WeightsError(
            f"the revision {revision!r} is not pinned",
            where=repository,
            todo="Give the commit's 40 hex digits, as the Hub shows them under Files, History.",
        )
    folder = fetched_folder(Path(model_root), repository, revision)
    if folder.exists():
        return inspect_checkpoint(folder)
    # Loaded late: it takes a second, and only this function needs it.
    import huggingface_hub
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # What it says comes to our handler, too: one line is enough.
    logging.getLogger(huggingface_hub.__name__).handlers.clear()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        arriving = Path(scratch, "checkpoint")
        try:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                huggingface_hub.hf_hub_download(repository, name, revision=revision, local_dir=arriving)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, HTTPError, OSError) as error:
            raise WeightsError(
                f"the weights cannot be fetched: {str(error).strip().splitlines()[0]}",
                where=f"{repository}@{revision}",
                todo="Check the name and the network, or copy the folder here and name its path.",
            ) from error
        shutil.rmtree(arriving / ".cache", ignore_errors=True)  # the client's notes on the download
        inspect_checkpoint(arriving)
        try:
            arriving.rename(folder)
        except OSError:
            # Another process has fetched it meanwhile.
            if not folder.exists():
                raise
    return inspect_checkpoint(folder)


def _check_dtypes(dtypes: Mapping[str, str], *, where: str) -> None:
    others = _name_some(
        "not float32", (f"{name} {dtype}" for name, dtype in dtypes.items() if dtype != "F32")
    )
    if others:
        raise WeightsError(
            f"the tensors do not fit: {others[0]}",
            where=where,
            todo="Use the float32 checkpoint; the precision of the forward pass is chosen when it is loaded.",
        )


def _check_frequencies(name: str, stored: NDArray[np.float32], *, where: str) -> None:
    computed = inverse_frequencies()
    if stored.shape != computed.shape or not np.allclose(stored, computed, rtol=1e-6, atol=0.0):
        raise WeightsError(
            f"{name} differs from rotary base {ROTARY_BASE:.0f}",
            where=where,
            todo="Fetch a FastESM2_650 checkpoint.",
        )


def _name_some(fault: str, names: Iterable[str], most: int = 5) -> list[str]:
    """One phrase that counts the names and shows the first of them; nothing if there are none."""
    ordered = sorted(names)
    if not ordered:
        return []
    more = ", …" if len(ordered) > most else ""
    return [f"{len(ordered)} {fault} ({', '.join(ordered[:most])}{more})"]
