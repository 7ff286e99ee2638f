"""Exports: the `.pt` files that people load, written from matrices and read with care.

The format asks for one tensor object per row: on two cores that took 60 µs and 7 KB of memory a row to write,
5 KB of it the numbers themselves, and as much to read. EXPORT_ROWS bounds it.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from io import RawIOBase
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from virnucpro_core.errors import ArtifactError, MismatchError
from virnucpro_core.features.files import BLOCK_BYTES, NewFile, Written, new_file, open_artifact, reading
from virnucpro_core.features.matrices import Matrix
from virnucpro_core.recipe import EMBEDDING_WIDTH
from virnucpro_core.sizes import EXPORT_ROWS

if TYPE_CHECKING:
    from io import BufferedReader

    import torch
    from typing_extensions import Buffer

_CALL = re.compile(rb"c((?:torch|collections|_codecs|builtins|__builtin__)[\w.]*)\n([\w.]+)\n")
"""The instruction of a pickle that names something to call, from a module that torch takes such things from."""

_LONGEST_CALL = 256

_LEAST_ROW_BYTES = 768
"""Bytes of a row at least: 768 small integers in a pickle take twice that, 1280 float32 take 5120."""

_CALLS = {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict"} | {
    f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int")
}
"""What `torch.save` writes for tensors. torch lets a pickle call more than this, `bytearray` for one, which makes
gigabytes of a number."""


def export_names(target: Path, shards: int) -> list[Path]:
    """The files of an export: `target` itself, or `<stem>.00001-of-00004.pt` and so on for several shards."""
    if shards == 1:
        return [target]
    names = (f"{target.stem}.{k:05d}-of-{shards:05d}{target.suffix}" for k in range(1, shards + 1))
    return [target.with_name(name) for name in names]


def write_export(target: Path, matrix: Matrix, *, rows_per_file: int = EXPORT_ROWS) -> list[Written]:
    """Exports a matrix, in as many files as its rows need, in memory that one file's rows bound.

    Returns:
        The files, in the order of the rows.

    Raises:
        ArtifactError: a file cannot be written.
    """
    starts = range(0, max(len(matrix), 1), rows_per_file)
    written = []
    for path, start in zip(export_names(target, len(starts)), starts, strict=True):
        stop = min(start + rows_per_file, len(matrix))
        written.append(write_pt(path, matrix.ids(start, stop), matrix.embeddings[start:stop]))
    return written


def write_pt(path: Path, ids: Sequence[str], embeddings: npt.NDArray[np.float32]) -> Written:
    """Writes `{'proteins': [id, …], 'data': [tensor (width,) float32, …]}` in one step.

    The rows are views of one storage. Equal arguments give equal bytes, whatever the file is called.

    Args:
        path: the file's final name; missing folders are made.
        ids: one per row.
        embeddings: float32 (rows, width); copied once.

    Raises:
        MismatchError: there is not one id per row.
        ArtifactError: the file cannot be written.
    """
    import torch

    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or len(embeddings) != len(ids):
        got = f"{len(ids)} ids for {embeddings.dtype} {embeddings.shape}"
        raise MismatchError(f"an export needs one id per float32 row, not {got}", where=str(path))
    # A copy, because torch takes no read-only memory, and saves all of a storage of which it is given a part.
    rows = torch.from_numpy(np.array(embeddings, order="C"))
    with new_file(path) as file:
        save_pt({"proteins": list(ids), "data": list(rows.unbind())}, file)
    return Written(path, file.sha256, file.bytes, len(ids))


def save_pt(content: dict[str, object], file: NewFile) -> None:
    """`torch.save` into a new file: a path would put its name into the bytes, and change their checksum."""
    import torch

    try:
        torch.save(content, cast("IO[bytes]", file))
    except RuntimeError as error:
        # After a failed write torch closes its archive and trips over it: the cause is what it was handling.
        if isinstance(error.__context__, ArtifactError):
            raise error.__context__ from None
        raise


def read_pt(path: Path, *, width: int = EMBEDDING_WIDTH) -> tuple[list[str], list[torch.Tensor]]:
    """Reads an export: its ids and its float32 rows of shape (width,).

    Raises:
        ArtifactError: the file is anything else than `{'proteins': [str, …], 'data': [Tensor(width,), …]}`.
    """
    import torch

    content = load_pt(path, {"proteins", "data"})
    ids, rows = read_strings(content["proteins"], path), content["data"]
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise odd_pt(path, "it does not hold one row per id")
    for name, row in zip(ids, rows, strict=True):
        if not isinstance(row, torch.Tensor) or row.shape != (width,) or row.dtype != torch.float32:
            raise odd_pt(path, f"the row of {name!r} is not a float32 tensor of shape ({width},)")
    # Those that were saved without `torch.no_grad()` still ask for gradients, and are no numbers to numpy.
    return ids, [row.detach() for row in rows]


def load_pt(
    path: Path, keys: set[str], *, optional: AbstractSet[str] = frozenset(), file: BinaryIO | None = None
) -> dict[str, object]:
    """Loads a `.pt` file that is a dict with these keys and no others, and runs nothing that is in it.

    Args:
        path: the file.
        file: the same, if it has been opened already.

    Raises:
        ArtifactError: it is missing, damaged, holds more than tensors and plain values, or has other keys.
    """
    import torch

    with open_artifact(path) if file is None else nullcontext(file) as opened:
        watched = WatchedFile(opened)
        stream = cast("BinaryIO", watched)
        try:
            fault = find_trap(stream)
            if not fault:
                stream.seek(0)
                content = torch.load(stream, map_location="cpu", weights_only=True)
            size = os.fstat(stream.fileno()).st_size
        # What the decoders raise on hostile bytes is not listed anywhere; all of it means the same here.
        except Exception as error:
            with reading(path):
                if watched.error is not None:
                    raise watched.error from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise odd_pt(path, reason.rstrip(".")) from error
    if fault:
        raise odd_pt(path, fault)
    if not isinstance(content, dict) or set(content) - optional != keys:
        raise odd_pt(path, f"its keys are not {', '.join(sorted(keys))}")
    # A pickle may name one row many times over; each would take its full memory here.
    if any(isinstance(value, list) and len(value) * _LEAST_ROW_BYTES > size for value in content.values()):
        raise odd_pt(path, "it names more rows than it has room for")
    return content


class WatchedFile(RawIOBase):
    """A file for decoders, which take a read that failed for the file's end, or for damage.

    Attributes:
        error: what the file system said against reading it, if it did.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = cast("BufferedReader", file)
        self.error: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: Buffer) -> int:
        with self._watching():
            return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._watching():
            return self._file.seek(offset, whence)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # A place before the file's start is looked for in short ones, and is no fault of the file system.
            if error.errno != errno.EINVAL:
                self.error = error
            raise


def find_trap(file: BinaryIO) -> str:
    """What makes a `.pt` file one that `torch.load` must not see, though it would run nothing; empty if nothing.

    What is checked here would take memory without end from a few bytes.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch stores without compression: a file that would unpack to more than itself is not torch's.
        if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
            return "it would unpack to more than its own size"
        for entry in entries:
            if not entry.filename.lower().endswith(".pkl"):  # torch looks for names in any case
                continue
            with archive.open(entry) as stream:
                for called in find_calls(stream):
                    if called not in _CALLS:
                        return f"it calls {called}"
    return ""


def find_calls(stream: IO[bytes]) -> Iterator[str]:
    """What a pickle calls among the things that `torch.load` would let it call, by their full names."""
    overlap = b""
    while block := stream.read(BLOCK_BYTES):
        for module, name in _CALL.findall(overlap + block):
            yield f"{module.decode()}.{name.decode()}"
        overlap = block[-_LONGEST_CALL:]


def read_strings(value: object, path: Path) -> list[str]:
    """`value` as a list of ids.

    Raises:
        ArtifactError: it is not one.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise odd_pt(path, "its ids are not a list of text")
    return value


def odd_pt(path: Path, why: str) -> ArtifactError:
    """The error for a `.pt` file that does not hold what it should."""
    todo = "Write it again with the tool that made it (torch.save, torch 1.6 or later)."
    return ArtifactError(f"not a usable .pt file: {why}", where=str(path), todo=todo)
