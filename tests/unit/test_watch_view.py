"""How `status --watch` fits into a terminal: what is cut is text, never a number."""

from __future__ import annotations

from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console

from virnucpro_core.cli.watch import View, draw
from virnucpro_core.failures import FailureReason
from virnucpro_core.ledger.overview import JobOverview, RecentFailure, WorkerOverview

pytestmark = pytest.mark.unit

NOW = datetime(2026, 11, 23, 1, 2, 3, tzinfo=UTC)
JOB = JobOverview(
    id=12,
    stem="proteins_of_a_sample_with_a_long_name",
    files=1,
    model="fastesm2",
    state="running",
    stage="extract",
    generation=1,
    chunks_total=5678,
    chunks_left=1234,
    records=9_999_999,
    embeddings=4_000_000,
    failed=4321,
    residues=10,
    residues_done=4,
    residues_per_second=391_000.0,
    seconds_left=12_345.0,
    setback=None,
    error=None,
    created_at=NOW,
    finished_at=None,
)
WORKER = WorkerOverview(
    id=1,
    node="GPU-1a2b3c4d-0000@a.host.of.ours",
    queue="extract",
    host="a.host.of.ours",
    device="GPU-1a2b3c4d-0000",
    heartbeat_seconds=2.0,
    progress_seconds=1.0,
    job_id=12,
    stage="extract",
    ordinal=4443,
    chunks_total=5678,
    chunk_seconds=7.0,
    lease_seconds=7.0,
    tokens_per_second=387_654.0,
    gpu_utilization=1.0,
    gpu_memory_used=2**33,
    gpu_memory_total=2**37,
    gpu_memory_peak=2**33,
)
FAILURE = RecentFailure(
    job=12,
    record=1_234_567,
    id="NZ_CP012345.1_123_frame2",
    reason=FailureReason.INVALID_RESIDUE,
    detail="byte 0x00 at residue 5 is not an amino acid",
    finished_at=NOW,
)


@pytest.mark.parametrize("width", [80, 200])
def test_numbers_are_whole_however_narrow_the_terminal_is(width: int) -> None:
    view = View(jobs=[JOB], workers=[WORKER], failures=[FAILURE], setbacks=[], taken_at=NOW)
    console = Console(file=StringIO(), width=width)
    console.print(draw(view, "", height=30))
    assert isinstance(console.file, StringIO)
    picture = console.file.getvalue()
    told = set(picture.split())
    assert told >= {"1,234/5,678", "4,321", "391,000", "40%", "387,654", "1234567"}
    for words in ("3 h 26 min", "7 s", "invalid_residue"):
        assert f" {words} " in picture
