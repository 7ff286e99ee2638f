"""Bad input gets a clear error: which file, which line, which setting; and no record is lost."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from sqlalchemy import make_url

from virnucpro_core.features.exports import read_pt
from virnucpro_core.ledger.work import result_folder
from virnucpro_core.stack.processes import LOOPBACK, choose_port

if TYPE_CHECKING:
    from tests.fixtures_command import Completed
    from tests.fixtures_pipeline import Pipeline

    Command = Callable[..., Completed]

pytestmark = pytest.mark.integration
pytest_plugins = ["tests.fixtures_pipeline", "tests.fixtures_command"]

MODEL = "tiny"
PASSWORD = "not-the-password"


class BadFile(NamedTuple):
    """A file that cannot be used as a whole, what is said of it, and the line that is named."""

    content: bytes
    said: str
    line: str


BAD_FILES = {
    "empty": BadFile(b"", "the file is empty", "line 1"),
    "blank": BadFile(b"\n \n", "no FASTA", "line 3"),
    "no-fasta": BadFile(b"id\tsequence\n1\tMKV\n", "no FASTA", "line 1"),
    "binary": BadFile(bytes(range(256)) * 40, "binary", "line 1"),
    "cut-off-gzip": BadFile(gzip.compress(b">a\nMKVLA\n" * 1000)[:-20], "cut off", "line "),
    "text-before-the-first-header": BadFile(b"\nMKV\n>a\nMKV\n", "before the first header", "line 2"),
    "nucleotides": BadFile(b">a\n" + b"ACGTTGCATGCA" * 30 + b"\n", "nucleotides", "line 1"),
}

GOOD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
MIXED = b"".join(
    (
        f">first of all\n{GOOD}\n".encode(),
        f">\n{GOOD}\n".encode(),
        b">empty\n",
        b">nul\nMK\0VL\n",
        b">latin\xe9 header\nMKVL\n",
        f">twin\n{GOOD[:20]}\n".encode(),
        b">digit\nMK1VL\n",
        b">five_megabytes\n" + b"MKVLAGIC" * 655_360 + b"\n",
        f">twin\r\n{GOOD[5:]}\r\n".encode(),
        b">only_a_star\n*\n",
        f">last\n{GOOD.lower()}*".encode(),
    )
)
MIXED_IDS = ["first", "twin", "five_megabytes", "twin", "last"]
MIXED_FAILURES = [
    (2, "", "no_id"),
    (3, "empty", "empty"),
    (4, "nul", "invalid_residue"),
    (5, "latin\\xe9", "bad_header"),
    (7, "digit", "invalid_residue"),
    (10, "only_a_star", "empty"),
]


@pytest.fixture
def unused_port() -> int:
    """A port that nobody listens on."""
    return choose_port()


def run_service(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A service, in this test's environment, that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-c", "from virnucpro_core.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def assert_one_message(ended: Completed, code: int, *said: str) -> None:
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for words in said:
        assert words in ended.err


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_file_is_named_with_its_line(
    name: str, pipeline: Pipeline, virnucpro: Command, tmp_path: Path
) -> None:
    bad = BAD_FILES[name]
    path = tmp_path / f"{name}.fasta"
    path.write_bytes(bad.content)
    out = tmp_path / "out.pt"
    for arguments in (("extract", path, "-o", out, "--model", MODEL), ("submit", path, "--model", MODEL)):
        assert_one_message(virnucpro(*arguments), 3, bad.said, str(path), bad.line, "to do: ")
    assert not out.exists()
    assert pipeline.rows("SELECT 1 FROM inputs") == []
    assert list(pipeline.settings.output_root.rglob("*.fasta")) == []


def test_missing_file_and_folder_are_named(pipeline: Pipeline, virnucpro: Command, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "missing.fasta", "no such file"), (tmp_path, "a folder")):
        for command in (("extract", "-o", tmp_path / "out.pt"), ("submit",)):
            ended = virnucpro(command[0], path, *command[1:], "--model", MODEL)
            assert_one_message(ended, 3, said, str(path))


def test_name_that_is_not_utf8_is_refused(pipeline: Pipeline, virnucpro: Command, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.fasta"))
    path.write_text(f">a\n{GOOD}\n")
    assert_one_message(virnucpro("submit", path, "--model", MODEL), 3, "not UTF-8", "caf")


def test_nucleotides_are_taken_if_a_person_insists(
    pipeline: Pipeline, virnucpro: Command, tmp_path: Path
) -> None:
    path = tmp_path / "reads.fasta"
    path.write_bytes(BAD_FILES["nucleotides"].content)
    insisting = ("--model", MODEL, "--allow-nucleotides", "--json")
    assert virnucpro("extract", path, "-o", tmp_path / "out.pt", *insisting).json()["embeddings"] == 1
    assert virnucpro("submit", path, *insisting).json()[0]["created"] is True


def test_every_record_of_a_mixed_file_is_an_embedding_or_a_failure(
    pipeline: Pipeline, virnucpro: Command, tmp_path: Path
) -> None:
    path = tmp_path / "mixed.fasta"
    path.write_bytes(MIXED)

    # by itself
    out = tmp_path / "mixed_ESM.pt"
    told = virnucpro("extract", path, "-o", out, "--model", MODEL, "--json").json()
    assert (told["records"], told["embeddings"], told["truncated"]) == (11, 5, 1)
    ids, rows = read_pt(out)
    assert ids == MIXED_IDS
    failures = [json.loads(line) for line in Path(told["failures_path"]).read_text().splitlines()]
    assert [(f["record"], f["id"], f["reason"]) for f in failures] == MIXED_FAILURES
    assert all(failure["detail"] for failure in failures)

    # as a job
    pipeline.start_relay()
    pipeline.start_workers()
    submitted = ("submit", path, "--model", MODEL, "--wait", "--max-failed-share", 1)
    (told,) = virnucpro(*submitted, "--json").json()
    assert (told["state"], told["embeddings"], told["failed"]) == ("succeeded", 5, 6)
    failures = virnucpro("failures", told["job"], "--json").json()
    assert [(f["record"], f["id"], f["reason"]) for f in failures] == MIXED_FAILURES
    job = pipeline.job(told["job"])
    folder = pipeline.settings.output_root / result_folder(job.stem, job.input_sha256, job.recipe_sha256)
    published_ids, published_rows = read_pt(folder / "mixed_ESM.pt")
    assert published_ids == ids
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(rows, published_rows, strict=True))


@pytest.mark.parametrize("target", ["a_file/out.pt", "a_folder", "a_file/deep/out.pt", "n" * 241, "n" * 256])
def test_unwritable_output_is_told_before_any_work(target: str, virnucpro: Command, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    fasta = tmp_path / "a.fasta"
    fasta.write_text(f">a\n{GOOD}\n")
    ended = virnucpro(
        "extract", fasta, "-o", tmp_path / target, "--model", tmp_path / "no model is looked for"
    )
    assert_one_message(ended, 6, str(tmp_path / target))


@pytest.mark.parametrize("fault", ["no config", "no weights", "half the weights", "config is not JSON"])
def test_incomplete_model_is_refused(
    fault: str, pipeline: Pipeline, virnucpro: Command, small_fasta: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "incomplete"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((pipeline.settings.model_root / MODEL / name).read_bytes())
    config, weights = folder / "config.json", folder / "model.safetensors"
    match fault:
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "half the weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case _:
            config.write_text("{")
    out = tmp_path / "out.pt"
    assert_one_message(virnucpro("extract", small_fasta, "-o", out, "--model", folder), 4, str(folder))
    assert_one_message(virnucpro("selftest", "--model", folder), 4, str(folder))
    assert_one_message(virnucpro("weights", "add", "incomplete", folder), 4, str(folder))
    assert not out.exists()
    assert [row.name for row in pipeline.rows("SELECT name FROM models")] == [MODEL]


def test_database_is_down(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, unused_port: int
) -> None:
    url = f"postgresql://someone:{PASSWORD}@{LOOPBACK}:{unused_port}/ledger"
    pipeline.configure(owner_database_url=url, dag_database_url=url, worker_database_url=url)
    model = pipeline.settings.model_root / MODEL
    commands = (
        ("status",),
        ("submit", small_fasta, "--model", MODEL),
        ("weights", "add", "x", model),
        ("db", "upgrade"),
    )
    for arguments in commands:
        ended = virnucpro(*arguments)
        assert_one_message(ended, 5, "PostgreSQL cannot be used", f":{unused_port}/ledger")
        assert PASSWORD not in ended.err
    for service in (("relay",), ("worker", "--gpus", "none")):
        stopped = run_service(*service)
        assert stopped.returncode == 5
        assert "PostgreSQL cannot be used" in stopped.stdout + stopped.stderr
        assert PASSWORD not in stopped.stdout + stopped.stderr


def test_database_refuses_the_password(pipeline: Pipeline, virnucpro: Command) -> None:
    right = make_url(os.environ["VIRNUCPRO_DAG_DATABASE_URL"])
    wrong = right.set(password=PASSWORD).render_as_string(hide_password=False)
    pipeline.configure(dag_database_url=wrong, worker_database_url=wrong)
    ended = virnucpro("status")
    assert_one_message(ended, 5, "refused the password", str(right.database))
    assert PASSWORD not in ended.err
    stopped = run_service("relay")
    assert stopped.returncode == 5
    assert "refused the password" in stopped.stdout + stopped.stderr


def test_role_that_may_not_is_told_so(
    pipeline: Pipeline,
    virnucpro: Command,
    small_fasta: Path,
    demo_checkpoint: Path,
    database_urls: dict[str, str],
) -> None:
    dag, worker = (os.environ[f"VIRNUCPRO_{role}_DATABASE_URL"] for role in ("DAG", "WORKER"))
    pipeline.configure(owner_database_url=dag, dag_database_url=worker)
    for arguments in (
        ("weights", "add", "other", demo_checkpoint),
        ("submit", small_fasta, "--model", MODEL),
    ):
        assert_one_message(virnucpro(*arguments), 5, "does not let this role", "permission denied for table")
    pipeline.configure(owner_database_url=database_urls["dag"])
    assert_one_message(virnucpro("db", "upgrade"), 5, "permission denied for schema", "virnucpro_dag")


def test_migrations_have_not_been_applied(
    pipeline: Pipeline, virnucpro: Command, small_fasta: Path, database_urls: dict[str, str]
) -> None:
    pipeline.configure(**{f"{role}_database_url": url for role, url in database_urls.items()})
    for arguments in (("status",), ("submit", small_fasta, "--model", MODEL), ("verify", 1)):
        assert_one_message(virnucpro(*arguments), 5, "revision none", "virnucpro db upgrade")
    stopped = run_service("relay")
    assert stopped.returncode == 5
    assert "virnucpro db upgrade" in stopped.stdout + stopped.stderr


@pytest.mark.parametrize("fault", ["down", "wrong password"])
def test_broker_cannot_be_used(
    fault: str, pipeline: Pipeline, virnucpro: Command, broker_url: str, unused_port: int
) -> None:
    right = make_url(broker_url)
    wrong = right.set(port=unused_port) if fault == "down" else right.set(password=PASSWORD)
    pipeline.configure(broker_url=wrong.render_as_string(hide_password=False))
    for service in (("relay",), ("worker", "--gpus", "none")):
        stopped = run_service(*service)
        told = stopped.stdout + stopped.stderr
        assert stopped.returncode == 5, told
        assert ("cannot be reached" if fault == "down" else "refused the password") in told
        assert PASSWORD not in told
    # what needs no broker works
    assert virnucpro("status", "--json").json() == []
