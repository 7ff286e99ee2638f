"""The command line without services: help, exit codes, messages, and the commands on files."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import typer

from virnucpro_core import errors
from virnucpro_core.cli.application import EXIT_CODES, app
from virnucpro_core.embedding import selftest
from virnucpro_core.errors import VirnucproError
from virnucpro_core.features.exports import write_pt

if TYPE_CHECKING:
    from tests.fixtures_command import Completed

    Command = Callable[..., Completed]

pytestmark = pytest.mark.unit
pytest_plugins = ["tests.fixtures_command"]

HEAVY = {"torch", "transformers", "sqlalchemy", "alembic", "airflow", "celery", "huggingface_hub", "numpy"}

RUN_MAIN = "from virnucpro_core.cli import main; main()"


def run_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        timeout=120,
    )


@pytest.fixture
def proteins(tmp_path: Path, make_proteins: Callable[..., list[str]]) -> Path:
    """Three good records, one without residues."""
    first, second, third = make_proteins(30, 64, 50)
    path = tmp_path / "proteins.fasta"
    path.write_text(f">a one\n{first}\n>b\n{second}\n>empty\n>c\n{third}\n")
    return path


@pytest.fixture
def result(virnucpro: Command, proteins: Path, demo_checkpoint: Path, tmp_path: Path) -> Path:
    """What `extract` made of `proteins`."""
    out = tmp_path / "out" / "proteins_ESM.pt"
    assert virnucpro("extract", proteins, "-o", out, "--model", demo_checkpoint).code == 0
    return out


def walk_commands(command: object, name: str = "virnucpro") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for part, inner in getattr(command, "commands", {}).items():
        yield from walk_commands(inner, f"{name} {part}")
    if not hasattr(command, "commands"):
        assert isinstance(command, typer.core.TyperCommand)
        yield name, command


COMMANDS = dict(walk_commands(typer.main.get_command(app)))


def test_help_imports_nothing_heavy() -> None:
    loaded = f"""
import sys
try:
    {RUN_MAIN.replace("; ", chr(10) + "    ")}
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""
    ended = subprocess.run(
        [sys.executable, "-c", loaded, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "Exit codes" in ended.stdout
    modules = set(ended.stderr.split())
    assert "typer" in modules
    assert modules & HEAVY == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str, virnucpro: Command) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.name == "help", parameter.name
    assert virnucpro(*name.split()[1:], "--help").code == 0


def test_version_is_that_of_the_package(virnucpro: Command) -> None:
    ended = virnucpro("--version")
    assert (ended.code, ended.out) == (0, f"virnucpro {version('virnucpro-pipeline')}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_cuts_no_word_on_80_columns(
    name: str, virnucpro: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = virnucpro(*name.split()[1:], "--help").out
    assert "…" not in told
    assert not re.search(r"<[\w|]+\s", told), "a type goes on in the next line"


def test_every_error_has_a_documented_exit_code(virnucpro: Command) -> None:
    classes = [found for found in vars(errors).values() if isinstance(found, type)]
    codes = {found.exit_code for found in classes if issubclass(found, VirnucproError)}
    assert codes <= set(EXIT_CODES)
    told = virnucpro("--help").out
    assert all(f"{code}: {meaning}" in told for code, meaning in EXIT_CODES.items())


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("extract",), ("extract", "a.fasta", "-o", "b"), ("status", "x")]
)
def test_wrong_command_line_exits_with_2(arguments: tuple[str, ...], virnucpro: Command) -> None:
    ended = virnucpro(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err


def test_error_is_one_message_without_traceback(tmp_path: Path) -> None:
    missing = tmp_path / "missing.fasta"
    ended = run_process("extract", missing, "-o", tmp_path / "out.pt", "--model", tmp_path / "nothing")
    assert ended.returncode == 4
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("error: there is no model")
    assert lines[1].startswith("  where: ")
    assert lines[2].startswith("  to do: ")
    assert len(lines) == 3


def test_wrong_setting_is_named(virnucpro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRNUCPRO_CHUNK_TOKENS", "many")
    ended = virnucpro("status")
    assert ended.code == 2
    assert "VIRNUCPRO_CHUNK_TOKENS" in ended.err


def test_commands_on_jobs_need_a_ledger(virnucpro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for role in ("", "OWNER_", "DAG_", "WORKER_"):
        monkeypatch.delenv(f"VIRNUCPRO_{role}DATABASE_URL", raising=False)
    for arguments in (("status",), ("verify", "1"), ("weights", "show"), ("db", "upgrade")):
        ended = virnucpro(*arguments)
        assert ended.code == 2, arguments
        assert "no database is named" in ended.err


def test_submit_refuses_one_nucleotide_file_for_two_inputs(virnucpro: Command, proteins: Path) -> None:
    ended = virnucpro("submit", proteins, proteins, "--nucleotides", proteins)
    assert ended.code == 2
    assert "pair by pair" in ended.err


def test_extract_writes_a_result_that_validate_accepts(
    virnucpro: Command, proteins: Path, demo_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new folder" / "proteins_ESM.pt"
    told = virnucpro("extract", proteins, "-o", out, "--model", demo_checkpoint, "--json").json()
    assert (told["records"], told["embeddings"], told["failures"]) == (4, 3, {"empty": 1})
    assert told["demonstration"] is True
    assert told["path"] == str(out)
    content = torch.load(out, weights_only=True)
    assert content["proteins"] == ["a", "b", "c"]
    failure = json.loads(Path(told["failures_path"]).read_text())
    assert (failure["record"], failure["id"], failure["reason"]) == (3, "empty", "empty")
    ended = virnucpro("validate", out)
    assert ended.code == 0
    assert ended.out == f"[PASS] {out}: 3 rows, checksum as in its manifest\n"


def test_residues_strict_fails_what_unknown_accepts(
    virnucpro: Command, demo_checkpoint: Path, tmp_path: Path
) -> None:
    fasta = tmp_path / "j.fasta"
    fasta.write_text(">a\nMKVJ\n>b\nMKV\n")
    counts = []
    for policy in ("unknown", "strict"):
        out = tmp_path / f"{policy}.pt"
        told = virnucpro(
            "extract", fasta, "-o", out, "--model", demo_checkpoint, "--residues", policy, "--json"
        ).json()
        counts.append((told["embeddings"], told["failures"], told["unknown"]))
        assert json.loads(Path(f"{out}.json").read_text())["recipe"]["residues"] == policy
    assert counts == [(2, {}, 1), (1, {"invalid_residue": 1}, 0)]


def read_to_the_end(leader: int) -> str:
    """What is written to a terminal until its other side is closed."""
    seen = b""
    with suppress(OSError):  # how Linux says that it is
        while part := os.read(leader, 100_000):
            seen += part
    return seen.decode()


def test_progress_is_shown_only_on_a_terminal(proteins: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["extract", proteins, "-o", tmp_path / "x.pt", "--model", demo_checkpoint]
    piped = run_process(*arguments)
    assert (piped.returncode, piped.stderr) == (0, "")
    leader, follower = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        # Read all the while: a terminal holds a few thousand bytes, and then its writer waits.
        reading = pool.submit(read_to_the_end, leader)
        ended = subprocess.run(
            [sys.executable, "-c", RUN_MAIN, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=follower,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
            check=True,
            timeout=120,
        )
        os.close(follower)
        seen = reading.result()
    os.close(leader)
    assert "embedding proteins.fasta" in seen
    assert b"embedding proteins.fasta" not in ended.stdout


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows: rows[1].fill_(float("nan")), "b: NaN"),
        (lambda rows: rows[0].fill_(float("inf")), "a: Inf"),
        (lambda rows: rows[2].zero_(), "c: all zero"),
    ],
    ids=["nan", "inf", "zeros"],
)
def test_validate_finds_bad_rows(
    damage: Callable[[list[torch.Tensor]], object], said: str, result: Path, virnucpro: Command
) -> None:
    content = torch.load(result, weights_only=True)
    damage(content["data"])
    bad = result.with_name("bad_ESM.pt")
    write_pt(bad, content["proteins"], torch.stack(content["data"]).numpy())
    ended = virnucpro("validate", result, bad)
    assert ended.code == 6
    assert f"[FAIL] {bad}: {said}" in ended.out
    assert f"[PASS] {result}" in ended.out


def test_validate_finds_a_flipped_byte(result: Path, virnucpro: Command) -> None:
    data = bytearray(result.read_bytes())
    data[len(data) // 2] ^= 1
    result.write_bytes(data)
    ended = virnucpro("validate", result, "--json")
    assert ended.code == 6
    (verdict,) = json.loads(ended.out)
    assert verdict["passed"] is False
    assert verdict["errors"]


def test_validate_says_when_there_is_no_manifest(result: Path, virnucpro: Command) -> None:
    result.with_name(f"{result.name}.json").unlink()
    assert "no manifest to compare" in virnucpro("validate", result).out


def test_validate_takes_a_name_that_leaves_no_room_for_a_manifests(result: Path, virnucpro: Command) -> None:
    long = result.rename(result.with_name("n" * 255))
    assert "no manifest to compare" in virnucpro("validate", long).out


def test_validate_finds_the_manifest_of_a_published_result(result: Path, virnucpro: Command) -> None:
    manifest = result.with_name("proteins.manifest.json")
    result.with_name(f"{result.name}.json").rename(manifest)
    (verdict,) = virnucpro("validate", result, "--json").json()
    assert verdict["manifest"] == str(manifest)


def test_merge_joins_two_files_and_refuses_others(result: Path, virnucpro: Command) -> None:
    nucleotides = result.with_name("proteins_DNABERT_S.pt")
    merged = result.with_name("proteins_merged.pt")

    def write(ids: list[str]) -> None:
        entries = [{"label": id_, "mean_representation": [float(k)] * 768} for k, id_ in enumerate(ids)]
        torch.save({"nucleotide": ids, "data": entries}, nucleotides)

    write(["a", "b", "c"])
    told = virnucpro("merge", nucleotides, result, "-o", merged, "--label", "viral", "--json").json()
    assert told["rows"] == 3
    content = torch.load(merged, weights_only=True)
    assert (content["ids"], content["data"].shape, content["labels"]) == (["a", "b", "c"], (3, 2048), [1])
    write(["a", "x", "c"])
    ended = virnucpro("merge", nucleotides, result, "-o", merged)
    assert ended.code == 6
    assert "'x'" in ended.err


def test_demonstration_weights_say_that_they_are_random(virnucpro: Command, tmp_path: Path) -> None:
    ended = virnucpro("weights", "demo", tmp_path / "random", "--layers", 1, "--json")
    assert "RANDOM" in ended.err
    told = ended.json()
    assert (told["layers"], told["demonstration"], told["selftest"]) == (1, True, "not run")
    assert virnucpro("weights", "show", tmp_path / "random", "--json").json() == told


def test_fetch_refuses_a_branch(virnucpro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = virnucpro("weights", "fetch", "Synthyra/FastESM2_650", "--revision", "main")
    assert ended.code == 4
    assert "not pinned" in ended.err


def test_what_the_hub_says_is_told_once(virnucpro: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s")
        raise OSError("the Hub is out of reach")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    ended = virnucpro("weights", "fetch", "Synthyra/FastESM2_650", "--revision", "0" * 40)
    assert (ended.code, ended.err.count("Retrying in 8s")) == (4, 1), ended.err
    assert "the Hub is out of reach" in ended.err


def test_selftest_passes_eleven_checks_and_keeps_the_verdict(
    virnucpro: Command, demo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = shutil.copytree(demo_checkpoint, tmp_path / "checkpoint")
    ended = virnucpro("selftest", "--model", checkpoint, "--device", "cpu")
    lines = ended.out.splitlines()
    assert ended.code == 0, ended.out
    assert len(lines) == 11
    assert all(line.startswith("[PASS] ") for line in lines)
    assert virnucpro("weights", "show", checkpoint, "--json").json()["selftest"] == "float32 passed"

    monkeypatch.setitem(selftest.LIMITS, "float32", 0.0)
    ended = virnucpro("selftest", "--model", checkpoint, "--device", "cpu", "--json")
    assert ended.code == 1
    assert [check["passed"] for check in json.loads(ended.out)["checks"]].count(False) == 1
    assert virnucpro("weights", "show", checkpoint, "--json").json()["selftest"] == "float32 FAILED"


@pytest.mark.parametrize("arguments", [("relay",), ("worker", "--gpus", "none")])
def test_services_become_their_own_program(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Without a ledger they end at once, with the exit code and the log line of the worker's own modules."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("VIRNUCPRO_")}
    ended = subprocess.run(
        [sys.executable, "-c", RUN_MAIN, *arguments],
        capture_output=True,
        text=True,
        env=bare | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        cwd=tmp_path,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 2
    assert f"{arguments[0]}_cannot_start" in ended.stdout + ended.stderr
