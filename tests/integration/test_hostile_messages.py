"""Messages that nobody of ours sent, through a real broker to a real worker: rejected, counted, and harmless."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tests.pt_files import Payload
from virnucpro_core.settings import load_settings
from workers.app import KEY_PREFIX, make_app

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = [pytest.mark.integration, pytest.mark.faults]
pytest_plugins = ["tests.fixtures_pipeline"]

QUEUE = "finish"


def counted(pipeline: Pipeline) -> dict[str, int]:
    return {row.reason: row.messages for row in pipeline.rows("SELECT reason, messages FROM rejections")}


def left_in_broker(url: str) -> dict[str, Any]:
    """Messages in our queue, and those that somebody took and did not acknowledge."""
    with redis.Redis.from_url(url) as broker:
        return {"queue": broker.llen(KEY_PREFIX + QUEUE), "taken": broker.hlen(KEY_PREFIX + "unacked")}


def check_unharmed(pipeline: Pipeline, broker_url: str) -> None:
    """The one worker there was is the one there is, and still takes messages."""
    (worker,) = pipeline.rows("SELECT state, pid FROM workers")
    assert worker.state == "live"
    app = make_app(load_settings)
    app.send_task("virnucpro.merge", args=[4711], queue=QUEUE)
    app.close()
    pipeline.wait_until(lambda: "message_declined" in pipeline.logs())
    pipeline.wait_until(lambda: left_in_broker(broker_url) == {"queue": 0, "taken": 0})


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_a_message_that_is_not_json_is_rejected_unread(
    pipeline: Pipeline, broker_url: str, tmp_path: Path, serializer: str
) -> None:
    argument = Payload(tmp_path / "it ran") if serializer == "pickle" else 1
    pipeline.start_workers(QUEUE)
    app = make_app(load_settings)
    app.send_task("virnucpro.merge", args=[argument], queue=QUEUE, serializer=serializer)
    app.close()
    pipeline.wait_until(lambda: counted(pipeline) == {"content": 1})
    assert "message_rejected" in pipeline.logs()
    check_unharmed(pipeline, broker_url)
    assert not (tmp_path / "it ran").exists()


def test_that_payload_is_live(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "it ran")))
    assert (tmp_path / "it ran").exists()


def envelope(content: bytes, **changes: Any) -> bytes:
    """A message as kombu writes it, but for the changes."""
    headers = {"lang": "py", "task": "virnucpro.merge", "id": "1"} | changes.pop("headers", {})
    properties = {
        "delivery_tag": "1",
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
        "body_encoding": "base64",
    }
    message = {
        "body": base64.b64encode(content).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": properties,
    }
    return json.dumps(message | changes).encode()


NO_BODY = b"[[1], {}, {}]"

RUBBISH = {
    "format": [
        b"not JSON",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'{"__type__": "uuid", "__value__": "x"}',
        b'{"__type__": "decimal", "__value__": []}',
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b'{"properties": 5, "headers": {}}',
        b'{"properties": {}, "headers": null}',
        envelope(NO_BODY, properties={}),
        envelope(NO_BODY, headers={"id": None}),
        envelope(NO_BODY, body=17),
    ],
    "content": [
        envelope(NO_BODY, **{"content-type": "application/x-python-serialize"}),
        envelope(zlib.compress(b"[" + b" " * 50_000_000), headers={"compression": "application/x-gzip"}),
        envelope(b"x" * 500_000),
        envelope(b"\x80\x04."),
    ],
    "task": [
        envelope(NO_BODY, headers={"task": "virnucpro.nonsense"}),
        envelope(NO_BODY, headers={"task": "celery.chord_unlock"}),
        envelope(NO_BODY, headers={"task": {}}),
    ],
    "chunk": [
        envelope(b"5"),
        envelope(b"[]"),
        envelope(b"[[], {}, {}]"),
        envelope(b"[[-1], {}, {}]"),
        envelope(b'[["1"], {}, {}]'),
        envelope(b'[[1], {}, {"callbacks": [{"task": "virnucpro.merge", "args": [1]}]}]'),
    ],
}


def test_rubbish_is_rejected_counted_and_gone(pipeline: Pipeline, broker_url: str) -> None:
    pipeline.start_workers(QUEUE)
    with redis.Redis.from_url(broker_url) as broker:
        for items in RUBBISH.values():
            broker.lpush(KEY_PREFIX + QUEUE, *items)
    expected = {reason: len(items) for reason, items in RUBBISH.items()}
    pipeline.wait_until(lambda: sum(counted(pipeline).values()) == sum(expected.values()))
    assert counted(pipeline) == expected
    check_unharmed(pipeline, broker_url)


def test_a_chunk_of_another_stage_is_counted(pipeline: Pipeline, small_fasta: Path, broker_url: str) -> None:
    pipeline.submit(small_fasta)
    (chunk, *_) = [row.id for row in pipeline.rows("SELECT id FROM chunks ORDER BY id")]
    pipeline.start_workers(QUEUE)
    app = make_app(load_settings)
    app.send_task("virnucpro.merge", args=[chunk], queue=QUEUE)
    app.close()
    pipeline.wait_until(lambda: counted(pipeline) == {"stage": 1})
    check_unharmed(pipeline, broker_url)


def test_what_a_message_asks_for_beyond_its_chunk_is_not_done(pipeline: Pipeline, broker_url: str) -> None:
    """A countdown of a year would hold the worker's one place until then."""
    pipeline.start_workers(QUEUE)
    app = make_app(load_settings)
    app.send_task("virnucpro.merge", args=[815], queue=QUEUE, countdown=365 * 86_400)
    app.send_task("virnucpro.merge", args=[815], queue=QUEUE, eta="0001-01-01T00:00:00")  # type: ignore[arg-type]
    app.close()
    check_unharmed(pipeline, broker_url)
