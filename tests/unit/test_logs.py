"""Logging: JSON lines for machines, text for a person on a terminal."""

from __future__ import annotations

import json
import os
import pty
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
