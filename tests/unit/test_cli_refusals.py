"""The command line where the system, a setting or a wish is at fault: words and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest
from pydantic import SecretStr

from virnucpro_core.cli.output import print_error, print_table
from virnucpro_core.errors import ServiceError, SettingsError
from virnucpro_core.ledger.submissions import find_nucleotides
from virnucpro_core.settings import Settings

if TYPE_CHECKING:
    from tests.fixtures_command import Completed

    Command = Callable[..., Completed]

pytestmark = pytest.mark.unit
pytest_plugins = ["tests.fixtures_command"]

MAIN = [sys.executable, "-c", "from virnucpro_core.cli import main; main()"]


def run_into(output: IO[str] | int, *arguments: str) -> tuple[int, str]:
    """The exit code and what stderr says of a command whose standard output goes there."""
    ended = subprocess.run(
        [*MAIN, *arguments], stdout=output, stderr=subprocess.PIPE, text=True, check=False, timeout=60
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("validate", "missing.pt")])
def test_output_that_cannot_be_written_is_said_in_words(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        code, told = run_into(full, *arguments)
    assert (code, told.splitlines()[:2]) == (
        6,
        ["error: the system refuses to go on: No space left on device", "  where: standard output"],
    )
    assert len(told.splitlines()) == 3, told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_is_utf_8_wherever_it_is_written(encoding: str) -> None:
    """An id or a name that a terminal's encoding lacks would end a list of failures in its middle."""
    name = "caf\xe9 \u540d \U0001f9ec.pt"
    ended = subprocess.run(
        [*MAIN, "validate", name, b"\xff.pt", "--json"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr.decode()) == (6, "")
    assert [found["path"] for found in json.loads(ended.stdout)] == [name, "\udcff.pt"]


def test_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run_into(writing, "validate", "missing.pt") == (1, "")
    finally:
        os.close(writing)


def test_folder_of_somebody_else_is_named(virnucpro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("virnucpro_core.stack.stack.make_private_folder", refuse)
    ended = virnucpro("up", "--gpus", "none")
    assert ended.code == 6
    assert "Permission denied" in ended.err
    assert ".virnucpro" in ended.err


@pytest.mark.parametrize("place", [".virnucpro", "output", "models/below"])
def test_file_in_place_of_a_folder_is_named(
    place: str, virnucpro: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(place.split("/")[0]).touch()
    monkeypatch.setenv("VIRNUCPRO_MODEL_ROOT", "models/below")
    ended = virnucpro("up", "--gpus", "none")
    assert (ended.code, len(ended.err.splitlines())) == (6, 3), ended.err
    assert place in ended.err


def test_current_folder_that_is_gone_is_said(virnucpro: Command) -> None:
    Path.cwd().rmdir()
    ended = virnucpro("status")
    assert (ended.code, "there is no current folder" in ended.err) == (2, True)


@pytest.mark.parametrize("place", ["host:port/db", "[::1/db", "host@more/db"])
def test_url_that_cannot_be_read_is_refused_and_not_shown(
    place: str, virnucpro: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRNUCPRO_DAG_DATABASE_URL", f"postgresql://me:hidden@{place}")
    ended = virnucpro("status")
    assert (ended.code, "URL cannot be read" in ended.err) == (2, True)
    assert "hidden" not in ended.err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:hidden@127.0.0.1:1/db?unknown=1", 'invalid connection option "unknown"'),
        ("postgresql://me@127.0.0.1:1/db?password=hidden", "Connection refused"),
    ],
)
def test_url_that_leads_nowhere_is_shown_without_its_password(
    url: str, said: str, virnucpro: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRNUCPRO_DAG_DATABASE_URL", url)
    ended = virnucpro("status")
    assert (ended.code, said in ended.err, "hidden" in ended.err) == (5, True, False), ended.err


@pytest.mark.parametrize("url", ["hidden", "redis://:hidden@host:port/0", "redis://:hid/den@host/0"])
def test_broker_url_that_cannot_be_read_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(SettingsError, match="broker's URL cannot be read") as refused:
        Settings(broker_url=SecretStr(url)).require_broker_url()
    assert "hid" not in str(refused.value)


def test_output_that_is_no_regular_file_is_left_alone(virnucpro: Command, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ended = virnucpro("merge", "a.pt", "b.pt", "-o", pipe)
    assert (ended.code, "no regular file" in ended.err) == (6, True)
    assert pipe.is_fifo()


def test_extract_does_not_replace_its_input(virnucpro: Command, tmp_path: Path) -> None:
    (fasta := tmp_path / "in.fasta").write_text(">a\nMKV\n")
    ended = virnucpro("extract", fasta, "-o", tmp_path / "." / "in.fasta", "--model", tmp_path / "missing")
    assert (ended.code, "would replace its own input" in ended.err) == (2, True), ended.err
    assert fasta.read_text() == ">a\nMKV\n"


def test_two_forms_at_once_are_refused(virnucpro: Command) -> None:
    ended = virnucpro("failures", "1", "--csv", "--json")
    assert (ended.code, "not both" in ended.err) == (2, True)


def test_down_without_a_stack_says_so(virnucpro: Command) -> None:
    ended = virnucpro("down")
    assert (ended.code, "no stack runs from this folder" in ended.err) == (5, True)


def test_stack_refuses_gpus_that_are_not_there_before_it_starts_anything(virnucpro: Command) -> None:
    ended = virnucpro("up", "--gpus", "some")
    assert (ended.code, "--gpus cannot be 'some'" in ended.err) == (2, True)
    assert "starting" not in ended.err


def test_folder_without_a_name_has_no_nucleotides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_nucleotides(Path()) is None


def test_log_in_an_error_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ServiceError("it ended; its log ends:\none\x1b[2J\nerror: two", todo="Read it."))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "error: it ended; its log ends:",
        "    one\\x1b[2J",
        "    error: two",
        "  to do: Read it.",
    ]


def test_table_is_not_folded_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "20")
    print_table(("state", "created at"), [("succeeded", "2026-11-23 07:25:27")])
    assert "succeeded  2026-11-23 07:25:27" in capsys.readouterr().out
