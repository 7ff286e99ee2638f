"""A child whose parent is killed ends with it, whatever it is doing."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from virnucpro_core.stack.supervisor import is_alive

pytestmark = pytest.mark.faults

FAMILY = """
import os, signal
from virnucpro_core.stack.processes import die_with_parent

child = os.fork()
if child == 0:
    die_with_parent()
    print(os.getpid(), flush=True)
signal.pause()
"""


def test_child_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        psutil.wait_procs([child], timeout=60)
    assert not is_alive(child)
