"""What a job does again: what was lost, failed, cancelled, forced or came late, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from tests import ledger_jobs as jobs
from virnucpro_core.errors import JobError, StaleLeaseError
from virnucpro_core.ledger import queries, transitions
from virnucpro_core.ledger.jobs import cancel, resume
from virnucpro_core.ledger.transitions import Declined
from virnucpro_core.ledger.work import Resumed

pytestmark = pytest.mark.integration


def test_resume_redoes_only_what_storage_lost(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker, failures=1)
    assert resume(tx, job_id).lost == 0
    assert jobs.state_of(tx, job_id) == "succeeded"
    lost = [row.id for row in queries.artifacts_of(tx, job_id) if (row.stage, row.ordinal) == ("extract", 1)]
    resumed = resume(tx, job_id, lost)
    assert (resumed.chunks, resumed.lost, resumed.waiting) == (3, 1, 1)
    job = queries.get_job(tx, job_id)
    assert (job.state, job.stage, job.embeddings, job.failed) == ("running", "extract", 18, 2)
    another = jobs.start_worker(tx, "another")
    jobs.run_job(tx, job_id, another, failures=1)
    job = queries.get_job(tx, job_id)
    assert (job.state, job.embeddings, job.failed) == ("succeeded", 27, 3)
    ran = tx.execute(text("SELECT worker_id FROM chunks WHERE stage = 'extract' ORDER BY ordinal")).scalars()
    assert list(ran) == [worker, another, worker]


def test_losing_the_merged_result_redoes_the_merge_alone(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker)
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="merge")]
    assert lost
    resumed = resume(tx, job_id, lost)
    assert (resumed.lost, resumed.waiting) == (0, 1)
    assert queries.get_job(tx, job_id).stage == "merge"


def lose(tx: Connection, job_id: int, *kinds: str) -> Resumed:
    """Lose the merge stage's files of these kinds."""
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="merge") if row.kind in kinds]
    assert len(lost) == len(kinds)
    return resume(tx, job_id, lost)


def finish_with_export(tx: Connection) -> int:
    """A job that succeeded, whose chunk artifacts have been removed."""
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx))
    tx.execute(
        text("""INSERT INTO artifacts (job_id, generation, stage, ordinal, kind, path, sha256, bytes, rows)
                SELECT job_id, generation, stage, ordinal, 'export', 'result.pt', sha256, bytes, rows
                  FROM artifacts WHERE stage = 'merge'""")
    )
    tx.execute(text("DELETE FROM artifacts WHERE stage = 'extract'"))
    return job_id


def test_an_export_is_made_again_from_the_matrix_without_the_chunks(tx: Connection) -> None:
    job_id = finish_with_export(tx)
    resumed = lose(tx, job_id, "export")
    assert (resumed.lost, queries.get_job(tx, job_id).stage) == (0, "merge")
    assert [row.kind for row in queries.artifacts_of(tx, job_id, stage="merge")] == ["matrix"]


def test_losing_the_matrix_after_chunks_were_removed_computes_them_again(tx: Connection) -> None:
    assert lose(tx, finish_with_export(tx), "matrix").lost == 3


def test_a_finished_job_that_lost_all_chunk_artifacts_forgets_them(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx))
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="extract")]
    resumed = resume(tx, job_id, lost)
    assert (resumed.lost, resumed.waiting, jobs.state_of(tx, job_id)) == (0, 0, "succeeded")
    assert queries.artifacts_of(tx, job_id, stage="extract") == []


@pytest.mark.parametrize("merged", [False, True])
def test_losing_all_chunk_artifacts_computes_them_again_if_they_are_needed(
    tx: Connection, merged: bool
) -> None:
    """They are if the matrix is lost, too, or is still to be made of them."""
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    worker = jobs.start_worker(tx)
    if merged:
        jobs.run_job(tx, job_id, worker)
    else:
        for chunk in jobs.pending_chunks(tx, job_id):
            claimed = jobs.claim(tx, chunk, worker)
            transitions.complete(tx, claimed, jobs.result_of(claimed))
    lost = [row.id for row in queries.artifacts_of(tx, job_id)]
    assert resume(tx, job_id, lost).lost == 3


def test_losing_what_validate_made_repeats_validate_alone(tx: Connection) -> None:
    job_id = finish_with_export(tx)
    tx.execute(
        text("""INSERT INTO artifacts (job_id, generation, stage, ordinal, kind, path, sha256, bytes, rows)
                SELECT job_id, generation, 'validate', 0, 'manifest', 'manifest.json', sha256, bytes, 1
                  FROM artifacts WHERE kind = 'export'""")
    )
    lost = [row.id for row in queries.artifacts_of(tx, job_id, stage="validate")]
    assert resume(tx, job_id, lost).lost == 0
    assert queries.get_job(tx, job_id).stage == "validate"


def test_resume_during_a_later_stage_fences_off_whoever_runs_it(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=2)).job_id
    worker = jobs.start_worker(tx)
    for chunk in jobs.pending_chunks(tx, job_id):
        claimed = jobs.claim(tx, chunk, worker)
        transitions.complete(tx, claimed, jobs.result_of(claimed))
    merge = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    assert merge.work.stage == "merge"
    resume(tx, job_id, [queries.artifacts_of(tx, job_id)[0].id])
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, merge, jobs.result_of(merge))


def test_what_a_stage_is_making_anew_is_not_lost(tx: Connection) -> None:
    """Whoever looks at the files meanwhile finds others than were recorded; the stage must not begin again for that."""
    job_id = finish_with_export(tx)
    nucleotides = replace(jobs.SUBMISSION, nucleotide_path="/in/a_DNABERT_S.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(), nucleotides)
    merge = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], jobs.start_worker(tx))
    assert merge.work.stage == "merge"
    made = queries.artifacts_of(tx, job_id, stage="merge")
    resume(tx, job_id, [row.id for row in made if row.kind == "export"])
    transitions.complete(tx, merge, jobs.result_of(merge))


def test_force_begins_a_generation_and_fences_off_the_old_one(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    old = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    forced = jobs.register(tx, jobs.scan(chunks=2, records_each=15), force=True)
    assert (forced.job_id, forced.generation, forced.created) == (job_id, 2, False)
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, old, jobs.result_of(old))
    jobs.run_job(tx, job_id, worker)
    assert jobs.state_of(tx, job_id) == "succeeded"
    assert {row.path.split("/")[2] for row in queries.artifacts_of(tx, job_id)} == {"g2"}


def test_a_late_name_is_published_without_computing_or_merging_again(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    worker = jobs.start_worker(tx)
    jobs.run_job(tx, job_id, worker)
    jobs.register(tx, jobs.scan(), replace(jobs.SUBMISSION, path="/elsewhere/b.fasta", stem="b"))
    job = queries.get_job(tx, job_id)
    assert (job.state, job.stage, job.chunks_left) == ("running", "validate", 1)
    jobs.run_job(tx, job_id, worker)
    assert [row.published_generation for row in queries.submissions_of(tx, job_id)] == [1, 1]


def test_late_nucleotides_bring_the_merge_back(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    jobs.run_job(tx, job_id, jobs.start_worker(tx))
    nucleotides = replace(jobs.SUBMISSION, nucleotide_path="/in/a_DNABERT_S.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(), nucleotides)
    assert queries.get_job(tx, job_id).stage == "merge"


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_nucleotides_for_a_job_that_ended_at_validate_are_merged(tx: Connection, end: str) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    worker = jobs.start_worker(tx)
    for _ in ("extract", "merge"):
        claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
        transitions.complete(tx, claimed, jobs.result_of(claimed))
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    if end == "failed":
        transitions.fail(tx, claimed, "bad luck", max_attempts=1)
    else:
        cancel(tx, job_id, by="a person")
    nucleotides = replace(jobs.SUBMISSION, nucleotide_path="/in/a_DNABERT_S.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(chunks=1), nucleotides)
    assert queries.get_job(tx, job_id).stage == "merge"


@pytest.mark.parametrize("again", ["c" * 64, "d" * 64], ids=["the same file", "another file"])
def test_nucleotides_that_do_not_match_are_noted_with_their_submission_alone(
    tx: Connection, again: str
) -> None:
    """The same file may be given again: it may have been away, or not readable, when it was to be merged."""
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    bad = replace(jobs.SUBMISSION, nucleotide_path="/in/bad.pt", nucleotide_sha256="c" * 64)
    jobs.register(tx, jobs.scan(chunks=1), bad)
    worker = jobs.start_worker(tx)
    extract = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    transitions.complete(tx, extract, jobs.result_of(extract))
    merge = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    unmerged = queries.submissions_of(tx, job_id)[1].id
    transitions.complete(tx, merge, replace(jobs.result_of(merge), unmerged={unmerged: "ids do not match"}))
    assert [row.error for row in queries.submissions_of(tx, job_id)] == [None, "ids do not match"]
    jobs.run_job(tx, job_id, worker)
    assert jobs.state_of(tx, job_id) == "succeeded"
    jobs.register(tx, jobs.scan(chunks=1), replace(bad, nucleotide_sha256=again))
    assert [row.error for row in queries.submissions_of(tx, job_id)] == [None, None]
    assert queries.get_job(tx, job_id).stage == "merge"


def test_one_run_forces_once_however_often_it_registers(tx: Connection) -> None:
    jobs.register(tx, jobs.scan())
    assert jobs.register(tx, jobs.scan(), force=True, forced_by="run 1").generation == 2
    assert jobs.register(tx, jobs.scan(), force=True, forced_by="run 1").generation == 2
    assert jobs.register(tx, jobs.scan(), force=True, forced_by="run 2").generation == 3
    assert jobs.register(tx, jobs.scan(), force=True).generation == 4


def test_a_running_job_goes_on_reading_where_it_began(tx: Connection, tmp_path: Path) -> None:
    original, copy = tmp_path / "a.fasta", tmp_path / "copy.fasta"
    for path in (original, copy):
        path.write_bytes(b">a\nM\n")
    job_id = jobs.register(tx, replace(jobs.scan(), location=str(original))).job_id
    jobs.register(tx, replace(jobs.scan(), location=str(copy)))
    assert queries.get_job(tx, job_id).location == str(original)
    original.unlink()
    jobs.register(tx, replace(jobs.scan(), location=str(copy)))
    assert queries.get_job(tx, job_id).location == str(copy)


def test_a_job_takes_its_weights_from_the_name_that_was_given_last(tx: Connection) -> None:
    jobs.add_model(tx, "other")
    job_id = jobs.register(tx, jobs.scan()).job_id
    jobs.register(tx, jobs.scan(), model="other")
    assert queries.get_job(tx, job_id).model == "other"


def test_a_submission_during_extract_changes_nothing_of_the_run(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan()).job_id
    waiting = jobs.pending_chunks(tx, job_id)
    jobs.register(tx, jobs.scan(), replace(jobs.SUBMISSION, path="/elsewhere/b.fasta", stem="b"))
    assert jobs.pending_chunks(tx, job_id) == waiting


def test_cancel_keeps_what_is_done_and_resume_goes_on(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=3)).job_id
    worker = jobs.start_worker(tx)
    first, second, _ = jobs.pending_chunks(tx, job_id)
    done = jobs.claim(tx, first, worker)
    transitions.complete(tx, done, jobs.result_of(done))
    running = jobs.claim(tx, second, worker)
    cancel(tx, job_id, by="a person")
    assert jobs.outbox_chunks(tx) == []
    assert transitions.describe(tx, second) == Declined(second, "its job is cancelled", job_id)
    with pytest.raises(StaleLeaseError):
        transitions.complete(tx, running, jobs.result_of(running))
    with pytest.raises(JobError):
        cancel(tx, job_id, by="a person")
    assert resume(tx, job_id).waiting == 2
    jobs.run_job(tx, job_id, worker)
    assert jobs.state_of(tx, job_id) == "succeeded"


def test_a_job_whose_last_chunk_ended_while_cancelled_advances_on_resume(tx: Connection) -> None:
    job_id = jobs.register(tx, jobs.scan(chunks=1)).job_id
    worker = jobs.start_worker(tx)
    claimed = jobs.claim(tx, jobs.pending_chunks(tx, job_id)[0], worker)
    tx.execute(text("UPDATE jobs SET state = 'cancelled', finished_at = now()"))
    assert transitions.complete(tx, claimed, jobs.result_of(claimed)) == "cancelled"
    resume(tx, job_id)
    assert queries.get_job(tx, job_id).stage == "merge"
