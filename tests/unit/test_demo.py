"""How `make run` follows its run: for as long as there is progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from rich.console import Console

from virnucpro_core.errors import InputError, NucleotideInputError, ServiceError
from virnucpro_core.settings import load_settings
from virnucpro_core.stack import demo

pytestmark = pytest.mark.unit

Follow = Callable[..., str]
LOOKS = 40


def job(**columns: Any) -> SimpleNamespace:
    """A job as the ledger shows it."""
    shown = {"id": 1, "state": "running", "stage": "extract", "chunks_left": 9, "records": 90}
    return SimpleNamespace(**shown | {"embeddings": 0, "failed": 0} | columns)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Follows a run that ends after `LOOKS` looks, with fakes of Airflow and of the ledger, on no standstill at all."""

    def run(jobs: Iterator[SimpleNamespace | None]) -> str:
        states = iter(["running"] * (LOOKS - 1) + ["success"])
        answers = httpx.MockTransport(lambda _: httpx.Response(200, json={"state": next(states)}))
        monkeypatch.setattr(demo, "POLL_SECONDS", 0)
        monkeypatch.setattr(demo, "find_demo_job", lambda ledger, sha256: next(jobs))
        console = Console(file=StringIO())
        with httpx.Client(transport=answers, base_url="http://airflow") as airflow:
            return demo.follow(airflow, "one", None, "a" * 64, console, standstill_seconds=0)  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("column", ["embeddings", "failed", "chunks_left"])
def test_a_run_may_take_any_time_while_there_is_progress(follow: Follow, column: str) -> None:
    assert follow(job(**{column: number}) for number in range(LOOKS)) == "success"


def test_a_job_that_appears_and_changes_stage_and_state_is_progress(follow: Follow) -> None:
    merging = job(stage="merge")
    ways = [None, job(), merging, job(stage="validate"), job(stage="validate", state="succeeded")]
    assert follow(ways[look % len(ways)] for look in range(LOOKS)) == "success"


@pytest.mark.parametrize("seen", [None, job(embeddings=5)])
def test_standstill_is_an_error(follow: Follow, seen: SimpleNamespace | None) -> None:
    with pytest.raises(ServiceError, match=r"no progress for 0 s \[one\]"):
        follow(seen for _ in range(LOOKS))


def test_why_a_job_failed_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the input has changed [/in/a.fasta]. Submit it again."
    monkeypatch.setattr(demo, "find_demo_job", lambda ledger, sha256: job(state="failed", error=why))
    told = StringIO()
    code = demo.summarise(None, Path("a.fasta"), "a" * 64, "failed", 0.0, Console(file=told, width=20))  # type: ignore[arg-type]
    assert (code, why in told.getvalue()) == (1, True)


def test_an_airflow_that_does_not_answer_is_said_in_words(tmp_path: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("timed out", request=request)

    with (
        httpx.Client(transport=httpx.MockTransport(refuse), base_url="http://airflow") as airflow,
        pytest.raises(ServiceError, match=r"(?s)does not answer: timed out.*api-server\.log.*run this again"),
        demo.answering_airflow(tmp_path),
    ):
        demo.trigger(airflow, tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [(b">a\n" + b"ACGT" * 30, NucleotideInputError), (b"", InputError), (None, InputError)],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_is_started(
    content: bytes | None, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load_settings", load_settings.__wrapped__)
    fasta = tmp_path / "input.fasta"
    if content is not None:
        fasta.write_bytes(content)
    with pytest.raises(error):
        demo.run_demo(fasta, state_folder=tmp_path / "state", console=Console(file=StringIO()))
    assert {path.name for path in tmp_path.iterdir()} <= {fasta.name}
