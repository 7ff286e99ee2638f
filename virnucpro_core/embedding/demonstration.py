"""Demonstration weights: random numbers in FastESM2's shape, the same bytes every time. No torch here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnucpro_core.embedding.checkpoint import (
    CONFIG_NAME,
    HEAD_WIDTH,
    INVERSE_FREQUENCIES,
    SHAPE,
    VOCABULARY_SIZE,
    WEIGHTS_NAME,
    Checkpoint,
    expected_tensors,
    inspect_checkpoint,
    inverse_frequencies,
    read_config,
)
from virnucpro_core.errors import WeightsError
from virnucpro_core.features.files import NewFile, new_file
from virnucpro_core.recipe import EMBEDDING_WIDTH


def write_demo_weights(
    folder: str | Path, layers: int = 2, seed: int = 0, token_dropout: bool = True
) -> Checkpoint:
    """Writes random weights in FastESM2's shape and names, the same bytes every time for one seed.

    They make the pipeline run without the Hub and mean nothing; config.json says so. A folder that holds them
    already is left as it is.

    Raises:
        WeightsError: the folder holds another checkpoint.
        ArtifactError: the folder cannot be written.
    """
    folder = Path(folder)
    config = _demo_config(layers, seed, token_dropout)
    if (folder / CONFIG_NAME).exists():
        if read_config(folder) != config:
            raise WeightsError(
                "another checkpoint is there already",
                where=str(folder),
                todo="Choose another folder for the demonstration.",
            )
        return inspect_checkpoint(folder)
    with new_file(folder / WEIGHTS_NAME) as file:
        _write_random_tensors(file, layers, seed)
    # The configuration comes last: a folder without it is incomplete, and is written again.
    with new_file(folder / CONFIG_NAME) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    return inspect_checkpoint(folder)


def _demo_config(layers: int, seed: int, token_dropout: bool) -> dict[str, object]:
    """The Hub's config.json for as many layers, marked as a demonstration."""
    remote_code = {"AutoModel": "FastEsmModel", "AutoModelForMaskedLM": "FastEsmForMaskedLM"}
    return {
        "architectures": ["FastEsmForMaskedLM"],
        "attention_probs_dropout_prob": 0.0,
        "auto_map": {task: f"modeling_fastesm.{name}" for task, name in remote_code.items()},
        "hidden_dropout_prob": 0.0,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "model_type": "fast_esm",
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "token_dropout": token_dropout,
        "torch_dtype": "float32",
        "transformers_version": "4.45.0",
        "virnucpro_demonstration": True,
        "virnucpro_seed": seed,
        **SHAPE,
    }


def _write_random_tensors(file: NewFile, layers: int, seed: int) -> None:
    """Writes a safetensors file with the Hub's names, one tensor in memory at a time."""
    shapes = {f"esm.{name}": shape for name, shape in expected_tensors(layers).items()}
    for layer in range(layers):
        shapes[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = (HEAD_WIDTH // 2,)
    shapes |= {
        "lm_head.bias": (VOCABULARY_SIZE,),
        "lm_head.decoder.weight": (VOCABULARY_SIZE, EMBEDDING_WIDTH),
        "lm_head.dense.bias": (EMBEDDING_WIDTH,),
        "lm_head.dense.weight": (EMBEDDING_WIDTH, EMBEDDING_WIDTH),
        "lm_head.layer_norm.bias": (EMBEDDING_WIDTH,),
        "lm_head.layer_norm.weight": (EMBEDDING_WIDTH,),
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for index, (name, shape) in enumerate(shapes.items()):
        file.write(_random_tensor(name, shape, key=(seed, index)).data)


def _random_tensor(name: str, shape: tuple[int, ...], key: tuple[int, int]) -> NDArray[np.float32]:
    """A uniform tensor at a scale that keeps activations as large as a trained model's.

    The bits come from Philox, whose stream numpy promises never to change, so that the file's sha256 stays.
    """
    if INVERSE_FREQUENCIES.match(name):
        return inverse_frequencies()
    count = int(np.prod(shape))
    bits = (
        np.random.Philox(key=np.array(key, dtype=np.uint64))
        .random_raw((count + 1) // 2)
        .view(np.uint32)[:count]
    )
    unit = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    if name.endswith("norm.weight") or "LayerNorm.weight" in name or "norm_after.weight" in name:
        values = np.float32(1.0) + np.float32(0.1) * unit
    elif "word_embeddings" in name:
        values = np.float32(1.7) * unit
    else:
        values = np.float32(0.035) * unit
    return values.reshape(shape)
