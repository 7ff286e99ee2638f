"""Pinning: a lock for each GPU, held by one node."""

from __future__ import annotations

import fcntl
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from virnucpro_core.errors import ExecutionError

LOCK_FOLDER = Path(tempfile.gettempdir()) / "virnucpro-locks"
"""One for the host, whoever runs the launcher: two users must not pin the same GPU."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A name that nobody else on this host has.

    It belongs to the open file: every process that inherits `descriptor` keeps it, and the kernel drops it
    when the last of them ends, however it ends. So a GPU stays locked while an orphan still uses it.
    """

    descriptor: int

    def release(self) -> None:
        """Give up this process's part of it."""
        os.close(self.descriptor)


def try_lock(name: str, folder: Path = LOCK_FOLDER) -> Lock | None:
    """Lock a name on this host, for whichever user; None if a living process has it.

    Raises:
        ExecutionError: the lock folder cannot be used.
    """
    try:
        descriptor = _open_lock(name, folder)
    except OSError as error:
        raise ExecutionError(
            f"locks cannot be kept: {error.strerror}",
            where=str(folder),
            todo="Make it a folder that this user may write to.",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return Lock(descriptor)


def _open_lock(name: str, folder: Path) -> int:
    """Open a lock's file, made if need be. Links are not followed: anyone may write where temporary files go."""
    folder.mkdir(parents=True, exist_ok=True)
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _open_to_all(inside, 0o1777)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            # Linux refuses O_CREAT for another user's file in such a folder (fs.protected_regular).
            descriptor = os.open(f"{name}.lock", flags, dir_fd=inside)
        except FileNotFoundError:
            descriptor = os.open(f"{name}.lock", flags | os.O_CREAT, dir_fd=inside)
        _open_to_all(descriptor, 0o666)
        return descriptor
    finally:
        os.close(inside)


def _open_to_all(descriptor: int, mode: int) -> None:
    """Set the mode of what is ours: the umask of who came first must not lock out other users."""
    if os.fstat(descriptor).st_uid == os.geteuid():
        os.fchmod(descriptor, mode)
