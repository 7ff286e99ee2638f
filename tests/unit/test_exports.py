"""`.pt` files: what VirNucPro loads, the same bytes each time, and nothing odd believed."""

from __future__ import annotations

import errno
import io
import itertools
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rows import make_rows
from virnucpro_core.errors import ArtifactError, MismatchError
from virnucpro_core.features.exports import export_names, load_pt, read_pt, write_export, write_pt
from virnucpro_core.features.files import hash_file, is_unreadable
from virnucpro_core.features.matrices import Matrix, open_matrix, write_matrix

pytestmark = pytest.mark.unit


def make_matrix(path: Path, rows: int) -> Matrix:
    write_matrix(path, [f"p{k}" for k in range(rows)], np.arange(1, rows + 1), make_rows(rows), {})
    return open_matrix(path)


def test_an_export_is_what_virnucpro_loads(tmp_path: Path) -> None:
    rows = make_rows(5)
    ids = ["a", "b", "a", "é", "a b"]
    written = write_pt(tmp_path / "x_ESM.pt", ids, rows)
    content = torch.load(tmp_path / "x_ESM.pt", weights_only=True)
    assert set(content) == {"proteins", "data"}
    assert content["proteins"] == ids
    assert [row.shape for row in content["data"]] == [(1280,)] * 5
    assert all(row.dtype == torch.float32 for row in content["data"])
    np.testing.assert_array_equal(torch.stack(content["data"]).numpy(), rows)
    assert written.rows == 5
    assert written.sha256 == hash_file(written.path)
    assert written.bytes == written.path.stat().st_size


def test_the_same_rows_give_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    one = write_pt(tmp_path / "one.pt", ["a", "b"], make_rows(2))
    other = write_pt(tmp_path / "another name.pt", ["a", "b"], make_rows(2))
    assert one.sha256 == other.sha256


def test_part_of_a_matrix_takes_no_more_room_than_its_rows(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path / "m", 1000)
    part = write_pt(tmp_path / "part.pt", matrix.ids(0, 10), matrix.embeddings[:10])
    assert part.bytes < 2 * 10 * 5120


def test_what_is_exported_is_read(tmp_path: Path) -> None:
    rows = make_rows(3)
    write_pt(tmp_path / "x.pt", ["a", "b", "c"], rows)
    ids, data = read_pt(tmp_path / "x.pt")
    assert ids == ["a", "b", "c"]
    np.testing.assert_array_equal(torch.stack(data).numpy(), rows)


def test_no_rows_are_an_export_too(tmp_path: Path) -> None:
    (written,) = write_export(tmp_path / "x.pt", make_matrix(tmp_path / "m", 0))
    assert read_pt(written.path) == ([], [])


@given(rows=st.integers(0, 12), rows_per_file=st.integers(1, 13))
def test_shards_hold_every_row_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, rows_per_file: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    matrix = make_matrix(folder / "m", rows)
    written = write_export(folder / "x_ESM.pt", matrix, rows_per_file=rows_per_file)
    parts = [read_pt(file.path) for file in written]
    assert [name for ids, _ in parts for name in ids] == matrix.ids()
    assert [len(ids) for ids, _ in parts] == [file.rows for file in written]
    assert all(file.rows <= rows_per_file for file in written)
    stacked = [row.numpy() for _, data in parts for row in data]
    np.testing.assert_array_equal(np.array(stacked).reshape(-1, 1280), matrix.embeddings)


def test_shards_are_numbered_from_one() -> None:
    assert export_names(Path("out/x_ESM.pt"), 1) == [Path("out/x_ESM.pt")]
    assert export_names(Path("out/x_ESM.pt"), 3) == [
        Path("out/x_ESM.00001-of-00003.pt"),
        Path("out/x_ESM.00002-of-00003.pt"),
        Path("out/x_ESM.00003-of-00003.pt"),
    ]


def test_ids_and_rows_that_do_not_line_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError):
        write_pt(tmp_path / "x.pt", ["a"], make_rows(2))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_export(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_pt(path, ["a"], make_rows(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ArtifactError, match="cannot be written"):
            write_pt(path, [f"p{k}" for k in range(100)], make_rows(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_pt(path)[0] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


class Trap:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_hostile_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"proteins": ["a"], "data": [Trap(tmp_path / "sprung")]}, tmp_path / "x.pt")
    with pytest.raises(ArtifactError):
        read_pt(tmp_path / "x.pt")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(AttributeError):  # the trap works: without care it is sprung
        torch.load(tmp_path / "x.pt", weights_only=False)["data"][0].shape  # noqa: B018
    assert (tmp_path / "sprung").exists()


ROW = torch.ones(1280)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"proteins": ["a"]}, id="no data"),
        pytest.param({"proteins": ["a"], "data": [ROW], "labels": [0]}, id="another key"),
        pytest.param({"proteins": ["a", "b"], "data": [ROW]}, id="too few rows"),
        pytest.param({"proteins": [1], "data": [ROW]}, id="a number as an id"),
        pytest.param({"proteins": "a", "data": [ROW]}, id="text as ids"),
        pytest.param({"proteins": ["a"], "data": ROW[None]}, id="a tensor as rows"),
        pytest.param({"proteins": ["a"], "data": [[1.0] * 1280]}, id="a list as a row"),
        pytest.param({"proteins": ["a"], "data": [torch.ones(2560)]}, id="of ESM2 3B"),
        pytest.param({"proteins": ["a"], "data": [ROW.double()]}, id="float64"),
        pytest.param({"proteins": ["a"], "data": [ROW.half()]}, id="float16"),
        pytest.param([ROW], id="a list"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ArtifactError) as caught:
        read_pt(tmp_path / "x.pt")
    assert caught.value.where == str(tmp_path / "x.pt")


@given(data=st.data())
def test_a_damaged_file_is_an_error_of_ours_or_other_rows(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    write_pt(path, ["a", "b"], make_rows(2))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        ids, rows = read_pt(path)
    except ArtifactError:
        return
    assert len(ids) == len(rows)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x05\x06" + bytes(18), pickle.dumps({"proteins": [], "data": []})]
)
def test_what_is_no_archive_of_torch_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ArtifactError):
        read_pt(tmp_path / "x.pt")


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    write_pt(tmp_path / "x.pt", ["a"], np.zeros((1, 1280), np.float32))
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in stored.namelist():
            bomb.writestr(entry, stored.read(entry))
    with pytest.raises(ArtifactError, match="unpack to more"):
        read_pt(tmp_path / "bomb.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        read_pt(tmp_path / "x.pt")


class AilingFile(io.FileIO):
    """A file of which one read fails, the `failing`-th."""

    failing = reads = 0

    def readinto(self, buffer: Any) -> int | None:
        self._count()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._count()
        return super().readall()

    def _count(self) -> None:
        self.reads += 1
        if self.reads == self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def load_with_a_failing_read(path: Path, failing: int) -> ArtifactError | None:
    raw = AilingFile(path)
    raw.failing = failing
    with io.BufferedReader(raw) as file:
        try:
            load_pt(path, {"proteins", "data"}, file=file)
        except ArtifactError as error:
            return error
    return None


def test_one_read_that_fails_is_no_damage(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "x_ESM.pt", ["a", "b"], make_rows(2)).path
    tries = (load_with_a_failing_read(path, failing) for failing in itertools.count(1))
    errors = list(itertools.takewhile(lambda error: error is not None, tries))
    assert len(errors) > 10
    assert {str(error) for error in errors if error and not is_unreadable(error)} == set()


def test_a_file_too_short_for_an_archive_is_damaged(tmp_path: Path) -> None:
    (path := tmp_path / "x_ESM.pt").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match=r"not a usable \.pt file") as caught:
        read_pt(path)
    assert not is_unreadable(caught.value)
