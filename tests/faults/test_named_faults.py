"""Every promise is kept, fault by fault: after each schedule the result has the same bytes, every chunk was committed
once, and nothing is left over. README's table names these tests; `make chaos` runs them."""

from __future__ import annotations

import psutil
import pytest

from tests.faults.chaos import Chaos
from tests.faults.faults import stop_database
from tests.faults.house import is_running
from tests.faults.schedule import KINDS, LAST, Fault
from tests.faults.traps import STEPS, TRANSACTION_FAULTS
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.tallies import DUPLICATES, read_tallies

pytestmark = [pytest.mark.faults, pytest.mark.chaos, pytest.mark.timeout(900)]

PAST_THE_LEASE = 5.0  # seconds; the lease is 3
A_MINUTE = 12.0  # seconds; four leases, as it is at the default of 15 s


def spread(*faults: tuple[str, str], seconds: float = 1.0) -> list[Fault]:
    """A schedule in which faults strike one after the other, in this order."""
    every = LAST // (len(faults) + 1)
    return [Fault(every * k, kind, where, seconds) for k, (kind, where) in enumerate(faults, start=1)]


def test_processes_are_killed(chaos: Chaos) -> None:
    chaos.run(spread(("kill child", "a"), ("kill parent", "b"), ("kill both", "a"), ("kill launcher", "b")))


def test_process_dies_at_each_step_of_a_chunk(chaos: Chaos) -> None:
    chaos.run(spread(*(("trap", f"extract.{step}.kill-child") for step in STEPS)))


def test_process_dies_at_each_step_of_merge_and_validation(chaos: Chaos) -> None:
    steps = [step for step in STEPS if step != "extracting"]
    # One death behind the merge's commit, and one behind the last: nobody comes back to the job after that.
    steps.append("committed")
    chaos.run([Fault(0, "trap", f"finish.{step}.kill-child", 0) for step in steps])


def test_stopped_worker_finishes_or_hands_back(chaos: Chaos) -> None:
    chaos.run(spread(("terminate launcher", "a"), ("terminate launcher", "b")))


def test_sleeper_does_not_commit(chaos: Chaos) -> None:
    """Stopped past its lease with the artifact in place, and then woken."""
    chaos.run([Fault(20, "trap", "extract.renamed.stop", 0), Fault(60, "stop child", "b", PAST_THE_LEASE)])
    logs = chaos.house.read_logs()
    assert "result_dropped" in logs or "worker_given_up" in logs
    dropped = [line for line in logs.splitlines() if "result_dropped" in line and '"duplicate": true' in line]
    # One that is counted may be given up before it says so.
    assert in_transaction(chaos.house.ledger, read_tallies).total(DUPLICATES) >= len(dropped)


def test_stuck_child_and_orphan_are_given_up(chaos: Chaos) -> None:
    chaos.run(
        [Fault(20, "trap", "extract.extracting.hang", 0), Fault(60, "trap", "extract.extracting.orphan", 0)]
    )
    assert "made no progress" in chaos.house.read_logs()


def test_node_ends_although_launcher_broker_and_database_are_gone(chaos: Chaos) -> None:
    """Its child hangs, nobody can be asked whether it was given up, and nobody restarts or kills the node."""
    house = chaos.house
    house.wait_for_workers()
    house.lay("extract", "extracting", "hang")
    house.submit(force=True)
    (sprung,) = house.wait_until(lambda: list(house.traps.glob("sprung-*")), "a child hangs")
    node = psutil.Process(int(sprung.name.split("-")[1])).parent()
    assert node is not None
    launcher = next(name for name in house.launchers if house.parent(name) == node)
    family = [node, *node.children()]
    try:
        house.broker.kill()
        stop_database(house.database, "immediate")
        house.launchers[launcher].kill()
        _, alive = psutil.wait_procs(family, timeout=house.settings.stuck_seconds + 10)
        assert [process for process in alive if is_running(process.pid)] == []
    finally:
        house.remove_traps()
        house.start_database()
        house.start_broker()
        house.start_services()
    house.wait_until(chaos.has_ended, "the job ends")
    chaos.assert_kept()


def test_relay_dies_or_sleeps(chaos: Chaos) -> None:
    chaos.run(spread(("kill relay", ""), ("stop relay", ""), seconds=PAST_THE_LEASE))


def test_broker_loses_its_data_its_clients_and_itself(chaos: Chaos) -> None:
    chaos.run(
        spread(
            ("restart broker", "kept"), ("flush broker", ""), ("reset broker", ""), ("restart broker", "lost")
        )
    )


def test_broker_is_down_for_a_while(chaos: Chaos) -> None:
    chaos.run([Fault(30, "broker down", "", A_MINUTE)])


def test_messages_are_repeated_and_malformed(chaos: Chaos) -> None:
    chaos.run(spread(("repeat messages", ""), ("garbage", "extract"), ("garbage", "finish")))


def test_database_restarts_and_cuts_connections(chaos: Chaos) -> None:
    chaos.run(
        spread(
            ("restart database", "fast"),
            ("cut connections", ""),
            ("restart database", "immediate"),
            ("cut connections", ""),
        )
    )


def test_database_is_down_for_a_while(chaos: Chaos) -> None:
    chaos.run([Fault(30, "database down", "immediate", A_MINUTE)])


def test_transaction_is_cut_or_conflicts_at_its_end(chaos: Chaos) -> None:
    traps = [
        ("trap", f"{queue}.committing.{fault}")
        for queue in ("extract", "finish")
        for fault in TRANSACTION_FAULTS
    ]
    chaos.run(spread(*traps))


def test_artifacts_are_damaged_before_merge(chaos: Chaos) -> None:
    chaos.run(spread(*(("damage artifact", how) for how in KINDS["damage artifact"][1])))


def test_output_folder_cannot_be_written(chaos: Chaos) -> None:
    chaos.run([Fault(30, "block output", "extract", 2.0), Fault(60, "block output", "merge", 4.0)])
