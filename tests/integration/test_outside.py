"""Paths that lead out: refused when a file is registered, and again by the worker, whatever the ledger says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sqlalchemy import text

from virnucpro_core.errors import OutsideError
from virnucpro_core.ledger.database import in_transaction
from workers.cleaning import remove_expired
from workers.process import WorkerProcess

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

pytestmark = [pytest.mark.integration, pytest.mark.faults]
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]

SECRET = b">secret\nMKVLAGICDEFHNPQRSTWY\n"


@pytest.fixture
def rooted(pipeline: Pipeline, tmp_path: Path) -> Pipeline:
    """Inputs are read from `data` and the inbox; beside them lies `private/secret.fasta`."""
    (tmp_path / "data").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.fasta").write_bytes(SECRET)
    pipeline.configure(input_roots=tmp_path / "data")
    return pipeline


@pytest.fixture
def worker(rooted: Pipeline) -> Iterator[WorkerProcess]:
    process = WorkerProcess(rooted.settings, node="extract@test", queue="extract")
    yield process
    process.close()


def write_fasta(path: Path) -> Path:
    path.write_bytes(b">a\nMKVLAGICDEF\n")
    return path


def write_nucleotides(path: Path) -> Path:
    torch.save({"nucleotide": ["a"], "data": [{"label": "", "mean_representation": [0.0] * 768}]}, path)
    return path


def ways_out(tmp_path: Path, target: Path) -> list[Path]:
    """Names below `data` and others that lead to a file outside."""
    data = tmp_path / "data"
    (data / f"link{target.suffix}").symlink_to(target)
    (data / "folder").symlink_to(target.parent)
    return [
        target,
        data / ".." / target.parent.name / target.name,
        data / f"link{target.suffix}",
        data / "folder" / target.name,
        Path("/proc/self/root") / target.relative_to("/"),
    ]


def test_registration_refuses_files_outside(rooted: Pipeline, tmp_path: Path) -> None:
    for path in ways_out(tmp_path, tmp_path / "private" / "secret.fasta"):
        with pytest.raises(OutsideError, match=r"leads out of .*data"):
            rooted.submit(path)
    with pytest.raises(OutsideError):
        rooted.submit(tmp_path / "private" / "missing.fasta")
    assert rooted.rows("SELECT * FROM inputs") == []
    for folder in ("data", "inbox"):
        assert rooted.submit(write_fasta(tmp_path / folder / f"{folder}.fasta")).records == 1


def test_registration_refuses_nucleotides_outside(rooted: Pipeline, tmp_path: Path) -> None:
    fasta = write_fasta(tmp_path / "data" / "a.fasta")
    for path in ways_out(tmp_path, write_nucleotides(tmp_path / "private" / "a_DNABERT_S.pt")):
        with pytest.raises(OutsideError):
            rooted.submit(fasta, nucleotides=path)
    assert rooted.rows("SELECT * FROM submissions") == []
    rooted.submit(fasta, nucleotides=write_nucleotides(tmp_path / "data" / "a_DNABERT_S.pt"))


def test_the_command_says_what_to_do_and_takes_the_other_files(
    rooted: Pipeline, tmp_path: Path, virnucpro: Callable[..., Completed]
) -> None:
    fasta = write_fasta(tmp_path / "data" / "a.fasta")
    ended = virnucpro("submit", tmp_path / "private" / "secret.fasta", fasta, "--model", "tiny")
    assert ended.code == OutsideError.exit_code
    said = " ".join(ended.err.split())
    assert "leads out of" in said
    assert "VIRNUCPRO_INPUT_ROOTS" in said
    assert f"{fasta}: job" in ended.out


def test_a_bomb_is_refused_by_the_setting(
    rooted: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from virnucpro_core.errors import InputError
    from virnucpro_core.sequences import scan

    monkeypatch.setattr(scan, "FREE_BYTES", 0)
    (tmp_path / "data" / "a.gz").write_bytes(gzip.compress(b">a\n" + b"M" * 10_000))
    rooted.configure(max_expansion=10)
    with pytest.raises(InputError, match="unpacks to more than"):
        rooted.submit(tmp_path / "data" / "a.gz")
    rooted.configure(max_expansion=1000)
    assert rooted.submit(tmp_path / "data" / "a.gz").records == 1


def change_ledger(pipeline: Pipeline, statement: str, **values: object) -> None:
    """As somebody who got hold of a role's password might."""
    in_transaction(pipeline.ledger, lambda tx: tx.execute(text(statement), values))


def chunk_of(pipeline: Pipeline, stage: str) -> Any:
    return next(iter(pipeline.rows("SELECT * FROM chunks WHERE stage = :stage", stage=stage)), None)


def run_to(pipeline: Pipeline, worker: WorkerProcess, *stages: str) -> None:
    for stage in stages:
        chunk = pipeline.wait_until(lambda stage=stage: chunk_of(pipeline, stage))  # type: ignore[misc]
        worker.run(stage, chunk.id)
        worker._finish_writing()


def test_a_worker_reads_no_input_outside(rooted: Pipeline, worker: WorkerProcess, tmp_path: Path) -> None:
    """The same bytes, so that nothing but the place is wrong with them."""
    rooted.submit(write_fasta(tmp_path / "data" / "a.fasta"))
    outside = write_fasta(tmp_path / "private" / "a.fasta")
    for path in ways_out(tmp_path, outside):
        change_ledger(rooted, "UPDATE chunks SET attempts = 0, deaths = 0, state = 'pending', error = NULL")
        change_ledger(rooted, "UPDATE inputs SET location = :path", path=str(path))
        worker.run("extract", chunk_of(rooted, "extract").id)
        chunk = chunk_of(rooted, "extract")
        assert (chunk.state, chunk.attempts) == ("pending", 1)
        assert "leads out of" in chunk.error
    change_ledger(rooted, "UPDATE inputs SET location = :path", path=str(tmp_path / "data" / "a.fasta"))
    run_to(rooted, worker, "extract")
    assert chunk_of(rooted, "extract").state == "done"


def test_a_worker_reads_no_nucleotides_outside(
    rooted: Pipeline, worker: WorkerProcess, tmp_path: Path
) -> None:
    nucleotides = write_nucleotides(tmp_path / "data" / "a_DNABERT_S.pt")
    job_id = rooted.submit(write_fasta(tmp_path / "data" / "a.fasta"), nucleotides=nucleotides).job_id
    nucleotides.rename(tmp_path / "private" / "a.pt")
    nucleotides.symlink_to(tmp_path / "private" / "a.pt")
    run_to(rooted, worker, "extract", "merge", "validate")
    assert rooted.job(job_id).state == "succeeded"
    (submission,) = rooted.rows("SELECT error FROM submissions")
    assert "leads out of" in submission.error
    assert list(rooted.settings.output_root.rglob("*_merged.pt")) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("stem", "../../escaped/a"),
        ("stem", "{tmp}/escaped/a"),
        ("stem", "a/b"),
        ("stem", "../jobs/00000001/g1/extract/x"),
        ("nucleotide_sha256", "/../../../../escaped"),
    ],
)
def test_a_worker_publishes_nothing_outside(
    rooted: Pipeline, worker: WorkerProcess, tmp_path: Path, column: str, value: str
) -> None:
    rooted.submit(write_fasta(tmp_path / "data" / "a.fasta"))
    run_to(rooted, worker, "extract", "merge")
    change_ledger(rooted, f"UPDATE submissions SET {column} = :value", value=value.format(tmp=tmp_path))
    before = set(tmp_path.rglob("*"))
    run_to(rooted, worker, "validate")
    chunk = chunk_of(rooted, "validate")
    assert chunk.state == "pending"
    assert "leads out of" in chunk.error
    made = {
        path
        for path in set(tmp_path.rglob("*")) - before
        if not path.is_relative_to(tmp_path / "output/jobs")
    }
    assert made == set()


def test_a_worker_reads_no_artifact_outside(rooted: Pipeline, worker: WorkerProcess, tmp_path: Path) -> None:
    rooted.submit(write_fasta(tmp_path / "data" / "a.fasta"))
    run_to(rooted, worker, "extract")
    change_ledger(rooted, "UPDATE artifacts SET path = '../private/secret.fasta'")
    run_to(rooted, worker, "merge")
    assert "leads out of" in chunk_of(rooted, "merge").error


def test_a_worker_removes_nothing_outside(rooted: Pipeline, worker: WorkerProcess, tmp_path: Path) -> None:
    rooted.submit(write_fasta(tmp_path / "data" / "a.fasta"))
    run_to(rooted, worker, "extract", "merge", "validate")
    change_ledger(rooted, "UPDATE artifacts SET path = '../private/secret.fasta' WHERE stage = 'extract'")
    rooted.configure(keep_chunks_days=0)
    private = tmp_path / "private"
    [chunks] = (tmp_path / "output" / "jobs").glob("*/g1/extract")
    removed = tmp_path / "output" / "jobs" / "removed"
    for place in (chunks, removed):
        aside = place.with_name("aside")
        if place.exists():
            place.rename(aside)
        place.symlink_to(private)
        remove_expired(rooted.ledger, rooted.settings)
        assert [(path.name, path.read_bytes()) for path in private.iterdir()] == [("secret.fasta", SECRET)]
        assert (place.is_symlink(), rooted.rows("SELECT 1 FROM artifacts WHERE stage = 'extract'") != []) == (
            True,
            True,
        )
        place.unlink()
        if aside.exists():
            aside.rename(place)
    remove_expired(rooted.ledger, rooted.settings)
    assert (private / "secret.fasta").read_bytes() == SECRET
    assert not chunks.exists(), "it does remove what lies below"
    assert list(removed.iterdir()) == []


def test_a_worker_writes_nothing_through_a_link(
    rooted: Pipeline, worker: WorkerProcess, tmp_path: Path
) -> None:
    rooted.submit(write_fasta(tmp_path / "data" / "a.fasta"))
    (tmp_path / "output" / "jobs").symlink_to(tmp_path / "private")
    run_to(rooted, worker, "extract")
    assert "leads out of" in chunk_of(rooted, "extract").error
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["secret.fasta"]


def test_an_output_root_that_is_a_link_is_fine(rooted: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    rooted.configure(output_root=tmp_path / "results")
    process = WorkerProcess(rooted.settings, node="extract@test", queue="extract")
    job_id = rooted.submit(write_fasta(tmp_path / "data" / "a.fasta")).job_id
    run_to(rooted, process, "extract", "merge", "validate")
    process.close()
    assert rooted.job(job_id).state == "succeeded"
    assert len(list((tmp_path / "disk").rglob("a_ESM.pt"))) == 1
