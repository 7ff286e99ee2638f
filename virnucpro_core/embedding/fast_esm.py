"""`extract_fast_esm`: the call that users of VirNucPro know, on top of `extract`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from virnucpro_core.embedding.extraction import Extraction, extract
from virnucpro_core.embedding.loading import adopt_weights, choose_device, find_checkpoint, load_fast_esm
from virnucpro_core.embedding.model import FastEsm, make_recipe
from virnucpro_core.embedding.packing import PACK_TOKENS
from virnucpro_core.errors import ArtifactError, MismatchError, WeightsError
from virnucpro_core.failures import Failure
from virnucpro_core.features.exports import read_pt, write_pt
from virnucpro_core.features.files import check_apart, check_writable, hash_file, new_file
from virnucpro_core.features.manifests import (
    Manifest,
    ResultFile,
    find_faults,
    installed_versions,
    read_manifest,
    write_manifest,
)
from virnucpro_core.recipe import TRUNCATION, Recipe
from virnucpro_core.sequences.residues import VOCABULARY

log = structlog.get_logger()

_RESIDUE_ALPHABET = VOCABULARY[: VOCABULARY.index("<null_1>")]


def extract_fast_esm(
    fasta_file: str | os.PathLike[str],
    out_file: str | os.PathLike[str] | None = None,
    model: Any = None,
    tokenizer: Any = None,
    truncation_seq_length: int = TRUNCATION,
    toks_per_batch: int = PACK_TOKENS,
    *,
    allow_nucleotides: bool = False,
) -> tuple[list[str], list[Tensor]]:
    """Embeds the proteins of a FASTA file, or returns the result that an earlier call left in `out_file`.

    With `out_file`, that file gets `{'proteins': [...], 'data': [...]}`, and beside it `<out_file>.json` says
    what it is (input's sha256, recipe, counts, checksum). Records without an embedding are listed in
    `<out_file>.failures.jsonl`, and a `UserWarning` counts them. A kept result is returned only if input,
    recipe and checksums are still the same, and is computed again otherwise. A `model` without weights to
    compare (None, a module without a configuration, or nothing that `load_fast_esm` takes) is content with a
    kept result of any weights.

    Args:
        fasta_file: plain, gzip, bgzip or zstd FASTA.
        out_file: where the result is kept; always one file, whatever the number of rows.
        model: as `load_fast_esm` takes it.
        tokenizer: accepted for compatibility and not used; it must agree with ours on the residue alphabet.
        truncation_seq_length: residues kept of each record.
        toks_per_batch: tokens in a pack on a GPU; a CPU computes each record alone.
        allow_nucleotides: take a file that looks like nucleotides for proteins.

    Returns:
        Ids and float32 CPU tensors of shape (1280,), one per embedded record, in input order. The tensors are
        views of one matrix: `clone()` one before saving it by itself.

    Raises:
        InputError: the file cannot be used as a whole.
        SettingsError: the truncation leaves no residue, or the result, or what lies beside it, would replace the input.
        WeightsError: no model is named, or it is not FastESM2.
        MismatchError: the tokenizer disagrees with ours.
        ArtifactError: the result cannot be written; what can be told before it is computed is.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    target = Path(out_file) if out_file is not None else None
    if target is not None:
        kept = _find_kept(Path(fasta_file), target, model, truncation_seq_length)
        if kept is not None:
            result = read_pt(target)
            _warn_of_failures(sum(kept.counts.failures.values()), target)
            return result
        check_target(target, Path(fasta_file))
    if not isinstance(model, str | os.PathLike | nn.Module | FastEsm):
        raise WeightsError(
            "no model is named" if model is None else f"a {type(model).__name__} is no model",
            where="extract_fast_esm(model=…)",
            todo="Give a checkpoint's folder, a model's name, an EsmModel, or what load_fast_esm returns.",
        )
    loaded = load_fast_esm(model)
    extraction = extract(
        fasta_file,
        loaded,
        truncation=truncation_seq_length,
        toks_per_batch=toks_per_batch,
        allow_nucleotides=allow_nucleotides,
    )
    if target is not None:
        keep_result(target, Path(fasta_file), extraction, loaded.recipe(truncation=truncation_seq_length))
    _warn_of_failures(len(extraction.failures), target)
    return extraction.ids, list(torch.from_numpy(extraction.embeddings).unbind())


def check_target(target: Path, fasta: Path) -> None:
    """Checks that a result can be kept as `target`, with its manifest and its failures beside it.

    Raises:
        SettingsError: one of them would replace the input.
        ArtifactError: one of them cannot be written, or the name is not UTF-8, as the manifest is that tells it.
    """
    try:
        str(target).encode()
    except UnicodeEncodeError as error:
        what = "the output's name is not UTF-8"
        raise ArtifactError(what, where=repr(str(target)), todo="Name another file.") from error
    for path in (target, manifest_path(target), failures_path(target)):
        check_apart(path, fasta)
        check_writable(path)


def keep_result(target: Path, fasta: Path, extraction: Extraction, recipe: Recipe) -> None:
    """Writes a result where `extract_fast_esm` finds it; the manifest last, because it makes a result count.

    Raises:
        ArtifactError: a file cannot be written.
    """
    written = write_pt(target, extraction.ids, extraction.embeddings)
    _write_failures(failures_path(target), extraction.failures)
    manifest = Manifest(
        input_name=fasta.name,
        input_sha256=extraction.input_sha256,
        recipe=recipe,
        execution=extraction.execution.to_json(),
        counts=extraction.counts,
        files=(ResultFile.of(written),),
        versions=installed_versions(),
    )
    write_manifest(manifest_path(target), manifest)


def check_tokenizer(tokenizer: Any) -> None:
    """Checks that another library's tokenizer gives the residue alphabet our ids.

    Raises:
        MismatchError: it does not, or does not tell.
    """
    alphabet = getattr(tokenizer, "alphabet", tokenizer)  # fair-esm's batch converter carries its alphabet
    get_vocabulary = getattr(alphabet, "get_vocab", lambda: getattr(alphabet, "tok_to_idx", None))
    theirs = get_vocabulary()
    where = type(tokenizer).__name__
    todo = "Leave the tokenizer out, or give ESM2's."
    if not isinstance(theirs, Mapping):
        raise MismatchError("the tokenizer does not tell its vocabulary", where=where, todo=todo)
    differing = [symbol for token, symbol in enumerate(_RESIDUE_ALPHABET) if theirs.get(symbol) != token]
    if differing:
        raise MismatchError(
            f"the tokenizer disagrees with ESM2's alphabet on {', '.join(differing[:8])}",
            where=where,
            todo=todo,
        )


def failures_path(target: Path) -> Path:
    """Where the failures of the result `target` are listed, one JSON object a line."""
    return target.parent / f"{target.name}.failures.jsonl"


def manifest_path(target: Path) -> Path:
    """Where the manifest of the result `target` lies."""
    return target.parent / f"{target.name}.json"


def _find_kept(fasta: Path, target: Path, model: Any, truncation: int) -> Manifest | None:
    """The manifest of a complete, verified result for this input and recipe, or None."""
    try:
        if not manifest_path(target).exists():
            return None
        manifest = read_manifest(manifest_path(target))
        input_sha256 = hash_file(fasta)
        failures = _count_lines(failures_path(target))
    except (ArtifactError, OSError) as error:
        log.warning("kept_result_unusable", path=str(target), reason=str(error))
        return None
    wanted = _find_recipe(model, truncation)
    if wanted is None:
        log.warning(
            "kept_result_of_any_weights", path=str(target), weights_sha256=manifest.recipe.weights_sha256
        )
        wanted = replace(manifest.recipe, truncation=truncation, residues="unknown")
    faults = find_faults(manifest, target.parent)
    if [file.name for file in manifest.files] != [target.name]:
        faults.append("it describes another file")
    if manifest.input_sha256 != input_sha256:
        faults.append("the input is another")
    if manifest.recipe != wanted:
        faults.append("the recipe is another")
    if failures != sum(manifest.counts.failures.values()):
        faults.append("its list of failures is incomplete")
    if faults:
        log.info("kept_result_unusable", path=str(target), reason="; ".join(faults))
        return None
    return manifest


def _find_recipe(model: Any, truncation: int) -> Recipe | None:
    """The recipe that a model stands for, without calling it; None if it has no weights to compare."""
    if isinstance(model, FastEsm):
        return model.recipe(truncation=truncation)
    _, dtype = choose_device(None, None)
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return make_recipe(adopt_weights(model), dtype, truncation)
    if isinstance(model, str | os.PathLike):
        return make_recipe(find_checkpoint(model), dtype, truncation)
    return None


def _write_failures(path: Path, failures: list[Failure]) -> None:
    if not failures:
        path.unlink(missing_ok=True)  # of an earlier result under this name
        return
    with new_file(path) as file:
        for failure in failures:
            file.write(json.dumps(asdict(failure), ensure_ascii=False).encode() + b"\n")


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _warn_of_failures(count: int, target: Path | None) -> None:
    if count:
        where = f"; see {failures_path(target)}" if target is not None else ""
        warnings.warn(f"{count} records have no embedding{where}", UserWarning, stacklevel=3)
