"""Forward passes: sequences in packs that fit the memory, one computed while the last one's rows are copied out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from virnucpro_core.embedding.loading import build_model
from virnucpro_core.embedding.memory import FREE_MEMORY, is_full
from virnucpro_core.embedding.model import FastEsm
from virnucpro_core.embedding.packing import EXTRA_TOKENS, LEAST_PACK_TOKENS, build_pack, plan_batches
from virnucpro_core.errors import ExecutionError
from virnucpro_core.failures import FailureReason
from virnucpro_core.recipe import EMBEDDING_WIDTH

log = structlog.get_logger()

NOT_FINITE = "the embedding holds NaN or Inf, in float32 too"
NO_ROOM_FOR_FLOAT32 = "the embedding holds NaN or Inf, and there is no memory to compute it in float32"

OnProgress = Callable[[int], None]
"""Called with the number of records that are done since the last call, embedded or failed."""


@dataclass(slots=True)
class _Transfer:
    """Rows on their way from the device: valid once `done` has happened."""

    members: NDArray[np.int64]
    rows: Tensor
    done: torch.cuda.Event | None


@dataclass(slots=True)
class Passes:
    """The forward passes over the sequences of one `embed` call.

    Attributes:
        model: what computes.
        tokens: residue tokens of all sequences, as in `RecordBatch`.
        offsets: int64[(n+1,)], where each sequence begins in `tokens`.
        pack_tokens: rows of a full pack.
        on_progress: told as sequences get done.
        embeddings: float32 (n, 1280); fills up.
        faults: which rows stay without, and why.
        non_finite: rows that were not finite at first.
        positions: rows that the model took in, padding and repairs included.
    """

    model: FastEsm
    tokens: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    pack_tokens: int
    on_progress: OnProgress
    embeddings: NDArray[np.float32] = field(init=False)
    faults: dict[int, tuple[FailureReason, str]] = field(default_factory=dict)
    non_finite: list[int] = field(default_factory=list)
    positions: int = 0

    def __post_init__(self) -> None:
        self.embeddings = np.empty((len(self.offsets) - 1, EMBEDDING_WIDTH), dtype=np.float32)

    def embed_all(self) -> None:
        """Embeds every sequence; one pack is computed while the rows of the one before are copied out."""
        batches = deque(self._plan(np.arange(len(self.embeddings))))
        ahead: _Transfer | None = None
        while batches:
            members = batches.popleft()
            transfer = self._start(members)
            if ahead is not None:
                self._finish(ahead)
            ahead = transfer
            if transfer is None and self._shrink(members):
                batches = deque(self._plan(np.concatenate((members, *batches))))
        if ahead is not None:
            self._finish(ahead)

    def repair(self) -> None:
        """Computes the rows that are not finite again, each alone and in float32."""
        if not self.non_finite:
            return
        log.warning("rows_not_finite", rows=len(self.non_finite), dtype=self.model.dtype)
        if self.model.dtype == "float32":
            self.faults |= dict.fromkeys(self.non_finite, (FailureReason.NON_FINITE, NOT_FINITE))
            return
        try:
            wide = build_model(self.model.weights, self.model.device, "float32")
            for index in self.non_finite:
                self._recompute(index, wide)
        except RuntimeError as error:
            if not is_full(error):
                raise
            rest = [index for index in self.non_finite if not np.isfinite(self.embeddings[index]).all()]
            for index in rest:
                self.faults.setdefault(index, (FailureReason.NON_FINITE, NO_ROOM_FOR_FLOAT32))

    def _recompute(self, index: int, wide: FastEsm) -> None:
        pack = build_pack(self.tokens, self.offsets, np.array([index]))
        self.positions += len(pack.tokens)
        self.embeddings[index] = wide.embed_pack(pack)[0].cpu().numpy()
        if not np.isfinite(self.embeddings[index]).all():
            self.faults[index] = (FailureReason.NON_FINITE, NOT_FINITE)

    def _size(self) -> int:
        """Rows of a full pack, as far as memory allows."""
        return min(self.pack_tokens, self.model.fitting_tokens or self.pack_tokens)

    def _plan(self, members: NDArray[np.int64]) -> Sequence[NDArray[np.int64]]:
        if not self.model.plan.packed:
            return [members[place : place + 1] for place in range(len(members))]
        lengths = np.diff(self.offsets)[members]
        return [members[batch] for batch in plan_batches(lengths, self._size())]

    def _start(self, members: NDArray[np.int64]) -> _Transfer | None:
        """Starts one pack, or returns None where memory does not suffice."""
        rows = self._size() if self.model.plan.packed else None
        pack = build_pack(self.tokens, self.offsets, members, rows)
        self.positions += len(pack.tokens)
        try:
            pooled = self.model.embed_pack(pack)
            if self.model.device.type != "cuda":
                return _Transfer(members, pooled, None)
            host = torch.empty(pooled.shape, dtype=pooled.dtype, device="cpu", pin_memory=True)
            host.copy_(pooled, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.model.device))
            return _Transfer(members, host, done)
        except RuntimeError as error:
            if not is_full(error):
                raise
            return None

    def _finish(self, transfer: _Transfer) -> None:
        if transfer.done is not None:
            transfer.done.synchronize()
        rows = transfer.rows.numpy()
        self.embeddings[transfer.members] = rows
        self.non_finite += transfer.members[~np.isfinite(rows).all(axis=1)].tolist()
        self.on_progress(len(transfer.members))

    def _shrink(self, members: NDArray[np.int64]) -> bool:
        """Makes room after `members` did not fit: smaller packs (True), or without them (False).

        Raises:
            ExecutionError: there is no room for what had room when the model was loaded.
        """
        torch.cuda.empty_cache()
        tokens = np.diff(self.offsets)[members] + EXTRA_TOKENS
        size = self._size()
        if self.model.plan.packed and size > max(LEAST_PACK_TOKENS, tokens.max()):
            self.model.fitting_tokens = max(size // 2, LEAST_PACK_TOKENS)
            log.warning("gpu_memory_full", pack_tokens=size, now=self.model.fitting_tokens)
            return True
        if tokens.max() <= LEAST_PACK_TOKENS:
            raise ExecutionError(
                "another program has taken the memory that the model had",
                where=str(self.model.device),
                todo=FREE_MEMORY,
            )
        for index, count in zip(members.tolist(), tokens.tolist(), strict=True):
            self.faults[index] = (FailureReason.OOM, f"the GPU has no memory for its {count} tokens")
        self.on_progress(len(members))
        return False
