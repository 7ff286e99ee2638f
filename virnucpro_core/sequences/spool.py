"""The spool: uncompressed copies of inputs that cannot be read in the middle, named by the input's sha256."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from virnucpro_core.errors import ArtifactError


class SpooledCopy:
    """A copy being written below the spool's root; removed again unless it is kept.

    Raises:
        ArtifactError: from any method, when the folder cannot be written (permissions, a full disk).
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / f"{os.getpid()}-{secrets.token_hex(8)}.tmp"

    def __enter__(self) -> Self:
        with self._writing():
            self._root.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("xb")
        return self

    def write(self, block: bytes) -> None:
        with self._writing():
            self._file.write(block)

    def keep(self, sha256: str) -> Path:
        """Makes the copy durable under its final name, replacing an equal one, and returns that name."""
        final = self._root / f"{sha256}.fasta"
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._temporary.replace(final)
            folder = os.open(self._root, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return final

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After a full disk, closing tries to write the rest again; the first error is the one to report.
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"the spool cannot be written: {error.strerror}",
                where=str(self._root),
                todo="Free space there, or set another spool folder.",
            ) from error
