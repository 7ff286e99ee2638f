"""Failures: records that end without an embedding, and why. They are data, not errors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FailureReason(StrEnum):
    NO_ID = "no_id"
    BAD_HEADER = "bad_header"
    EMPTY = "empty"
    INVALID_RESIDUE = "invalid_residue"
    OOM = "oom"
    NON_FINITE = "non_finite"
    POISON = "poison"


@dataclass(frozen=True, slots=True)
class Failure:
    """One record without an embedding.

    Attributes:
        record: the record's number in its input, counted from 1.
        id: the record's id as far as it could be read; empty for `no_id`.
        reason: why there is no embedding.
        detail: one sentence a person can act on.
    """

    record: int
    id: str
    reason: FailureReason
    detail: str
