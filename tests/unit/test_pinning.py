"""Pinning: choices and locks, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virnucpro_core.errors import ExecutionError, SettingsError
from virnucpro_core.gpus import Gpu
from workers.launcher import LONGEST_PAUSE, Node, RunningNode, plan_nodes
from workers.pinning import try_lock

pytestmark = pytest.mark.unit

A = Gpu("GPU-aaaa1111", 0, "GPU-aaaa1111")
B = Gpu("GPU-bbbb2222", 1, "GPU-bbbb2222")
C2 = Gpu("MIG-cccc3332", 2, "GPU-cccc3333")
GPUS = [A, B, C2]


Plan = Callable[..., list[Node]]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """`plan_nodes` in a lock folder of the test's own; what was locked is released at the end."""
    planned: list[Node] = []

    def plan_and_remember(*arguments: object) -> list[Node]:
        nodes = plan_nodes(*arguments, tmp_path)
        planned.extend(nodes)
        return nodes

    yield plan_and_remember
    for node in planned:
        node.lock.release()


def test_each_gpu_gets_a_node_pinned_by_uuid(plan: Plan) -> None:
    nodes = plan([A, C2], ["extract", "finish"])
    assert [(node.name, node.queue, node.environment()["CUDA_VISIBLE_DEVICES"]) for node in nodes] == [
        ("gpu0-aaaa1111", "extract", A.uuid),
        ("gpu2-cccc3332", "extract", C2.uuid),
        ("finish0", "finish", ""),
    ]


def test_gpu_in_use_is_refused_until_its_lock_is_dropped(tmp_path: Path, plan: Plan) -> None:
    (node,) = plan_nodes([A], ["extract"], tmp_path)
    with pytest.raises(ExecutionError, match="another worker uses this GPU"):
        plan([A], ["extract"])
    node.lock.release()
    assert plan([A], ["extract"])[0].device == A.uuid


def test_nodes_without_gpu_take_the_first_free_number(tmp_path: Path, plan: Plan) -> None:
    (first,) = plan_nodes([], ["extract"], tmp_path)
    others = plan([], ["extract", "finish"])
    assert [node.name for node in (first, *others)] == ["cpu0", "cpu1", "finish0"]
    first.lock.release()
    assert plan([], ["extract"])[0].name == "cpu0"


def test_child_keeps_the_lock_that_it_inherited(tmp_path: Path) -> None:
    lock = try_lock("GPU-x", tmp_path)
    assert lock is not None
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lock.descriptor]) as child:
        lock.release()
        assert try_lock("GPU-x", tmp_path) is None
        child.communicate()
    freed = try_lock("GPU-x", tmp_path)
    assert freed is not None
    freed.release()


def test_a_users_umask_does_not_lock_other_users_out(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    before = os.umask(0o077)
    try:
        lock = try_lock("GPU-x", folder)
    finally:
        os.umask(before)
    assert lock is not None
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert (folder / "GPU-x.lock").stat().st_mode & 0o7777 == 0o666
    lock.release()


def test_links_planted_for_locks_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (target / "file").touch(mode=0o600)
    (tmp_path / "GPU-x.lock").symlink_to(target / "file")
    (tmp_path / "locks").symlink_to(target)
    with pytest.raises(ExecutionError, match="locks cannot be kept"):
        try_lock("GPU-x", tmp_path)
    with pytest.raises(ExecutionError, match="locks cannot be kept"):
        try_lock("file", tmp_path / "locks")
    assert target.stat().st_mode & 0o777 == 0o700
    assert (target / "file").stat().st_mode & 0o777 == 0o600


def test_unknown_queue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no queue 'gpu'"):
        plan_nodes([], ["gpu"], tmp_path)


def test_node_that_keeps_dying_is_put_off_no_longer_than_it_should(plan: Plan) -> None:
    """As for a night, while its GPU is broken: the launcher must not end of it, and take the other nodes along."""
    node = RunningNode(plan([A], ["extract"])[0])
    for deaths, pause in ((3, 4.0), (2_000, LONGEST_PAUSE)):
        node.deaths = deaths - 1
        node.process = subprocess.Popen([sys.executable, "-c", ""])
        node.process.wait()
        node.started = time.monotonic()
        node.watch()
        assert node.deaths == deaths
        assert node.started + pause <= node.due <= time.monotonic() + pause


def test_parents_never_import_torch_or_airflow() -> None:
    # A prefork parent that touched CUDA could not fork children that use it.
    code = "import sys, workers.tasks, workers.relay, workers.launcher; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"celery", "workers.stages"} <= set(done.stdout.split())
    assert not {"torch", "airflow"} & set(done.stdout.split())
