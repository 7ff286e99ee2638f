"""The DAG `virnucpro_ingest`: FASTA files in, validated protein features out."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import structlog
from airflow.sdk import (
    Asset,
    ExceptionRetryPolicy,
    Param,
    RetryAction,
    RetryRule,
    TriggerRule,
    dag,
    task,
    task_group,
)

from dags.connections import open_dag_ledger
from dags.inbox import find_inputs, make_batches, name_batch, read_path
from dags.links import DAG_ID
from dags.notices import make_deadline, tell_failed
from dags.outcomes import FileOutcome, explain_outcome, log_outcome, read_outcome, sum_up
from dags.waiting import SubmittedFile, WaitForStage
from virnucpro_core.errors import InputError, JobError, ServiceError
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.submissions import find_nucleotides, submit_file
from virnucpro_core.ledger.transitions import EXTRACT, MERGE, VALIDATE
from virnucpro_core.settings import load_settings

FEATURES = Asset("virnucpro_features")
REFUSED = "refused"  # what `register` leaves for `summary` when it fails

ABOUT = """
### FASTA in, validated protein features out

Every night, or when triggered by hand, each FASTA file is registered in the ledger. Workers then **extract**
an embedding per protein, **merge** them in input order and **validate** the result. Only then is it
published, with a manifest, in `results/<name>-<input>-<recipe>/` below the output folder.
The tasks here only wait.

* **Nothing is computed twice.** The same content under the same model and settings is the same job: a second
  run finds it done.
* **A bad record never stops a file.** It becomes a *failure* with number, id and reason
  (`virnucpro failures JOB`). If more than the allowed share of records failed, the file is not accepted.
  A bad *file* never stops another one.
* **Clear** a stage to have the ledger compared with the files on disk: what is missing or failed is done
  again, and nothing else.
* **Compute again** (`force`) computes everything anew; the published files stay until the new ones replace
  them.
* The page **VirNucPro** in the menu, the tab of that name on a run, and the link on each task that waits show the jobs:
  progress, time left, failures, files with checksums, retry, cancel, verify.
* A run that failed, or is late, is told to whom the settings name (`VIRNUCPRO_NOTIFIER`, `VIRNUCPRO_LATE_HOURS`).
* A nucleotide file `<name>_DNABERT_S.pt` beside the FASTA is merged with the result: `<name>_merged.pt`,
  2048 wide.
* Above 250 files, several share a mapped task. `summary` names every file without an accepted result.
"""

WHAT, HOW = "What to embed", "How to run it"

PARAMS = {
    "files": Param(
        [],
        type="array",
        items={"type": "string", "minLength": 1},
        title="FASTA files",
        description_md="One path a line, as the workers see it; a relative one starts in the inbox. "
        "Plain, gzip, bgzip or zstd. **Empty: every FASTA file in the inbox** and its folders.",
        section=WHAT,
    ),
    "model": Param(
        None,
        type=["null", "string"],
        title="Model",
        description_md="A registered model (`virnucpro weights show` lists them). Empty: the configured one. "
        "Another model is another job, beside the old one.",
        section=WHAT,
    ),
    "force": Param(
        default=False,
        type="boolean",
        title="Compute again",
        description_md="Compute everything anew, even what is done: for doubts about a result. The old files stay "
        "until the new ones replace them. To go on with what failed, clear its task instead.",
        section=HOW,
    ),
    "max_failed_share": Param(
        None,
        type=["null", "number"],
        minimum=0,
        maximum=1,
        title="Allowed share of failures",
        description_md="Between 0 and 1: a file with a larger share of failed records is not accepted, "
        "and the run fails. Its features are published all the same. Empty: the configured share.",
        section=HOW,
    ),
    "label": Param(
        "none",
        type="string",
        enum=["none", "host", "viral"],
        values_display={"none": "not known", "host": "host", "viral": "viral"},
        title="Label",
        description_md="What the sequences are, for `labels` in the files merged with nucleotides.",
        section=WHAT,
    ),
}

RETRIES = {
    "retries": 5,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": True,
    # Waiting mends a service that is down; it mends no file, no setting and no job that failed.
    "retry_policy": ExceptionRetryPolicy(
        rules=[RetryRule(exception=ServiceError, action=RetryAction.RETRY)], default=RetryAction.FAIL
    ),
}

log = structlog.get_logger()


@task
def find_files(params: dict[str, Any] | None = None) -> list[list[str]]:
    """The run's files, a list for each mapped task."""
    assert params is not None
    inbox = load_settings().inbox.absolute()
    files = find_inputs(inbox, params["files"])
    if not files:
        log.info("there is no FASTA file in the inbox: nothing to do", inbox=str(inbox))
    batches = make_batches(files)
    log.info("%s files are found, for %s mapped tasks", len(files), len(batches), inbox=str(inbox))
    return batches


@task(map_index_template="{{ name_batch(task.op_kwargs['batch']) }}")
def register(
    batch: list[str], params: dict[str, Any] | None = None, run_id: str | None = None, ti: Any = None
) -> list[SubmittedFile]:
    """Enter the files and their jobs into the ledger. One that cannot be used does not keep others out."""
    assert params is not None
    files: list[SubmittedFile] = []
    errors: list[InputError] = []
    with open_dag_ledger() as ledger:
        for name in batch:
            path = read_path(name)
            try:
                job = submit_file(
                    ledger,
                    path,
                    settings=load_settings(),
                    model=params["model"],
                    nucleotides=find_nucleotides(path),
                    label="" if params["label"] == "none" else params["label"],
                    max_failed_share=params["max_failed_share"],
                    force=params["force"],
                    # Airflow may retry this task, and a person may clear it: once is enough for a run.
                    forced_by=run_id,
                    requested_by=f"{DAG_ID} {run_id}",
                )
            except InputError as error:
                log.warning("the file is refused", file=name, reason=str(error))
                errors.append(error)
                files.append({"path": name, "job": None, "refused": str(error)})
            else:
                log.info(
                    "the file is %s: %s records in %s chunks",
                    "a new job" if job.created else "known",
                    job.records,
                    job.chunks,
                    file=name,
                    job=job.job_id,
                    generation=job.generation,
                )
                files.append({"path": name, "job": job.job_id, "refused": ""})
    if len(errors) == len(batch):
        ti.xcom_push(REFUSED, files)  # a task that fails returns nothing, and `summary` is to say why
        raise errors[0]
    return files


@task(outlets=[FEATURES], map_index_template="{{ name_files(task.op_kwargs['files']) }}")
def report(
    files: list[SubmittedFile],
    params: dict[str, Any] | None = None,
    outlet_events: Any = None,
) -> list[FileOutcome]:
    """Say what became of the files, and tell those who follow the asset which features are new."""
    assert params is not None
    with open_dag_ledger() as ledger:
        outcomes = [in_transaction(ledger, read_outcome, file, allowed_share(params)) for file in files]
    for one in outcomes:
        log_outcome(one)
    accepted = [one for one in outcomes if not one["fault"]]
    if not accepted:
        raise JobError(
            outcomes[0]["fault"],
            where=outcomes[0]["path"],
            todo="`virnucpro failures JOB` lists the records.",
        )
    outlet_events[FEATURES].extra = {"files": accepted}
    return outcomes


@task(trigger_rule=TriggerRule.ALL_DONE)
def summary(
    batches: list[list[str]] | None,
    params: dict[str, Any] | None = None,
    run_id: str | None = None,
    ti: Any = None,
) -> None:
    """Say what became of the run; fails if a file has no accepted result."""
    assert params is not None
    if batches is None:
        raise JobError(
            "the run could not look for its files",
            where="find_files",
            todo="Its log says why: mend the cause, then clear it.",
        )

    def pull(task_id: str, indexes: list[int], key: str = "return_value") -> list[Any]:
        found = ti.xcom_pull(task_ids=[task_id], map_indexes=indexes, key=key)
        return [file for batch in found if batch for file in batch]

    # What a task left before a Clear is there until it runs again: it may not, or there may be fewer of them now.
    states = ti.get_task_states(DAG_ID, task_ids=["report"], run_ids=[run_id]).get(run_id, {})
    reported = [index for index in range(len(batches)) if states.get(f"report_{index}") == "success"]
    others = [index for index in range(len(batches)) if index not in reported]
    outcomes: list[FileOutcome] = pull("report", reported)
    untold: list[SubmittedFile] = pull("register", others) + pull("register", others, REFUSED)
    if untold:
        with open_dag_ledger() as ledger:
            outcomes += [
                in_transaction(ledger, explain_outcome, file, allowed_share(params)) for file in untold
            ]
    sum_up([path for batch in batches for path in batch], outcomes)


@task_group(prefix_group_id=False)
def files(batch: Any) -> None:
    """The stages of one file, or of several where there are many."""
    registered: Any = register(batch=batch)
    waits = [
        WaitForStage(
            task_id=stage, stage=stage, files=registered, map_index_template="{{ name_files(task.files) }}"
        )
        for stage in (EXTRACT, MERGE, VALIDATE)
    ]
    registered >> waits[0] >> waits[1] >> waits[2] >> report(files=registered)


def allowed_share(params: dict[str, Any]) -> float:
    """The share of a file's records that may fail: the form's, or else the configured one."""
    share = params["max_failed_share"]
    return load_settings().max_failed_share if share is None else float(share)


def name_files(files: list[SubmittedFile]) -> str:
    return name_batch([file["path"] for file in files])


@dag(
    dag_id=DAG_ID,
    description="Extracts, merges and validates FastESM2 features of the inbox's FASTA files.",
    doc_md=ABOUT,
    schedule="0 2 * * *",
    catchup=False,
    max_active_runs=4,
    params=PARAMS,
    default_args=RETRIES,
    deadline=make_deadline(),
    on_failure_callback=tell_failed,
    user_defined_macros={"name_batch": name_batch, "name_files": name_files},
    tags=["virnucpro"],
)
def virnucpro_ingest() -> None:
    batches: Any = find_files()
    files.expand(batch=batches) >> summary(batches)


DAG = virnucpro_ingest()
