"""Checksums on a thread of their own: hashlib works without the interpreter's lock."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

_LARGEST_BACKLOG = 8


class HashThread:
    """Updates sha256 digests in the order asked, beside the caller's own work.

    A digest given to `update` belongs to the thread: read it through `hexdigest` only.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def update(self, digest: hashlib._Hash, data: bytes | memoryview) -> None:
        """Adds data to a digest; waits while several are still to be done, so that memory stays bounded."""
        self._pending.append(self._pool.submit(digest.update, data))
        while len(self._pending) > _LARGEST_BACKLOG:
            self._pending.popleft().result()

    def hexdigest(self, digest: hashlib._Hash) -> Future[str]:
        """Returns what will be the digest of all that `update` was given for it so far."""
        return self._pool.submit(digest.hexdigest)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
