"""Loading: from a name, a folder or another library's module to a model that is ready to compute."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from virnucpro_core.embedding.attention import has_packed_attention
from virnucpro_core.embedding.checkpoint import (
    WEIGHTS_NAME,
    Checkpoint,
    check_config,
    check_tensors,
    expected_tensors,
    fetch_weights,
    fetched_folder,
    inspect_checkpoint,
    read_stamp,
    unreadable_weights,
)
from virnucpro_core.embedding.execution import KernelPlan, describe_execution
from virnucpro_core.embedding.memory import explained_memory
from virnucpro_core.embedding.model import TORCH_DTYPES, Encoder, FastEsm, Weights
from virnucpro_core.embedding.packing import EXTRA_TOKENS, LEAST_PACK_TOKENS, PACK_TOKENS, build_pack
from virnucpro_core.embedding.verdicts import has_passed
from virnucpro_core.errors import ExecutionError, WeightsError
from virnucpro_core.recipe import EMBEDDING_WIDTH, Dtype
from virnucpro_core.sequences.residues import VOCABULARY

log = structlog.get_logger()

ModelSource = str | os.PathLike[str] | nn.Module | FastEsm
"""What a caller may name as a model."""


def load_fast_esm(
    model: ModelSource,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: Dtype | None = None,
) -> FastEsm:
    """Loads FastESM2 natively: safetensors only, no remote code, no tokenizer files.

    Args:
        model: a checkpoint's folder, a name below the model root, a Hub repository with `revision`, a
            transformers `EsmModel` or FastESM module whose weights are adopted, or a model loaded already.
        revision: a Hub commit, 40 hex digits; only for a repository.
        device: `cpu`, `cuda`, `cuda:1`; the GPU if there is one.
        dtype: precision of the forward pass; float16 on a GPU, float32 on a CPU, which computes nothing else.
            `fp8` only once these weights passed the selftest in it, in the same execution class.

    Raises:
        WeightsError: the weights are missing, incomplete, or not FastESM2.
        ExecutionError: the device is missing, cannot compute in `dtype` or has no memory left for the model, or FP8
            has not passed the selftest.
    """
    if isinstance(model, FastEsm):
        return _check_loaded(model, device, dtype)
    place, precision = choose_device(device, dtype)
    with explained_memory(place):
        if isinstance(model, nn.Module):
            if precision == "fp8":
                raise ExecutionError(
                    "FP8 needs a checkpoint that passed its selftest",
                    where=type(model).__name__,
                    todo="Name the checkpoint's folder instead of a module.",
                )
            return build_model(adopt_weights(model), place, precision)
        checkpoint = find_checkpoint(model, revision)
        if precision == "fp8":
            _check_accepted(checkpoint, place)
        return build_model(open_weights(checkpoint), place, precision)


def choose_device(device: str | torch.device | None, dtype: Dtype | None) -> tuple[torch.device, Dtype]:
    """The device and dtype to compute with, defaults filled in.

    Raises:
        ExecutionError: the device is missing or cannot compute in `dtype`.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ExecutionError("no such device", where=str(device), todo="Name cpu, cuda or cuda:N.") from error
    if place.type not in ("cpu", "cuda"):
        raise ExecutionError(
            "this device is not supported", where=str(place), todo="Name cpu, cuda or cuda:N."
        )
    precision: Dtype = dtype or ("float16" if place.type == "cuda" else "float32")
    if precision not in TORCH_DTYPES:
        raise ExecutionError(f"no such dtype: {precision}", todo=f"Name one of {', '.join(TORCH_DTYPES)}.")
    if place.type == "cpu" and precision != "float32":
        raise ExecutionError(
            f"a CPU does not compute in {precision}", where="cpu", todo="Ask for float32 or for a GPU."
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ExecutionError(
            f"there are {torch.cuda.device_count()} GPUs here",
            where=str(place),
            todo="Ask for the CPU or another GPU.",
        )
    return place, precision


def find_checkpoint(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint by folder, by name below the model root, or on the Hub at a pinned revision.

    Raises:
        WeightsError: it is nowhere, or what is there does not fit or cannot be looked at.
    """
    folder = Path(model)
    if revision is None and _is_folder(folder):
        return inspect_checkpoint(folder)
    # Read late: the settings matter only for a name, and need packages that a bare GPU machine may lack.
    from virnucpro_core.settings import load_settings

    model_root = load_settings().model_root
    name = os.fspath(model)
    if revision is not None:
        return fetch_weights(name, revision, model_root)
    if _is_folder(model_root / name):
        return inspect_checkpoint(model_root / name)
    fetched = sorted(model_root.glob(fetched_folder(Path(), glob.escape(name), "*").name))
    if len(fetched) == 1:
        return inspect_checkpoint(fetched[0])
    raise WeightsError(
        f"the model {name!r} was fetched in {len(fetched)} revisions"
        if fetched
        else f"there is no model {name!r}",
        where=str(model_root),
        todo="Name a folder, a name below the model root, or a Hub repository and its revision.",
    )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise WeightsError(
            f"the model cannot be looked at: {error.strerror}",
            where=str(path),
            todo="Let this user read the folders that lead there, or correct the name.",
        ) from error


def open_weights(checkpoint: Checkpoint) -> Weights:
    """The tensors of a checkpoint, mapped into memory.

    Raises:
        WeightsError: they are not those any more that were hashed, or cannot be read.
    """
    path = checkpoint.folder / WEIGHTS_NAME
    try:
        tensors = safe_open(path, framework="pt")
        same = read_stamp(path) == checkpoint.stamp
    except (SafetensorError, OSError) as error:
        raise unreadable_weights(error, path) from error
    if not same:
        # What they compute would be recorded as made by those that were here before.
        raise WeightsError(
            "the weights were replaced while they were loaded", where=str(path), todo="Load them again."
        )
    return Weights(
        sha256=checkpoint.sha256,
        layers=checkpoint.layers,
        token_dropout=checkpoint.token_dropout,
        demonstration=checkpoint.demonstration,
        read_tensor=lambda name: tensors.get_tensor(checkpoint.prefix + name),  # type: ignore[no-untyped-call]
    )


def adopt_weights(module: nn.Module) -> Weights:
    """The tensors of a transformers `EsmModel` or FastESM module; its code is not used.

    Raises:
        WeightsError: it is not FastESM2.
    """
    where = type(module).__name__
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise WeightsError(
            "the model has no configuration", where=where, todo="Give an EsmModel or a checkpoint's folder."
        )
    fields = config.to_dict()
    layers, token_dropout = check_config(fields, where=where)
    state = module.state_dict()
    prefix = check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, layers, where=where)
    tensors = {name: state[prefix + name] for name in expected_tensors(layers)}
    return Weights(
        sha256=_hash_tensors(tensors),
        layers=layers,
        token_dropout=token_dropout,
        demonstration=bool(fields.get("virnucpro_demonstration", False)),
        read_tensor=tensors.__getitem__,
    )


def build_model(
    weights: Weights, device: torch.device, dtype: Dtype, plan: KernelPlan | None = None
) -> FastEsm:
    """Puts weights on a device, tensor by tensor, ready to compute.

    Args:
        weights: the tensors.
        device: where to.
        dtype: precision of the forward pass.
        plan: the kernel plan, for comparisons; the fastest that runs here if none is given.

    Raises:
        ImportError, ExecutionError: the fused plan was asked for and does not run here.
    """
    with torch.device("meta"):
        encoder = Encoder(weights.layers, weights.token_dropout)
    encoder = (
        encoder.to(TORCH_DTYPES[dtype]).to_empty(device=device).requires_grad_(requires_grad=False).eval()
    )
    with torch.no_grad():
        fill_encoder(encoder, weights.read_tensor)
    chosen = plan or choose_plan(device, dtype)
    if chosen.fused:
        try:
            return _build_fused(weights, encoder, device, dtype, chosen)
        except (ImportError, ExecutionError) as error:
            if chosen is KernelPlan.PACKED_FP8:
                raise ExecutionError(
                    f"FP8 does not run here: {error}", where=str(device), todo="Ask for float16."
                ) from error
            if plan is not None:
                raise
            chosen = KernelPlan.PACKED_VARLEN
            log.warning("fused_kernels_failed", reason=str(error), plan=chosen)
    model = FastEsm(weights=weights, encoder=encoder, device=device, dtype=dtype, plan=chosen)
    if device.type == "cuda":
        _warm_up(model)
    return model


def _build_fused(
    weights: Weights, encoder: Encoder, device: torch.device, dtype: Dtype, plan: KernelPlan
) -> FastEsm:
    # They need Triton, which only the plans that use it may ask for.
    from virnucpro_core.embedding.fp8 import Fp8Layer
    from virnucpro_core.embedding.fused import FusedEncoder, HalfLayer, explained_compilation

    fused = FusedEncoder(encoder, Fp8Layer if plan is KernelPlan.PACKED_FP8 else HalfLayer)
    model = FastEsm(weights=weights, encoder=fused, device=device, dtype=dtype, plan=plan)
    with explained_compilation(device):
        _warm_up(model)
    return model


def _warm_up(model: FastEsm) -> None:
    """Runs one small pack, so that a GPU without room for the forward pass is told from records without room.

    The fused plan's kernels are compiled by it (5 s), or read from Triton's cache (0.6 s).
    """
    tokens = np.full(LEAST_PACK_TOKENS - EXTRA_TOKENS, VOCABULARY.index("A"), dtype=np.uint8)
    model.embed_pack(build_pack(tokens, np.array([0, len(tokens)]), np.array([0])))
    torch.cuda.synchronize(model.device)


def choose_plan(device: torch.device, dtype: Dtype) -> KernelPlan:
    """The fastest kernel plan that runs here; in half precision the log names what a slower one lacks.

    Raises:
        ExecutionError: FP8, which has one plan only, does not run here.
    """
    if device.type != "cuda" or dtype == "float32":
        return KernelPlan.SINGLE_SDPA
    missing = explain_missing(device)
    if dtype == "fp8":
        if missing is not None:
            raise ExecutionError(
                f"FP8 does not run here: {missing}", where=str(device), todo="Ask for float16."
            )
        return KernelPlan.PACKED_FP8
    if missing is None:
        return KernelPlan.PACKED_FUSED
    if has_packed_attention(device, TORCH_DTYPES[dtype]):
        plan = KernelPlan.PACKED_VARLEN
    else:
        plan = KernelPlan.SINGLE_SDPA
        missing += "; packed attention needs torch 2.10 and compute capability 8.0"
    log.warning("fused_kernels_missing", reason=missing, plan=plan, device=str(device))
    return plan


def explain_missing(device: torch.device) -> str | None:
    """Why the fused kernels do not run on a GPU; None if they do."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "they are made for Hopper GPUs (compute capability 9.0)"
    if find_spec("triton") is None:
        return "Triton is missing"
    # Triton builds its launcher when it first runs a kernel.
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "Triton needs a C compiler (gcc, clang or CC)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Triton needs Python's C headers"
    return None


def fill_encoder(encoder: Encoder, read_tensor: Callable[[str], Tensor]) -> None:
    """Copies a checkpoint's tensors into the module; query, key and value become one matrix."""

    def fill(part: nn.Module, name: str) -> None:
        part.get_parameter("weight").copy_(read_tensor(f"{name}.weight"))
        part.get_parameter("bias").copy_(read_tensor(f"{name}.bias"))

    encoder.words.weight.copy_(read_tensor("embeddings.word_embeddings.weight"))
    fill(encoder.final_norm, "encoder.emb_layer_norm_after")
    for index, layer in enumerate(encoder.layers):
        inside = f"encoder.layer.{index}."
        fill(layer.get_submodule("attention_norm"), f"{inside}attention.LayerNorm")
        fill(layer.get_submodule("attention_out"), f"{inside}attention.output.dense")
        fill(layer.get_submodule("mlp_norm"), f"{inside}LayerNorm")
        fill(layer.get_submodule("mlp_in"), f"{inside}intermediate.dense")
        fill(layer.get_submodule("mlp_out"), f"{inside}output.dense")
        joined = layer.get_submodule("query_key_value")
        for third, part in enumerate(("query", "key", "value")):
            rows = slice(third * EMBEDDING_WIDTH, (third + 1) * EMBEDDING_WIDTH)
            joined.get_parameter("weight")[rows].copy_(read_tensor(f"{inside}attention.self.{part}.weight"))
            joined.get_parameter("bias")[rows].copy_(read_tensor(f"{inside}attention.self.{part}.bias"))


def _check_loaded(model: FastEsm, device: str | torch.device | None, dtype: Dtype | None) -> FastEsm:
    place, precision = choose_device(device or model.device, dtype or model.dtype)
    if (place.type, place.index or 0, precision) != (model.device.type, model.device.index or 0, model.dtype):
        raise ExecutionError(
            f"the model is loaded on {model.device} in {model.dtype}, not on {place} in {precision}",
            todo="Load it again from its folder, for that device and dtype.",
        )
    return model


def _check_accepted(checkpoint: Checkpoint, device: torch.device) -> None:
    execution = describe_execution(device, "fp8", choose_plan(device, "fp8"), PACK_TOKENS)
    if not has_passed(checkpoint, execution):
        raise ExecutionError(
            "these weights have not passed the selftest in FP8 on this kind of GPU, with this software",
            where=str(checkpoint.folder),
            todo=f"Run `virnucpro selftest --model {checkpoint.folder} --dtype fp8`, or ask for float16.",
        )


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes and bytes; the names fix the shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
