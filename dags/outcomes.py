"""What became of a run's files: an outcome for each, and the sum of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import structlog
from sqlalchemy import Connection

from dags.waiting import SubmittedFile
from virnucpro_core.errors import JobError
from virnucpro_core.ledger.queries import artifacts_of, find_submission, get_job
from virnucpro_core.ledger.transitions import EXTRACT, MERGE
from virnucpro_core.status import read_status

FAULTS_NAMED = 20  # in an error's text; the log has them all
NOT_THROUGH = "it did not get through its stages: see its failed task"

log = structlog.get_logger()


class FileOutcome(TypedDict):
    """What became of a file.

    Attributes:
        fault: why its result is not accepted; empty if it is.
        job: what the ledger says of its job; empty if it was refused.
    """

    path: str
    fault: str
    job: dict[str, Any]


def read_outcome(tx: Connection, file: SubmittedFile, allowed_share: float) -> FileOutcome:
    """What became of a file whose stages are over."""
    if file["job"] is None:
        return {"path": file["path"], "fault": file["refused"], "job": {}}
    job = read_status(tx, file["job"])
    submission = find_submission(tx, job.job, file["path"])
    # An equal file that comes later has its job merged or validated again; this one has what it was promised.
    is_served = job.stage != EXTRACT and submission.published_generation == job.generation
    facts = {
        "id": job.job,
        "generation": job.generation,
        "state": job.state,
        "input_sha256": job.input_sha256,
        "records": job.records,
        "embeddings": job.embeddings,
        "failed": job.failed,
        "failures": job.failures,
        "truncated": job.truncated,
        "unknown": job.unknown,
        "tokens_per_second": job.tokens_per_second,
        "model": job.model,
        "demonstration": job.demonstration,
        "folder": submission.folder(job.input_sha256, get_job(tx, job.job).recipe_sha256),
        "results": [
            {"kind": artifact.kind, "rows": artifact.rows, "sha256": artifact.sha256}
            for artifact in artifacts_of(tx, job.job, stage=MERGE)
        ],
    }
    fault = ""
    if job.state != "succeeded" and not (job.state == "running" and is_served):
        fault = f"job {job.job} {job.state}" + (f": {job.error}" if job.error else "")
    elif job.failed_share > allowed_share:
        fault = f"{job.failed} of {job.records} records failed, more than the allowed {allowed_share:.2%}"
    elif submission.error:
        fault = f"its nucleotides were not merged: {submission.error}"
    return {"path": file["path"], "fault": fault, "job": facts}


def explain_outcome(tx: Connection, file: SubmittedFile, allowed_share: float) -> FileOutcome:
    """What became of a file whose own tasks do not tell, because one of them failed."""
    try:
        outcome = read_outcome(tx, file, allowed_share)
    except JobError as error:
        return {"path": file["path"], "fault": str(error), "job": {}}
    state = outcome["job"].get("state")
    return outcome if outcome["fault"] else outcome | {"fault": f"{NOT_THROUGH}; its job {state}"}


def log_outcome(outcome: FileOutcome) -> None:
    """Say in the task's log what became of a file."""
    facts = {"job" if name == "id" else name: value for name, value in outcome["job"].items()}
    if outcome["fault"]:
        log.error("the result is not accepted", file=outcome["path"], fault=outcome["fault"], **facts)
    else:
        log.info("the result is accepted", file=outcome["path"], **facts)
    if outcome["job"].get("demonstration"):
        log.warning(
            "the weights are RANDOM: these embeddings mean nothing", job=facts["job"], model=facts["model"]
        )


def sum_up(asked: Sequence[str], outcomes: Iterable[FileOutcome]) -> None:
    """Say what became of a whole run.

    Args:
        asked: the files that the run set out with.
        outcomes: those of the files of which anything is known.

    Raises:
        JobError: if a file has no accepted result; names the files.
    """
    told = {outcome["path"]: outcome for outcome in outcomes}
    faults = {path: outcome["fault"] for path, outcome in told.items() if outcome["fault"]}
    faults |= {path: NOT_THROUGH for path in asked if path not in told}
    accepted = [outcome["job"] for path, outcome in told.items() if path not in faults]
    log.info(
        "%s of %s files are accepted: %s of %s records embedded",
        len(accepted),
        len(asked),
        sum(job["embeddings"] for job in accepted),
        sum(job["records"] for job in accepted),
        failures=dict(sum((Counter(job["failures"]) for job in accepted), Counter[str]())),
        truncated=sum(job["truncated"] for job in accepted),
    )
    for path, fault in faults.items():
        job = told[path]["job"].get("id") if path in told else None
        log.error("a file has no accepted result", file=path, job=job, fault=fault)
    if faults:
        raise JobError(
            f"{len(faults)} of {len(asked)} files have no accepted result",
            where="; ".join(f"{path}: {fault}" for path, fault in list(faults.items())[:FAULTS_NAMED]),
            todo="Mend what is named, then clear the failed tasks of these files, or run again.",
        )
