"""Inspection: what will become of an input's records as far as the input alone can tell, in one pass."""

from __future__ import annotations

from collections import Counter

import numpy as np

from virnucpro_core.failures import FailureReason
from virnucpro_core.recipe import ResiduePolicy
from virnucpro_core.sequences.fasta import parse_records

_SPECIAL_TOKENS = 2  # BOS and EOS


class RecordInspector:
    """Parses an input that comes block by block, and keeps counts alone: memory is a block's and one record's.

    Args:
        residues: the policy for letters outside the vocabulary.
        truncation: residues kept of each record.

    Attributes:
        records: in all.
        embeddings: records that can be embedded.
        rejects: records that cannot, by reason.
        truncated: embeddable records that lose residues.
        unknown: residues that become `<unk>`.
        tokens: to be computed, BOS and EOS included.
        id_bytes: length of the embeddable records' ids together, in UTF-8.
        bytes: uncompressed.
    """

    def __init__(self, *, residues: ResiduePolicy, truncation: int) -> None:
        self._residues: ResiduePolicy = residues
        self._truncation = truncation
        self._held = bytearray()
        self.records = self.embeddings = self.truncated = self.unknown = 0
        self.tokens = self.id_bytes = self.bytes = 0
        self.rejects: Counter[FailureReason] = Counter()

    def feed(self, block: bytes) -> None:
        """Take the next bytes of the input."""
        self.bytes += len(block)
        searched = max(0, len(self._held) - 1)  # a line feed may end the last block
        self._held += block
        end = self._held.rfind(b"\n>", searched) + 1
        if end:
            self._count(bytes(memoryview(self._held)[:end]))
            del self._held[:end]

    def finish(self) -> None:
        """The input has ended."""
        self._count(bytes(self._held))
        self._held.clear()

    def _count(self, whole_records: bytes) -> None:
        if not whole_records.strip():
            return
        batch = parse_records(
            whole_records, first_record=1, residues=self._residues, truncation=self._truncation
        )
        self.records += len(batch.ids)
        self.embeddings += len(batch.rows)
        self.rejects.update(failure.reason for failure in batch.failures)
        self.truncated += batch.truncated
        self.unknown += batch.unknown
        self.tokens += int(np.diff(batch.offsets).sum()) + _SPECIAL_TOKENS * len(batch.rows)
        self.id_bytes += sum(len(batch.ids[row].encode()) for row in batch.rows.tolist())
