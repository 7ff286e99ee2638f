"""Messages: what the relay sends comes through, made anew; nothing else does."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from virnucpro_core.ledger.rejections import RejectionReason
from virnucpro_core.settings import Settings
from workers.app import make_app
from workers.messages import LARGEST_ID, Message, RejectedMessageError, purify

pytestmark = pytest.mark.unit


def sent(*arguments: object, task: str = "virnucpro.extract", **options: Any) -> Message:
    """What kombu writes into a queue when Celery sends a task."""
    with make_app(lambda: Settings(broker_url=SecretStr("memory://localhost"))) as celery:
        celery.send_task(task, args=list(arguments), queue="extract", ignore_result=True, **options)
        with celery.connection_for_read() as connection:
            message: Message = connection.default_channel._get("extract")  # as it lies in the queue
            return message


def read_back(message: Message) -> tuple[Any, ...]:
    body = json.loads(base64.b64decode(message["body"]))
    return message["headers"]["task"], body, message["headers"]["argsrepr"]


@pytest.mark.parametrize("task", ["virnucpro.extract", "virnucpro.merge", "virnucpro.validate"])
@pytest.mark.parametrize("chunk", [1, 70_000, LARGEST_ID])
def test_what_the_relay_sends_comes_through(task: str, chunk: int) -> None:
    found = sent(chunk, task=task, argsrepr="job 1 a: extract chunk 1 of 2")
    pure = purify(found, "extract")
    assert read_back(pure) == (task, [[chunk], {}, {}], "job 1 a: extract chunk 1 of 2")
    assert pure["headers"]["id"] == found["headers"]["id"]
    for name in ("delivery_tag", "delivery_info"):
        assert pure["properties"][name] == found["properties"][name]
    assert purify(pure, "extract") == pure


def test_what_else_a_message_may_want_is_not_passed_on() -> None:
    found = sent(1, countdown=3600, expires=7200, time_limit=1, priority=9, shadow="another", reply_to="me")
    pure = purify(found, "extract")
    assert set(pure["headers"]) == {"lang", "task", "id", "root_id", "argsrepr"}
    assert set(pure["properties"]) == {"body_encoding", "correlation_id", "delivery_tag", "delivery_info"}


def change(*path: str, to: object) -> Callable[[Message], None]:
    def apply(message: Message) -> None:
        for step in path[:-1]:
            message = message[step]
        message[path[-1]] = to

    return apply


def body(content: object) -> Callable[[Message], None]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return change("body", to=base64.b64encode(text).decode())


FORMAT, CONTENT, TASK, CHUNK = list(RejectionReason)[:4]


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        pytest.param(change("headers", to=None), FORMAT, id="no headers"),
        pytest.param(change("headers", to=[]), FORMAT, id="headers of another type"),
        pytest.param(change("properties", to="x"), FORMAT, id="properties of another type"),
        pytest.param(change("properties", "delivery_tag", to=5), FORMAT, id="delivery tag"),
        pytest.param(change("properties", "delivery_tag", to="x" * 1000), FORMAT, id="long delivery tag"),
        pytest.param(change("headers", "id", to={"a": 1}), FORMAT, id="id of another type"),
        pytest.param(change("headers", "id", to="a\nb"), FORMAT, id="id with a line feed"),
        pytest.param(change("headers", "id", to=""), FORMAT, id="empty id"),
        pytest.param(change("content-type", to="application/x-python-serialize"), CONTENT, id="pickle"),
        pytest.param(change("content-type", to="application/x-yaml"), CONTENT, id="yaml"),
        pytest.param(change("content-type", to=["application/json"]), CONTENT, id="content type in a list"),
        pytest.param(change("content-encoding", to="binary"), CONTENT, id="binary"),
        pytest.param(change("headers", "compression", to="application/x-gzip"), CONTENT, id="compressed"),
        pytest.param(change("headers", "task", to="celery.backend_cleanup"), TASK, id="a task of Celery's"),
        pytest.param(change("headers", "task", to="virnucpro."), TASK, id="no stage"),
        pytest.param(change("headers", "task", to=["virnucpro.extract"]), TASK, id="task of another type"),
        pytest.param(change("headers", "task", to=None), TASK, id="no task"),
        pytest.param(change("body", to=None), FORMAT, id="no body"),
        pytest.param(change("body", to={"a": 1}), FORMAT, id="body of another type"),
        pytest.param(change("properties", "body_encoding", to=None), FORMAT, id="no encoding"),
        pytest.param(change("body", to="W1sxXSx7fSx7fV0=" * 200), CONTENT, id="large"),
        pytest.param(change("body", to="no base64!"), CONTENT, id="no base64"),
        pytest.param(body(b"\x80\x04\x95"), CONTENT, id="a pickle under the name of JSON"),
        pytest.param(body(b"[" * 700), CONTENT, id="nested"),
        pytest.param(body([[], {}, {}]), CHUNK, id="no argument"),
        pytest.param(body([[1, 2], {}, {}]), CHUNK, id="two arguments"),
        pytest.param(body([["1"], {}, {}]), CHUNK, id="text"),
        pytest.param(body([[1.0], {}, {}]), CHUNK, id="float"),
        pytest.param(body([[True], {}, {}]), CHUNK, id="truth"),
        pytest.param(body([[None], {}, {}]), CHUNK, id="null"),
        pytest.param(body([[0], {}, {}]), CHUNK, id="zero"),
        pytest.param(body([[-1], {}, {}]), CHUNK, id="negative"),
        pytest.param(body([[LARGEST_ID + 1], {}, {}]), CHUNK, id="larger than the ledger's"),
        pytest.param(body([[1], {"chunk_id": 2}, {}]), CHUNK, id="by name"),
        pytest.param(body([[1], {}, {"callbacks": [{"task": "virnucpro.merge"}]}]), CHUNK, id="a callback"),
        pytest.param(body([[1], {}, {"chord": {"task": "x"}}]), CHUNK, id="a chord"),
        pytest.param(body([[1], {}]), CHUNK, id="two parts"),
        pytest.param(body({"args": [1]}), CHUNK, id="protocol 1"),
        pytest.param(body("1"), CHUNK, id="bare text"),
    ],
)
def test_anything_else_is_rejected(apply: Callable[[Message], None], reason: RejectionReason) -> None:
    message = sent(1)
    purify(message, "extract")
    apply(message)
    with pytest.raises(RejectedMessageError) as caught:
        purify(message, "extract")
    assert caught.value.reason is reason
    assert len(str(caught.value)) < 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_whatever_json_holds_is_taken_or_rejected(found: object) -> None:
    with pytest.raises(RejectedMessageError):
        purify(found, "extract")
