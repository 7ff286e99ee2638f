"""A handful of the seeds that `make chaos` runs, and a record that kills whoever embeds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults import traps
from tests.faults.chaos import Chaos
from tests.faults.faults import STRIKES
from tests.faults.schedule import plan
from tests.faults.traps import ACTIONS, TRANSACTION_FAULTS
from virnucpro_core.features.exports import read_pt, write_pt
from virnucpro_core.ledger.suspects import DEATHS_TO_CONDEMN

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SEEDS = range(3)
POISON = ["p100", "p101"]


def test_record_that_kills_is_a_failure_and_all_others_are_embedded(chaos: Chaos, tmp_path: Path) -> None:
    house = chaos.house
    before = house.rows("SELECT coalesce(max(id), 0) AS id FROM setbacks")[0].id
    (house.traps / traps.POISON).write_text("\n".join(POISON))
    try:
        house.submit(force=True)
        house.wait_until(chaos.has_ended, "the job ends")
    finally:
        (house.traps / traps.POISON).unlink()
    job = house.job(chaos.job_id)
    assert job.state == "succeeded", job.error
    failures = house.rows("SELECT record_id, detail FROM failures WHERE reason = 'poison' ORDER BY record")
    assert [row.record_id for row in failures] == POISON
    assert "4 processes ended while they embedded it" in failures[0].detail

    (tmp_path / "undisturbed.pt").write_bytes(chaos.undisturbed["chaos_ESM.pt"])
    ids, rows = read_pt(tmp_path / "undisturbed.pt")
    healthy = [(name, row.numpy()) for name, row in zip(ids, rows, strict=True) if name not in POISON]
    write_pt(tmp_path / "healthy.pt", [name for name, _ in healthy], np.stack([row for _, row in healthy]))
    published = house.read_published(chaos.job_id)["chaos_ESM.pt"]
    assert published == (tmp_path / "healthy.pt").read_bytes()

    # With a chunk in hand: on a busy machine a worker may also be given up while it imports torch.
    died = "SELECT count(DISTINCT worker_id) AS n FROM setbacks WHERE kind = 'died' AND id > :before"
    deaths = house.rows(died, before=before)[0].n
    assert deaths >= DEATHS_TO_CONDEMN, "nobody died of it"
    assert deaths <= len(POISON) * (DEATHS_TO_CONDEMN + 2), "a worker dies for ever"


@pytest.mark.parametrize("seed", SEEDS)
def test_schedule_of_a_seed(chaos: Chaos, seed: int) -> None:
    chaos.run(plan(seed))


def test_seed_is_its_schedule() -> None:
    assert [plan(seed) for seed in range(50)] == [plan(seed) for seed in range(50)]
    assert len({tuple(plan(seed)) for seed in range(50)}) == 50


def test_200_seeds_strike_with_everything() -> None:
    faults = [fault for seed in range(200) for fault in plan(seed)]
    assert {fault.kind for fault in faults} == set(STRIKES)
    traps = {fault.where.split(".")[2] for fault in faults if fault.kind == "trap"}
    assert traps == {*ACTIONS, *TRANSACTION_FAULTS}
