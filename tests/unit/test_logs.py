"""Logging: JSON lines for machines, text for a person on a terminal."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

LOG = """
import structlog
from virnucpro_core.logs import configure_logging
configure_logging()
structlog.contextvars.bind_contextvars(job=7)
log = structlog.get_logger()
log.debug("hidden")
log.info("shown", chunk=3)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broke")
"""


def test_lines_are_json_where_no_person_reads() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOG], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout == ""
    shown, broke = map(json.loads, ended.stderr.splitlines())
    assert (shown["event"], shown["level"], shown["job"], shown["chunk"]) == ("shown", "info", 7, 3)
    assert shown["timestamp"].endswith("Z")
    assert broke["exception"][0]["exc_type"] == "ZeroDivisionError"


def test_lines_are_text_on_a_terminal() -> None:
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", LOG], stderr=follower, check=True, timeout=60)
    os.close(follower)
    seen = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "shown" in seen
    assert '"event"' not in seen


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("letters", [10, 9000], ids=["short", "beyond a buffer"])
def test_a_line_and_its_end_are_written_at_once(environment: dict[str, str], letters: int) -> None:
    """Between two writes, another process that shares the pipe would put a line of its own."""
    # A packet is what one write has written.
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with reader, writer:
        subprocess.run(
            [sys.executable, "-c", LOG.replace("shown", "s" * letters)],
            env=inherited | environment,
            stderr=writer,
            check=True,
            timeout=60,
        )
        writer.close()
        written = list(iter(lambda: reader.recv(100_000), b""))
    assert len(written) == 2
    for line in written:
        assert line.endswith(b"}\n")
        json.loads(line)
