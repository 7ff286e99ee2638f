"""Manifests: a small JSON file beside each result that says what it holds and how it came to be."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from virnucpro_core.errors import ArtifactError
from virnucpro_core.failures import FailureReason
from virnucpro_core.features.files import Written, hash_file, new_file, open_artifact, reading
from virnucpro_core.recipe import Dtype, Recipe, ResiduePolicy

_FORMAT = 1
_MAX_BYTES = 16 << 20
_LONGEST_REASON = 300  # characters; a reason quotes what it found
_PACKAGES = ("numpy", "safetensors", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A file of a result, beside its manifest.

    Attributes:
        name: without folder.
        sha256: of its bytes.
        bytes: its size.
        rows: embeddings it holds.
    """

    name: str
    sha256: str
    bytes: int
    rows: int

    @classmethod
    def of(cls, written: Written, name: str | None = None) -> ResultFile:
        """`written`, under the name that it is or will be published as."""
        return cls(name or written.path.name, written.sha256, written.bytes, written.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What became of an input.

    Attributes:
        records: in the input; always embeddings + failures.
        embeddings: rows of the result.
        failures: records without an embedding, by reason; no reason that did not occur.
        residues: of all records, before truncation.
        tokens: computed, BOS and EOS included.
        truncated: records that were cut.
        unknown: residues that became <unk>.
    """

    records: int
    embeddings: int
    failures: Mapping[FailureReason, int]
    residues: int
    tokens: int
    truncated: int
    unknown: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a result is.

    Attributes:
        input_name: the input's file name, without folder.
        input_sha256: of the input as it lies on disk.
        recipe: what was asked.
        execution: the execution class, how it was run, as JSON.
        counts: what became of the records.
        files: the result, in the order of its rows.
        versions: Python's and the libraries' that wrote it.
    """

    input_name: str
    input_sha256: str
    recipe: Recipe
    execution: Mapping[str, object]
    counts: Counts
    files: tuple[ResultFile, ...]
    versions: Mapping[str, str]


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that shape a result; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # not everything is installed everywhere (a GPU host needs no transformers)
    return versions


def write_manifest(path: Path, manifest: Manifest) -> Written:
    """Writes a manifest in one step; equal manifests give equal bytes.

    Raises:
        ArtifactError: the file cannot be written.
    """
    content = {"format": _FORMAT, **asdict(manifest)}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    with new_file(path) as file:
        file.write(text.encode() + b"\n")
    return Written(path, file.sha256, file.bytes, manifest.counts.embeddings)


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        ArtifactError: it is missing, or not a manifest that `write_manifest` writes.
    """
    with open_artifact(path) as file, reading(path):
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise _odd(path, "it is too large")
    try:
        content = json.loads(text)
        # JSON can hold half a surrogate pair, and numbers beyond all: neither could be written again.
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        return _decode(content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _odd(path, str(error)[:_LONGEST_REASON] or type(error).__name__) from error


def find_faults(manifest: Manifest, folder: Path) -> list[str]:
    """Compares the files in `folder` with their manifest; one line each for what is missing or altered."""
    faults = []
    for file in manifest.files:
        path = folder / file.name
        try:
            size, sha256 = path.stat().st_size, hash_file(path)
        except (OSError, ArtifactError):
            faults.append(f"{file.name} is missing or unreadable")
            continue
        if size != file.bytes:
            faults.append(f"{file.name} has {size} bytes instead of {file.bytes}")
        elif sha256 != file.sha256:
            faults.append(f"{file.name} has sha256 {sha256} instead of {file.sha256}")
    return faults


def _decode(value: object) -> Manifest:
    content = _fields(value, {"format", *(field.name for field in fields(Manifest))})
    if content["format"] != _FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {_FORMAT}")
    counts = _fields(content["counts"], {field.name for field in fields(Counts)})
    failures = _mapping(counts.pop("failures"))
    reasons = {FailureReason(reason): _count(number) for reason, number in failures.items()}
    decoded = Counts(failures=reasons, **{name: _count(number) for name, number in counts.items()})
    files = tuple(_file(file) for file in _list(content["files"]))
    if decoded.records != decoded.embeddings + sum(reasons.values()):
        raise ValueError("its records are not its embeddings and failures together")
    if decoded.embeddings != sum(file.rows for file in files):
        raise ValueError("its embeddings are not the rows of its files")
    return Manifest(
        input_name=_text(content["input_name"]),
        input_sha256=_text(content["input_sha256"]),
        recipe=_recipe(content["recipe"]),
        execution=_mapping(content["execution"]),
        counts=decoded,
        files=files,
        versions={name: _text(number) for name, number in _mapping(content["versions"]).items()},
    )


def _recipe(value: object) -> Recipe:
    recipe = Recipe(**_fields(value, {field.name for field in fields(Recipe)}))
    _text(recipe.weights_sha256)
    _count(recipe.truncation)
    one_of = (
        (recipe.dtype, get_args(Dtype)),
        (recipe.residues, get_args(ResiduePolicy)),
        (recipe.pooling, ("mean_residues",)),
    )
    if any(value not in allowed for value, allowed in one_of):
        raise ValueError("its recipe is not one of this version")
    if not isinstance(recipe.token_dropout, bool) or not isinstance(recipe.demonstration, bool):
        raise TypeError("its recipe is not one of this version")
    return recipe


def _file(value: object) -> ResultFile:
    content = _fields(value, {field.name for field in fields(ResultFile)})
    name = _text(content["name"])
    # A manifest comes from elsewhere, and its files are opened: none outside its own folder.
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a file name")
    return ResultFile(name, _text(content["sha256"]), _count(content["bytes"]), _count(content["rows"]))


def _fields(value: object, names: set[str]) -> dict[str, Any]:
    content = _mapping(value)
    if set(content) != names:
        raise KeyError(f"its fields {sorted(content)} are not {sorted(names)}")
    return content


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _odd(path: Path, why: str) -> ArtifactError:
    todo = "Remove it, and make the result again."
    return ArtifactError(f"not a usable manifest: {why}", where=str(path), todo=todo)
