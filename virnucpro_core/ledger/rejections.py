"""Rejections: how many messages were refused, and why. A message is a hint, so nothing else is kept of one."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from sqlalchemy import Connection, text


class RejectionReason(StrEnum):
    """Why a message was refused.

    Attributes:
        FORMAT: it has not the form of a message.
        CONTENT: it is not JSON (pickle, for one), compressed or too large.
        TASK: it names no task of ours.
        CHUNK: it names no chunk, or wants more than that a chunk is run.
        STAGE: the chunk it names is of another stage.
    """

    FORMAT = "format"
    CONTENT = "content"
    TASK = "task"
    CHUNK = "chunk"
    STAGE = "stage"


def count_rejections(tx: Connection, rejected: Mapping[RejectionReason, int]) -> None:
    """Add to the number of messages that were refused for each reason."""
    for reason, messages in sorted(rejected.items()):
        tx.execute(
            text("""
                INSERT INTO rejections (reason, messages) VALUES (:reason, :messages)
                ON CONFLICT (reason) DO UPDATE
                   SET messages = rejections.messages + excluded.messages, last_at = now()
            """),
            {"reason": str(reason), "messages": messages},
        )
