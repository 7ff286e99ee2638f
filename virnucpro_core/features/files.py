"""New files: written under a temporary name in the same folder, hashed, synced, then moved in one step."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from virnucpro_core.errors import ArtifactError, SettingsError

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = structlog.get_logger()

BLOCK_BYTES = 4 << 20
"""Bytes read at a time; a multiple of 8, so that no int64 is torn between two blocks."""

_TEMPORARY_PREFIX = ".virnucpro-"
_TEMPORARY_SUFFIX = ".tmp"

_NO_SPACE = "Free space there, or choose another folder, then run it again."
_NO_RIGHT = "Make the folder writable for this user, or choose another folder."
_NO_NAME = "Choose a shorter name."
_ADVICE = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: _NO_SPACE,
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
    errno.EROFS: _NO_RIGHT,
    errno.ENAMETOOLONG: _NO_NAME,
}


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is complete under its name.

    Attributes:
        path: where it lies.
        sha256: of its bytes, as 64 hex digits.
        bytes: its size.
        rows: embeddings it holds.
    """

    path: Path
    sha256: str
    bytes: int
    rows: int


class NewFile:
    """The file that `new_file` is writing. It can be appended to, nothing else."""

    def __init__(self, path: Path, raw: FileIO) -> None:
        self._path = path
        self._raw = raw
        self._digest = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """sha256 of all that was written so far."""
        return self._digest.hexdigest()

    def write(self, data: Buffer) -> int:
        """Appends `data`; all of it or an error.

        Raises:
            ArtifactError: the file system refuses it (full, quota, size limit).
        """
        view = memoryview(data)
        size = view.nbytes
        if not size:
            return 0  # a view of no bytes cannot be cast
        view = view.cast("B")
        self._digest.update(view)
        with _blaming(self._path):
            while view:
                view = view[self._raw.write(view) :]
        self.bytes += size
        return size

    def flush(self) -> None:
        """Does nothing, for `torch.save`: writes are not buffered."""


@contextmanager
def new_file(path: Path, mode: int = 0o666) -> Iterator[NewFile]:
    """Writes `path` in one step: no one sees the name before all its bytes are on disk.

    Missing folders are made. What was there before is replaced when the block ends, and kept if it raises.

    Args:
        mode: its permissions, of which the umask takes some away.

    Raises:
        ArtifactError: the file cannot be written; its temporary file is removed.
    """
    with _blaming(path):
        make_folder(path.parent)
        temporary, raw = _create_temporary(path.parent, mode)
    try:
        with raw:
            file = NewFile(path, raw)
            yield file
            with _blaming(path):
                os.fsync(raw.fileno())
                # Still locked: `remove_abandoned` must not find the temporary name unowned.
                temporary.replace(path)
    finally:
        with _blaming(path):
            temporary.unlink(missing_ok=True)
    with _blaming(path):
        sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Checks that a file can be written, for who would find out after hours of work; missing folders are made.

    Raises:
        ArtifactError: it is a folder or a device, or the file system takes no file there, or none of such a name.
    """
    with _blaming(path):
        if path.is_dir():
            raise ArtifactError("the output is a folder", where=str(path), todo="Name a file in it.")
        if path.exists() and not path.is_file():
            # The file would take the name of /dev/null from it.
            raise ArtifactError("the output is no regular file", where=str(path), todo="Name another one.")
        make_folder(path.parent)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def check_apart(target: Path, *sources: Path) -> None:
    """Checks that a file that will be written is none of those that it is made from.

    Raises:
        SettingsError: it is one of them, under whatever name.
    """
    for source in sources:
        try:
            same = target.samefile(source)
        except OSError:
            continue  # one is not there; or cannot be looked at, as reading or writing it will tell
        if same:
            what = "the result would replace its own input"
            raise SettingsError(what, where=str(target), todo="Name another file to write.")


def open_artifact(path: Path) -> BufferedReader:
    """Opens a file of ours for reading.

    Raises:
        ArtifactError: it is missing or unreadable; `where` is its path.
    """
    with reading(path):
        return path.open("rb")


def read_blocks(
    file: BufferedReader, size: int, path: Path, *, block: int = BLOCK_BYTES
) -> Iterator[memoryview]:
    """Yields the next `size` bytes of `file`, `block` at a time.

    Each view is of one buffer that is used again: it holds until the next is asked for.

    Raises:
        ArtifactError: the file ends early or cannot be read; `where` is `path`.
    """
    buffer = memoryview(bytearray(min(size, block)))
    while size:
        part = buffer[:size]
        with reading(path):
            count = file.readinto(part)
        if count != len(part):
            todo = "Remove it and run its stage again."
            raise ArtifactError("a file is cut short", where=str(path), todo=todo)
        yield part
        size -= count


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, as 64 hex digits.

    Raises:
        ArtifactError: it is missing or unreadable.
    """
    digest = hashlib.sha256()
    with open_artifact(path) as file:
        with reading(path):
            size = os.fstat(file.fileno()).st_size
        for block in read_blocks(file, size, path):
            digest.update(block)
    return digest.hexdigest()


def remove_abandoned(folder: Path) -> list[Path]:
    """Removes the temporary files below `folder` whose writers are dead, and returns their paths.

    A writer holds a lock on its temporary file; the kernel drops it when the process ends, however it ends.
    """
    removed = []
    for path in sorted(folder.rglob(f"{_TEMPORARY_PREFIX}*{_TEMPORARY_SUFFIX}")):
        try:
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except (FileNotFoundError, BlockingIOError):
            continue  # its writer has just ended, or is alive
        except OSError as error:
            log.warning("temporary_file_kept", path=str(path), reason=error.strerror)
            continue
        removed.append(path)
    return removed


def temporary_name(folder: Path) -> Path:
    """A name in `folder` that no other file has, and that `remove_abandoned` knows."""
    return folder / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"


def make_folder(folder: Path) -> None:
    """Makes `folder` and what is missing above it, and syncs each: a power cut must not take it back."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(file: FileIO | BufferedReader, operation: int) -> None:
    """Marks a file as in use by this process, if its file system has locks (some clusters' have none)."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        # Without locks `remove_abandoned` cannot lock either, so it keeps every file: safe, only less tidy.
        log.warning("file_system_without_locks", path=str(file.name), reason=error.strerror)


def write_error(error: OSError, path: Path) -> ArtifactError:
    """The error to raise when the file system refuses to write `path`."""
    advice = _ADVICE.get(error.errno or 0, "Look at the folder and its file system, then run it again.")
    return ArtifactError(f"a file cannot be written: {error.strerror}", where=str(path), todo=advice)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what the file system says against reading `path` into our error.

    Raises:
        ArtifactError: it is missing or unreadable; `where` is its path.
    """
    try:
        yield
    except OSError as error:
        raise _unreadable(error, path) from error


def is_unreadable(error: ArtifactError | OSError) -> bool:
    """Whether a file cannot be read (no right, an ailing file system): it may be intact, and nobody knows.

    One that is missing, cut short or altered has to be made again.
    """
    cause = error.__cause__ if isinstance(error, ArtifactError) else error
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)


def _unreadable(error: OSError, path: Path) -> ArtifactError:
    if isinstance(error, FileNotFoundError):
        todo = "Correct its name, or have it made again."
        return ArtifactError("a file is missing", where=str(path), todo=todo)
    advice = "Make it readable for this user, or have it made again."
    return ArtifactError(f"a file cannot be read: {error.strerror}", where=str(path), todo=advice)


def _create_temporary(folder: Path, mode: int) -> tuple[Path, FileIO]:
    while True:
        path = temporary_name(folder)
        raw = FileIO(path, "x", opener=partial(os.open, mode=mode))
        lock_file(raw, fcntl.LOCK_EX)
        # `remove_abandoned` may have come between creation and lock: then this file has no name any more.
        if os.fstat(raw.fileno()).st_nlink:
            return path, raw
        raw.close()


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error
