"""The command `explain`: one record's story."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from virnucpro_core.cli.connections import connect
from virnucpro_core.cli.jobs import PANEL, JobArgument
from virnucpro_core.cli.output import AsJson, format_value, print_facts, print_json, print_note, print_table
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from virnucpro_core.ledger.setbacks import Attempt
    from virnucpro_core.stories import RecordStory

MOST_STORIES = 20  # of records that share an id

ATTEMPT_COLUMNS = (
    "attempt",
    "outcome",
    "records",
    "worker",
    "node",
    "host",
    "device",
    "claimed",
    "ended",
    "error",
)


def add_commands(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL)(explain)


def explain(
    job: JobArgument,
    record: Annotated[
        str,
        typer.Argument(
            metavar="RECORD", help="The record's number, as `virnucpro failures` lists it, or its id."
        ),
    ],
    is_id: Annotated[
        bool, typer.Option("--id", help="RECORD is an id, even if it looks like a number.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what became of one record: its chunk, the attempts, the workers, its failure or row, the recipe.

    Digits are a number if the job has that many records, anything else is an id. Records that share an id are all
    told of, up to 20. What is told is of the job's current generation; a claim that a worker declined is no attempt
    and is not kept.
    """
    from virnucpro_core.records import look_up_records
    from virnucpro_core.stories import tell_story

    settings = load_settings()
    with connect() as ledger:
        found = look_up_records(ledger, settings, job, record, as_id=is_id)
        stories = [tell_story(ledger, settings, job, number) for number in found[:MOST_STORIES]]
    if as_json:
        print_json([asdict(story) for story in stories])
        return
    for place, story in enumerate(stories):
        if place:
            print()
        print_story(story)
    if len(found) > len(stories):
        print_note(f"{len(found):,} records have this id; the first {len(stories)} are told of.")


def print_story(story: RecordStory) -> None:
    """Print a story, what matters most first."""
    chunk, seen = story.chunk, story.in_input
    print_facts(
        {
            "record": f"{story.record:,} of job {story.job} ({story.stem}), generation {story.generation}",
            "id": story.id,
            "outcome": describe_outcome(story),
            "row": None if story.row is None else f"{story.row:,} of the result, counted from 0",
        }
    )
    for place in story.places:
        print_facts({"  in": f"{load_settings().output_root / place.path}, row {place.row:,}"})
    print_facts(
        {
            "residues": seen
            and f"{seen.residues:,}, computed {seen.computed:,}, of these {seen.unknown:,} as <unk>",
            "chunk": f"{chunk.number:,} of {chunk.chunks:,}, {chunk.state} (id {chunk.id}): records "
            f"{chunk.first_record:,} to {chunk.first_record + chunk.records - 1:,}",
            "  setback": chunk.setback,
            "job": story.job_state,
            "model": story.model,
            "recipe": list_settings(story.recipe),
            "run as": story.execution and list_settings(story.execution),
        }
    )
    if story.attempts:
        print_table(ATTEMPT_COLUMNS, [describe_attempt(attempt) for attempt in story.attempts])
    else:
        print("No worker has claimed it yet.")
    for what in story.untold:
        print_note(f"Not told: {what}")


def list_settings(settings: Mapping[str, object]) -> str:
    """`dtype float32, threads 2`; what holds nothing is left out."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in settings.items() if value != "")


def describe_outcome(story: RecordStory) -> str:
    if story.failure is not None:
        return f"failed, {story.failure.reason}: {story.failure.detail}"
    if story.outcome == "stopped":
        return f"stopped: the job is {story.job_state}; `virnucpro retry {story.job}` goes on with it"
    return story.outcome


def describe_attempt(attempt: Attempt) -> list[object]:
    last = attempt.first_record + attempt.records - 1
    return [
        attempt.attempt,
        attempt.outcome.replace("_", " "),
        f"{attempt.first_record}-{last}",
        attempt.worker,
        attempt.node,
        attempt.host,
        attempt.device,
        attempt.claimed_at,
        attempt.ended_at,
        attempt.error,
    ]
