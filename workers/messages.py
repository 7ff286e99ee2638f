"""Messages: what may come out of a queue. Anything may lie in one; only what the relay sends reaches Celery."""

from __future__ import annotations

import base64
import json
from typing import Any

from virnucpro_core.ledger.rejections import RejectionReason
from virnucpro_core.ledger.transitions import EXTRACT, MERGE, VALIDATE

TASK_PREFIX = "virnucpro."
STAGES = (EXTRACT, MERGE, VALIDATE)

LARGEST_ID = 2**63 - 1
LONGEST_BODY = 1024
LONGEST_NAME = 255

Message = dict[str, Any]


class RejectedMessageError(Exception):
    """A message is none of ours. It stays inside this room: the ledger counts it, the log says why."""

    def __init__(self, reason: RejectionReason, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def task_name(stage: str) -> str:
    """The Celery name of a stage's task."""
    return TASK_PREFIX + stage


TASKS = frozenset(map(task_name, STAGES))


def purify(found: object, queue: str) -> Message:
    """The message that the relay would have sent, made anew of what lay in a queue.

    Celery's own messages can do much more than name a chunk: be compressed, run a task at a given time or for
    so many seconds, call other tasks behind it. None of that is passed on.

    Args:
        found: an item of a queue, decoded from JSON, as kombu's virtual transports write them.
        queue: the queue that it lay in.

    Raises:
        RejectedMessageError: it is not one that the relay sends.
    """
    message = _dict(found, "the message")
    headers = _dict(message.get("headers"), "its headers")
    properties = _dict(message.get("properties"), "its properties")
    kind = message.get("content-type"), message.get("content-encoding"), headers.get("compression")
    if kind != ("application/json", "utf-8", None):
        raise RejectedMessageError(RejectionReason.CONTENT, f"its content is {str(kind)[:LONGEST_NAME]}")
    task = headers.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise RejectedMessageError(RejectionReason.TASK, f"there is no task {str(task)[:LONGEST_NAME]!r}")
    message_id = _name(headers.get("id"), "its id")
    chunk_id = _chunk_id(message.get("body"), properties.get("body_encoding"))
    shown = headers.get("argsrepr")
    return {
        "body": base64.b64encode(json.dumps([[chunk_id], {}, {}]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {
            "lang": "py",
            "task": task,
            "id": message_id,
            "root_id": message_id,
            "argsrepr": shown[:LONGEST_NAME] if isinstance(shown, str) else str(chunk_id),
        },
        "properties": {
            "body_encoding": "base64",
            "correlation_id": message_id,
            "delivery_tag": _name(properties.get("delivery_tag"), "its delivery_tag"),
            "delivery_info": {"exchange": "", "routing_key": queue},  # where it goes if it is handed back
        },
    }


def _chunk_id(body: object, encoding: object) -> int:
    """The chunk that a message's body names: `[[id], {}, {…: null}]`, as Celery's protocol 2 has it."""
    if not isinstance(body, str) or encoding != "base64":
        raise RejectedMessageError(RejectionReason.FORMAT, "its body is not in base64")
    if len(body) > LONGEST_BODY:
        raise RejectedMessageError(RejectionReason.CONTENT, f"its body has {len(body)} characters")
    try:
        content = json.loads(base64.b64decode(body, validate=True))
    except (ValueError, RecursionError) as error:
        raise RejectedMessageError(RejectionReason.CONTENT, f"its body is not JSON: {error}") from error
    match content:
        case [[int() as chunk_id], {} as options, dict() as embed] if not options and not any(embed.values()):
            if type(chunk_id) is int and 0 < chunk_id <= LARGEST_ID:
                return chunk_id
    raise RejectedMessageError(RejectionReason.CHUNK, "it names no chunk, or more than a chunk")


def _dict(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RejectedMessageError(RejectionReason.FORMAT, f"{what} is no object")
    return value


def _name(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= LONGEST_NAME:
        raise RejectedMessageError(RejectionReason.FORMAT, f"{what} is no name")
    return value
