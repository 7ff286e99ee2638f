"""Manifests: read as written, and nothing odd believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virnucpro_core.errors import ArtifactError
from virnucpro_core.failures import FailureReason
from virnucpro_core.features.files import Written, new_file
from virnucpro_core.features.manifests import (
    Counts,
    Manifest,
    ResultFile,
    find_faults,
    installed_versions,
    read_manifest,
    write_manifest,
)
from virnucpro_core.recipe import Recipe

pytestmark = pytest.mark.unit

MANIFEST = Manifest(
    input_name="prøteins.fasta",
    input_sha256="1" * 64,
    recipe=Recipe(weights_sha256="2" * 64, token_dropout=True, dtype="float16", demonstration=True),
    execution={"torch": "2.13.0", "threads": 2, "shapes": [[1, 128]]},
    counts=Counts(
        records=7,
        embeddings=4,
        failures={FailureReason.EMPTY: 2, FailureReason.INVALID_RESIDUE: 1},
        residues=900,
        tokens=908,
        truncated=1,
        unknown=3,
    ),
    files=(ResultFile("a.pt", "3" * 64, 10, 3), ResultFile("b.pt", "4" * 64, 5, 1)),
    versions={"python": "3.11.7"},
)

Json = dict[str, Any]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_manifest(tmp_path / "x.manifest.json", MANIFEST)
    assert read_manifest(tmp_path / "x.manifest.json") == MANIFEST
    assert write_manifest(tmp_path / "another.json", MANIFEST).sha256 == written.sha256


def test_a_person_can_read_it(tmp_path: Path) -> None:
    write_manifest(tmp_path / "x.json", MANIFEST)
    text = (tmp_path / "x.json").read_text()
    assert '"input_name": "prøteins.fasta"' in text
    assert json.loads(text)["counts"]["failures"] == {"empty": 2, "invalid_residue": 1}


def set_count(name: str, value: object) -> Callable[[Json], object]:
    return lambda content: content["counts"].update({name: value})


def set_recipe(name: str, value: object) -> Callable[[Json], object]:
    return lambda content: content["recipe"].update({name: value})


def set_file(name: str, value: object) -> Callable[[Json], object]:
    return lambda content: content["files"][0].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: content.pop("recipe"), id="no recipe"),
        pytest.param(lambda content: content.update(more=1), id="a field more"),
        pytest.param(lambda content: content.update(format=2), id="another format"),
        pytest.param(lambda content: content.update(input_sha256=None), id="no checksum"),
        pytest.param(lambda content: content.update(files={}), id="files no list"),
        pytest.param(lambda content: content.update(execution=[]), id="execution no object"),
        pytest.param(lambda content: content.update(versions={"python": 3}), id="a version no text"),
        pytest.param(lambda content: content["files"].pop(), id="a file less"),
        pytest.param(set_count("records", 8), id="records lost"),
        pytest.param(set_count("embeddings", 5), id="an embedding more"),
        pytest.param(set_count("residues", value=True), id="a count no number"),
        pytest.param(set_count("residues", -1), id="a negative count"),
        pytest.param(set_count("residues", 1.0), id="a fraction"),
        pytest.param(set_count("failures", {"tired": 3}), id="an unknown reason"),
        pytest.param(set_recipe("dtype", "float8"), id="an unknown dtype"),
        pytest.param(set_recipe("dtype", ["float16"]), id="a dtype no text"),
        pytest.param(set_recipe("residues", "any"), id="an unknown policy"),
        pytest.param(set_recipe("pooling", "max"), id="an unknown pooling"),
        pytest.param(set_recipe("token_dropout", 1), id="token_dropout no truth value"),
        pytest.param(set_recipe("truncation", "1024"), id="truncation no number"),
        pytest.param(set_recipe("weights_sha256", 2), id="weights no text"),
        pytest.param(set_file("name", "../a.pt"), id="a file elsewhere"),
        pytest.param(set_file("name", "/etc/passwd"), id="an absolute path"),
        pytest.param(set_file("name", ".."), id="the folder above"),
        pytest.param(set_file("name", ""), id="no name"),
        pytest.param(set_file("name", "a\0"), id="a NUL in a name"),
        pytest.param(set_file("name", "\ud800"), id="half a surrogate pair"),
        pytest.param(set_file("bytes", "10"), id="a size no number"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change: Callable[[Json], object]) -> None:
    path = tmp_path / "x.json"
    write_manifest(path, MANIFEST)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="not a usable manifest") as caught:
        read_manifest(path)
    assert caught.value.where == str(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(content=st.binary(max_size=200) | json_values.map(json.dumps).map(str.encode))
def test_any_other_file_is_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("m") / "x.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        read_manifest(path)


@given(place=st.lists(st.integers(0, 30), max_size=3), value=json_values)
def test_any_field_of_another_kind_is_an_error_of_ours_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: list[int], value: object
) -> None:
    path = tmp_path_factory.mktemp("m") / "x.json"
    write_manifest(path, MANIFEST)
    content: Any = json.loads(path.read_text())
    inner = content
    for step in place:
        keys = (
            list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else []
        )
        if not keys:
            break
        parent, key = inner, keys[step % len(keys)]
        inner = parent[key]
    if inner is content:
        content = value
    else:
        parent[key] = value
    path.write_text(json.dumps(content))
    try:
        manifest = read_manifest(path)
    except ArtifactError:
        return
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 10_000])
def test_a_file_made_to_exhaust_us_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "x.json")


def test_a_manifest_of_more_than_16_mib_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_manifest(path, MANIFEST)
    path.write_bytes(path.read_bytes() + b" " * (16 << 20))
    with pytest.raises(ArtifactError, match="too large"):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        read_manifest(tmp_path / "x.json")


def write_file(path: Path, content: bytes) -> Written:
    with new_file(path) as file:
        file.write(content)
    return Written(path, file.sha256, file.bytes, rows=2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (None, None),
        (lambda path: path.write_bytes(b"contenT"), "has sha256"),
        (lambda path: path.write_bytes(b"conten"), "has 6 bytes instead of 7"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_files_are_compared_with_their_manifest(
    tmp_path: Path, change: Callable[[Path], object] | None, fault: str | None
) -> None:
    written = write_file(tmp_path / "artifact", b"content")
    (tmp_path / "artifact").rename(tmp_path / "x_ESM.pt")
    manifest = Manifest(
        input_name="x.fasta",
        input_sha256="1" * 64,
        recipe=MANIFEST.recipe,
        execution={},
        counts=Counts(records=2, embeddings=2, failures={}, residues=9, tokens=13, truncated=0, unknown=0),
        files=(ResultFile.of(written, "x_ESM.pt"),),
        versions={},
    )
    if change:
        change(tmp_path / "x_ESM.pt")
    faults = find_faults(manifest, tmp_path)
    assert len(faults) == (1 if fault else 0)
    if fault:
        assert faults[0].startswith(f"x_ESM.pt {fault}")


def test_versions_are_of_what_is_installed() -> None:
    versions = installed_versions()
    assert versions["numpy"]
    assert versions["python"].startswith("3.")
