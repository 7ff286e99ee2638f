"""Matrix files: what was written is what is read, by us and by the safetensors library."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.rows import make_rows
from virnucpro_core.errors import ArtifactError, MismatchError
from virnucpro_core.features.files import Written
from virnucpro_core.features.matrices import open_matrix, write_matrix

pytestmark = pytest.mark.unit

METADATA = {"recipe": "0" * 64, "execution": '{"torch":"2"}'}

id_lists = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=40)


def write_sample(path: Path, rows: int = 3) -> Written:
    records = np.arange(1, 2 * rows, 2)
    return write_matrix(path, [f"p{record}" for record in records], records, make_rows(rows), METADATA)


@given(
    ids=id_lists, gaps=st.lists(st.integers(1, 1 << 40), min_size=40, max_size=40), width=st.integers(1, 9)
)
def test_what_is_written_is_read(ids: list[str], gaps: list[int], width: int) -> None:
    records = np.cumsum(gaps[: len(ids)], dtype=np.int64)
    embeddings = make_rows(len(ids), width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chunk.safetensors")
        written = write_matrix(path, ids, records, embeddings, METADATA)
        content = path.read_bytes()
        assert written == Written(path, hashlib.sha256(content).hexdigest(), len(content), len(ids))

        matrix = open_matrix(path, width=width)
        assert len(matrix) == len(ids)
        assert matrix.ids() == ids
        assert matrix.ids(1, 3) == ids[1:3]
        assert matrix.metadata == METADATA
        np.testing.assert_array_equal(matrix.records, records)
        np.testing.assert_array_equal(matrix.embeddings, embeddings)
        assert matrix.embeddings.flags.aligned
        assert matrix.records.flags.aligned

        theirs = load_file(path)
        np.testing.assert_array_equal(theirs["embeddings"], embeddings)
        np.testing.assert_array_equal(theirs["records"], records)
        assert theirs["ids"].tobytes().decode() == "".join(ids)
        assert np.diff(theirs["id_offsets"]).tolist() == [len(text.encode()) for text in ids]
        with safe_open(path, "numpy") as file:
            assert file.metadata() == METADATA


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    assert write_sample(tmp_path / "a").sha256 == write_sample(tmp_path / "b").sha256
    assert write_sample(tmp_path / "a", 4).sha256 != write_sample(tmp_path / "b").sha256


def test_rows_are_taken_in_the_order_asked_for(tmp_path: Path) -> None:
    embeddings = np.arange(80, dtype=np.float32).reshape(20, 4)
    path = tmp_path / "x"
    write_matrix(path, ["é"] * 20, np.arange(1, 21), embeddings, {})
    matrix = open_matrix(path, width=4)
    rows = np.array([19, 0, 7, 7])
    assert matrix.take(rows).tolist() == embeddings[rows].tolist()
    assert matrix.take(rows[:0]).shape == (0, 4)
    path.unlink()
    with pytest.raises(ArtifactError):
        matrix.take(rows)


def test_a_matrix_cannot_be_changed_through_its_map(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    with pytest.raises(ValueError, match="read-only"):
        open_matrix(tmp_path / "m").embeddings[0] = 0


def test_columns_and_other_orders_are_written_as_rows(tmp_path: Path) -> None:
    embeddings = np.asfortranarray(make_rows(4))
    write_matrix(tmp_path / "m", list("abcd"), np.arange(1, 5), embeddings, {})
    np.testing.assert_array_equal(open_matrix(tmp_path / "m").embeddings, embeddings)


@pytest.mark.parametrize(
    ("ids", "records", "embeddings"),
    [
        pytest.param(["a"], np.array([1, 2]), make_rows(2), id="ids"),
        pytest.param(["a", "b"], np.array([1]), make_rows(2), id="records"),
        pytest.param(["a", "b"], np.array([1, 2]), make_rows(1), id="rows"),
        pytest.param(["a", "b"], np.array([2, 2]), make_rows(2), id="a record twice"),
        pytest.param(["a", "b"], np.array([2, 1]), make_rows(2), id="falling"),
        pytest.param(["a"], np.array([0]), make_rows(1), id="from 0"),
        pytest.param(["a"], np.array([1]), make_rows(1).astype(np.float64), id="float64"),
        pytest.param(["a"], np.array([1], np.int32), make_rows(1), id="int32"),
        pytest.param(["a"], np.array([1]), make_rows(1)[0], id="one dimension"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    tmp_path: Path, ids: list[str], records: np.ndarray, embeddings: np.ndarray
) -> None:
    with pytest.raises(MismatchError):
        write_matrix(tmp_path / "m", ids, records, embeddings, {})
    assert not list(tmp_path.iterdir())


@given(data=st.data())
def test_no_changed_byte_of_the_header_is_believed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m")
        written = write_sample(path)
        content = bytearray(path.read_bytes())
        header_bytes = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(st.integers(0, header_bytes - 1))
        value = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
        content[place] = value
        path.write_bytes(content)
        try:
            matrix = open_matrix(path)
        except ArtifactError:
            return
        # Another letter in a value of the metadata: the header is sound, only the checksum tells.
        assert len(matrix) == written.rows
        assert matrix.metadata != METADATA


@given(st.binary(max_size=400))
def test_no_other_file_is_taken_for_a_matrix(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m")
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            open_matrix(path)


@pytest.mark.parametrize("shape", [[True, 1280], [-1, 1280], [3.0, 1280], [1 << 62, 1280], ["3", 1280], [3]])
def test_sizes_that_are_no_counts_are_refused(tmp_path: Path, shape: list[object]) -> None:
    write_sample(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["embeddings"]["shape"] = shape
    text = json.dumps(header).encode()
    (tmp_path / "m").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ArtifactError):
        open_matrix(tmp_path / "m")


@pytest.mark.parametrize("change", [-1, +1])
def test_a_file_of_another_length_is_refused(tmp_path: Path, change: int) -> None:
    written = write_sample(tmp_path / "m")
    os.truncate(tmp_path / "m", written.bytes + change)
    with pytest.raises(ArtifactError, match="bytes where its header says"):
        open_matrix(tmp_path / "m")


def test_another_width_is_refused(tmp_path: Path) -> None:
    write_matrix(tmp_path / "m", ["a"], np.array([1]), make_rows(1, 768), {})
    with pytest.raises(ArtifactError, match="768 numbers, not 1280"):
        open_matrix(tmp_path / "m")


def test_ids_that_are_not_text_are_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(content.replace(b"p1p3p5", b"p1\xff3p5"))
    with pytest.raises(ArtifactError, match="not text"):
        open_matrix(tmp_path / "m").ids()
