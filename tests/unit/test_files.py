"""New files appear whole or not at all, and leave nothing behind."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virnucpro_core.errors import ArtifactError
from virnucpro_core.features import files
from virnucpro_core.features.files import (
    hash_file,
    is_unreadable,
    new_file,
    open_artifact,
    read_blocks,
    remove_abandoned,
)
from virnucpro_core.features.manifests import read_manifest
from virnucpro_core.features.matrices import open_matrix

pytestmark = pytest.mark.unit

WRITER = """
import sys
from pathlib import Path
from virnucpro_core.features.files import new_file
with new_file(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def size_limit() -> Iterator[int]:
    """Files of this process may grow to this many bytes: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_is_what_was_written_with_its_checksum_and_size(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on the way" / "file"
    with new_file(path) as file:
        file.write(b"one, ")
        file.write(memoryview(b"two"))
    assert path.read_bytes() == b"one, two"
    assert file.sha256 == hashlib.sha256(b"one, two").hexdigest() == hash_file(path)
    assert file.bytes == 8


def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_old_content_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with new_file(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with new_file(path) as file:
            file.write(b"new")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fail()
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_file_system_is_named_and_nothing_stays(tmp_path: Path, size_limit: int) -> None:

    def fill() -> None:
        with new_file(tmp_path / "f") as file:
            file.write(bytes(size_limit - 1))
            file.write(b"ab")

    with pytest.raises(ArtifactError, match="cannot be written") as caught:
        fill()
    assert caught.value.where == str(tmp_path / "f")
    assert "Free space" in caught.value.todo
    assert not list(tmp_path.iterdir())


def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    # In a process of its own, as nobody if need be: to root every folder is writable.
    script = """
import os, sys
from pathlib import Path
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.files import new_file
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
try:
    with new_file(Path("file")):
        pass
except ArtifactError as error:
    print(error)
"""
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
        )
    finally:
        tmp_path.chmod(0o755)
    assert "Permission denied [file]. Make the folder writable" in done.stdout


@pytest.mark.parametrize("place", ["file/below", "folder"])
def test_a_place_that_cannot_hold_a_file_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError) as caught, new_file(tmp_path / place) as file:
        file.write(b"x")
    assert caught.value.where == str(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "job" / "file"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        (foreign := tmp_path / ".other.tmp").touch()
        assert remove_abandoned(tmp_path) == []
        (left,) = (tmp_path / "job").iterdir()
        writer.kill()
    assert remove_abandoned(tmp_path) == [left]
    assert list((tmp_path / "job").iterdir()) == []
    assert foreign.exists()


def test_a_writer_whose_file_is_removed_before_it_holds_the_lock_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = files.lock_file
    removed: list[Path] = []

    def remove_then_lock(*arguments: object) -> None:
        if not removed:
            removed.extend(remove_abandoned(tmp_path))
        lock(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "lock_file", remove_then_lock)
    with new_file(tmp_path / "file") as file:
        file.write(b"kept")
    assert len(removed) == 1
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_blocks_are_the_bytes_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with open_artifact(path) as file:
        file.seek(10)
        assert [bytes(part) for part in read_blocks(file, 25, path, block=10)] == [
            bytes(range(10, 20)),
            bytes(range(20, 30)),
            bytes(range(30, 35)),
        ]


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with open_artifact(path) as file, pytest.raises(ArtifactError, match="cut short") as caught:
        list(read_blocks(file, 6, path))
    assert caught.value.where == str(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing") as caught:
        hash_file(tmp_path / "nothing")
    assert caught.value.where == str(tmp_path / "nothing")


def test_what_cannot_be_read_is_told_from_what_is_lost(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    told = {}
    for name in ("nothing", "loop"):
        with pytest.raises(ArtifactError) as caught:
            hash_file(tmp_path / name)
        told[name] = is_unreadable(caught.value)
    (tmp_path / "short").write_bytes(b"1234")
    with open_artifact(tmp_path / "short") as file, pytest.raises(ArtifactError) as caught:
        list(read_blocks(file, 5, tmp_path / "short"))
    told["short"] = is_unreadable(caught.value)
    assert told == {"nothing": False, "loop": True, "short": False}


@pytest.mark.parametrize("read", [open_matrix, read_manifest])
def test_an_error_of_reading_is_ours_wherever_it_comes(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "file").symlink_to("/proc/self/mem")  # it can be opened, and reading it gives EIO
    with pytest.raises(ArtifactError, match="cannot be read: Input/output error") as caught:
        read(tmp_path / "file")
    assert is_unreadable(caught.value)
