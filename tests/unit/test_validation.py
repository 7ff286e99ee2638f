"""Validation finds what is wrong with a result, and nothing in a sound one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rows import make_rows
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.exports import write_export, write_pt
from virnucpro_core.features.files import Written, hash_file
from virnucpro_core.features.matrices import Matrix, open_matrix, write_matrix
from virnucpro_core.features.merging import merge_features, read_nucleotides
from virnucpro_core.features.validation import (
    Findings,
    validate_embeddings,
    validate_export,
    validate_merged,
    validate_result,
)

pytestmark = pytest.mark.unit

NAN, INF = float("nan"), float("inf")


def row_with(value: float, width: int = 1280) -> torch.Tensor:
    row = torch.ones(width)
    row[width // 2] = value
    return row


def test_sound_embeddings_have_no_errors() -> None:
    assert validate_embeddings(["a", "a"], [torch.ones(1280), torch.zeros(1280)]) == []
    assert validate_embeddings(["a"], [torch.ones(768)], expected_dim=768) == []
    assert validate_embeddings([], []) == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (torch.ones(2560), "shape (2560,), not (1280,)"),
        (torch.ones(1, 1280), "shape (1, 1280), not (1280,)"),
        (row_with(NAN), "NaN"),
        (row_with(INF), "Inf"),
        (row_with(-INF), "Inf"),
        ([1.0] * 1280, "a list, not a tensor"),
    ],
)
def test_each_fault_of_an_embedding_is_told_with_its_id(row: object, error: str) -> None:
    assert validate_embeddings(["good", "bad"], [torch.ones(1280), row]) == [f"bad: {error}"]


def test_ids_without_embeddings_are_told() -> None:
    assert validate_embeddings(["a", "b"], [torch.ones(1280)]) == ["2 ids for 1 embeddings"]


def write_result(path: Path, records: list[int], embeddings: np.ndarray | None = None) -> Written:
    rows = make_rows(len(records)) if embeddings is None else embeddings
    return write_matrix(path, [f"p{record}" for record in records], np.array(records, np.int64), rows, {})


def validate(written: Written, records: int, failed: list[int]) -> Findings:
    ids = (f"p{record}" for record in range(1, records + 1))
    return validate_result(written.path, sha256=written.sha256, ids=ids, failed=failed)


@given(embedded=st.lists(st.booleans(), max_size=30))
def test_every_record_an_embedding_or_a_failure_passes(
    tmp_path_factory: pytest.TempPathFactory, embedded: list[bool]
) -> None:
    records = [record for record, has_row in enumerate(embedded, 1) if has_row]
    failed = [record for record, has_row in enumerate(embedded, 1) if not has_row]
    findings = validate(write_result(tmp_path_factory.mktemp("v") / "m", records), len(embedded), failed)
    assert findings == Findings(records=len(embedded), failures=len(failed), rows=len(records), errors=[])
    assert findings.passed


def test_more_rows_than_one_block_are_compared(tmp_path: Path) -> None:
    written = write_result(tmp_path / "m", [record for record in range(1, 3001) if record % 1000])
    assert validate(written, 3000, [1000, 2000, 3000]).passed
    assert validate(written, 3000, [1000, 2000]).errors == ["neither embedding nor failure for records: 3000"]


@pytest.mark.parametrize(
    ("records", "failed", "error"),
    [
        (4, [], "neither embedding nor failure for records: 3"),
        (5, [3], "neither embedding nor failure for records: 5"),
        (4, [2, 3], "both embedding and failure for records: 2"),
        (3, [3], "embeddings of no record of the input: 4"),
        (4, [3, 7], "failures out of order, twice, or of no record of the input: 7"),
        (4, [3, 3], "failures out of order, twice, or of no record of the input: 3"),
    ],
)
def test_records_that_are_lost_or_counted_twice_are_told(
    tmp_path: Path, records: int, failed: list[int], error: str
) -> None:
    findings = validate(write_result(tmp_path / "m", [1, 2, 4]), records, failed)
    assert findings.errors == [error]
    assert not findings.passed
    assert findings.to_json()["passed"] is False


def test_another_id_is_told(tmp_path: Path) -> None:
    written = write_result(tmp_path / "m", [1, 2])
    findings = validate_result(written.path, sha256=written.sha256, ids=["p1", "q2"], failed=[])
    assert findings.errors == ["another id than in the input at records: 2 ('p2' for 'q2')"]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_number_that_is_not_finite_is_told(tmp_path: Path, value: float) -> None:
    rows = make_rows(1500)
    rows[1200, 1279] = value
    findings = validate(write_result(tmp_path / "m", list(range(1, 1501)), rows), 1500, [])
    assert findings.errors == ["NaN or Inf in the embeddings of records: 1201"]


def test_many_faults_of_a_kind_are_one_line(tmp_path: Path) -> None:
    written = write_result(tmp_path / "m", list(range(1, 16)), np.zeros((15, 1280), np.float32))
    named = ", ".join(map(str, range(1, 11)))
    assert validate(written, 15, []).errors == [f"nothing but zeros for records: {named} and 5 more"]


@given(place=st.integers(0, 20_000))
def test_no_flipped_byte_passes(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    written = write_result(tmp_path_factory.mktemp("v") / "m", [1, 2, 3])
    content = bytearray(written.path.read_bytes())
    content[place % len(content)] ^= 16
    written.path.write_bytes(content)
    assert not validate(written, 3, []).passed


@pytest.mark.parametrize("damage", ["missing", "cut short", "another width"])
def test_a_file_that_cannot_be_read_does_not_pass(tmp_path: Path, damage: str) -> None:
    written = write_result(tmp_path / "m", [1, 2])
    if damage == "missing":
        written.path.unlink()
    elif damage == "cut short":
        os.truncate(written.path, 1000)
    else:
        written = write_result(tmp_path / "m", [1, 2], make_rows(2, 2560))
    (error,) = validate(written, 2, []).errors
    assert str(written.path) in error


def hide(path: Path) -> None:
    """Have a file that cannot be read in its place; as with EIO, nobody knows what is behind it."""
    path.rename(path.with_name("aside"))
    path.symlink_to(path)


def test_what_cannot_be_read_is_not_judged(tmp_path: Path, matrix: Matrix, merged: Written) -> None:
    exports = write_export(tmp_path / "x.pt", matrix)
    hide(exports[0].path)
    with pytest.raises(ArtifactError, match=r"cannot be read.*x\.pt"):
        validate_export(exports, matrix)
    hide(merged.path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        validate_merged(merged, matrix)
    hide(matrix.path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        validate_result(matrix.path, sha256="", ids=[], failed=[])


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    write_result(tmp_path / "m", [1, 2, 4, 5, 6])
    return open_matrix(tmp_path / "m")


def test_sound_exports_have_no_errors(tmp_path: Path, matrix: Matrix) -> None:
    assert validate_export(write_export(tmp_path / "x.pt", matrix), matrix) == []
    assert validate_export(write_export(tmp_path / "x.pt", matrix, rows_per_file=2), matrix) == []


def test_faults_of_exports_are_told_with_their_file(tmp_path: Path, matrix: Matrix) -> None:
    shards = write_export(tmp_path / "x.pt", matrix, rows_per_file=2)
    rows = np.array(matrix.embeddings[2:4])
    swapped = write_pt(shards[1].path, matrix.ids(2, 4), rows[::-1])
    assert validate_export([shards[0], swapped, shards[2]], matrix) == [
        f"{swapped.path}: its embeddings are not those of the matrix"
    ]
    renamed = write_pt(shards[1].path, ["p4", "x"], rows)
    assert validate_export([shards[0], renamed, shards[2]], matrix) == [
        f"{renamed.path}: its ids are not rows 3 to 4 of the matrix"
    ]
    (error,) = validate_export(shards, matrix)
    assert error.startswith(f"{renamed.path}: sha256 ")
    renamed.path.unlink()
    (error,) = validate_export(shards, matrix)
    assert "missing" in error
    assert validate_export(shards[:1], matrix) == ["2 rows were exported, of 5"]


def test_a_flipped_bit_of_an_export_is_told(tmp_path: Path, matrix: Matrix) -> None:
    (written,) = write_export(tmp_path / "x.pt", matrix)
    content = bytearray(written.path.read_bytes())
    content[content.index(matrix.embeddings[3].tobytes())] ^= 1
    written.path.write_bytes(content)
    assert len(validate_export([written], matrix)) == 1
    forged = replace(written, sha256=hash_file(written.path))
    assert len(validate_export([forged], matrix)) == 1


@pytest.fixture
def merged(tmp_path: Path, matrix: Matrix) -> Written:
    entries = [{"label": "x", "mean_representation": row} for row in make_rows(5, 768).tolist()]
    torch.save({"nucleotide": matrix.ids(), "data": entries}, tmp_path / "n.pt")
    return merge_features(
        read_nucleotides(tmp_path / "n.pt"), matrix, tmp_path / "x_merged.pt", records=6, data_type="host"
    )


def test_a_sound_merged_file_has_no_errors(merged: Written, matrix: Matrix) -> None:
    assert validate_merged(merged, matrix) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda ids, data: (ids[::-1], data), "its ids are not those of the matrix"),
        (lambda ids, data: (ids, data[:4]), "not a float32 tensor of shape (5, 2048)"),
        (lambda ids, data: (ids, data.double()), "not a float32 tensor of shape (5, 2048)"),
        (lambda ids, data: (ids, data.index_fill(1, torch.tensor([5]), NAN)), "NaN or Inf"),
        (lambda ids, data: (ids, data.index_fill(1, torch.tensor([2000]), 1.0)), "its protein embeddings"),
    ],
)
def test_faults_of_a_merged_file_are_told(
    merged: Written, matrix: Matrix, change: object, error: str
) -> None:
    content = torch.load(merged.path, weights_only=True)
    ids, data = change(content["ids"], content["data"])  # type: ignore[operator]
    torch.save({"ids": ids, "data": data.clone()}, merged.path)
    (sha_error, other) = validate_merged(merged, matrix)
    assert "sha256" in sha_error
    assert error in other


def test_a_merged_file_that_is_no_file_is_told(merged: Written, matrix: Matrix) -> None:
    merged.path.write_bytes(b"nothing")
    (error,) = validate_merged(merged, matrix)
    assert str(merged.path) in error
