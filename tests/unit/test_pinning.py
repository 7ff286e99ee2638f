"""Pinning: masks, choices and locks, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virnucpro_core.errors import ExecutionError, SettingsError
from workers.launcher import Node, plan_nodes
from workers.pinning import Gpu, apply_mask, choose_gpus, list_gpus, try_lock

pytestmark = pytest.mark.unit

A = Gpu("GPU-aaaa1111", 0, "GPU-aaaa1111")
B = Gpu("GPU-bbbb2222", 1, "GPU-bbbb2222")
C1 = Gpu("MIG-cccc3331", 2, "GPU-cccc3333")
C2 = Gpu("MIG-cccc3332", 2, "GPU-cccc3333")
GPUS = [A, B, C1, C2]


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


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        (None, GPUS),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1,0", [B, A]),
        ("0,7,1", [A]),
        ("0,0", [A]),
        ("GPU-bbbb2222", [B]),
        ("GPU-bb, GPU-aa", [B, A]),
        ("MIG-cccc3332", [C2]),
        ("2", [C1, C2]),
        ("GPU-cccc3333", [C1, C2]),
        ("GPU-dddd", []),
    ],
)
def test_inherited_mask_is_obeyed(mask: str | None, left: list[Gpu]) -> None:
    assert apply_mask(GPUS, mask) == left


@pytest.mark.parametrize(
    ("wanted", "chosen"), [("none", []), ("all", [B, A]), ("0", [B]), ("1,0", [A, B]), (" 1 ", [A])]
)
def test_numbers_count_within_the_mask(wanted: str, chosen: list[Gpu]) -> None:
    assert choose_gpus(wanted, [B, A]) == chosen


@pytest.mark.parametrize("wanted", ["", "some", "0,", "0,0", "-1", "GPU-aaaa1111"])
def test_other_choices_are_refused(wanted: str) -> None:
    with pytest.raises(SettingsError, match="--gpus cannot be"):
        choose_gpus(wanted, GPUS)


def test_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ExecutionError, match="there is no GPU 2"):
        choose_gpus("0,2", [A, B])
    with pytest.raises(ExecutionError, match="no GPU is visible"):
        choose_gpus("all", [])


def test_each_gpu_gets_a_node_pinned_by_uuid(plan: Plan) -> None:
    nodes = plan([A, C2], ["extract", "finish"])
    assert [(node.name, node.queue, node.environment()["CUDA_VISIBLE_DEVICES"]) for node in nodes] == [
        (A.uuid, "extract", A.uuid),
        (C2.uuid, "extract", C2.uuid),
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


def test_unknown_queue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no queue 'gpu'"):
        plan_nodes([], ["gpu"], tmp_path)


def test_host_without_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert list_gpus() == []


def test_parents_never_import_torch_or_airflow() -> None:
    # A prefork parent that touched CUDA could not fork children that use it.
    code = "import sys, workers.tasks, workers.relay, workers.launcher; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"celery", "workers.stages"} <= set(done.stdout.split())
    assert not {"torch", "airflow"} & set(done.stdout.split())
