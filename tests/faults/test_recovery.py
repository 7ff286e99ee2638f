"""How soon a killed worker's chunk runs again at default settings, by the ledger's own times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from virnucpro_core.settings import Settings
from virnucpro_core.stack.supervisor import kill

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
pytest_plugins = ["tests.fixtures_pipeline"]

SECONDS = 30.0
CHUNKS = 1500


@pytest.fixture
def defaults(pipeline: Pipeline) -> None:
    names = ("lease_seconds", "heartbeat_seconds", "stuck_seconds", "republish_seconds", "max_attempts")
    pipeline.configure(**{name: Settings.model_fields[name].default for name in names})


@pytest.fixture
def long_fasta(tmp_path: Path) -> Path:
    """Proteins of 300 residues: with the tests' chunk size a chunk each, and more than a worker embeds in a minute.

    On a slow machine, too, a chunk is short beside `SECONDS`: a few are in the broker's queue already, and go first.
    """
    path = tmp_path / "inbox" / "long.fasta"
    path.write_text("".join(f">p{k}\n{'MKVLAGICDEFHNPQRSTWY' * 15}\n" for k in range(CHUNKS)))
    return path


def test_chunk_of_a_killed_host_runs_again_within_30_seconds(
    pipeline: Pipeline, defaults: None, long_fasta: Path
) -> None:
    """Even behind a long queue, and with nobody on that host to take it up again."""
    pipeline.start_relay()
    doomed = pipeline.start_workers("extract")
    (doomed_worker,) = pipeline.rows("SELECT id FROM workers")
    pipeline.start_workers("extract")
    assert doomed.process is not None
    pipeline.submit(long_fasta)
    _, held = pipeline.stop_in_mid_chunk(doomed_worker.id)
    launcher = psutil.Process(doomed.process.pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        kill(process)
    (killed,) = pipeline.rows("SELECT now() AS at")
    ((again, waiting, seconds),) = pipeline.wait_until(
        lambda: pipeline.rows(
            "SELECT claimed_at, (SELECT count(*) FROM chunks WHERE attempts = 0) AS waiting,"
            " (SELECT avg(seconds) FROM chunks WHERE state = 'done') AS seconds"
            " FROM chunks WHERE id = :id AND worker_id <> :worker",
            id=held,
            worker=doomed_worker.id,
        )
    )
    assert (again - killed.at).total_seconds() < SECONDS
    assert waiting * seconds > SECONDS, "there was no queue to wait in"
