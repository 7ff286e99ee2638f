"""The inbox: which files are found there, in which batches, and what becomes of those that cannot be read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from structlog.testing import capture_logs

from dags import virnucpro_ingest as ingest
from dags.inbox import BATCHES, find_inputs, make_batches, name_batch
from tests.dag_tasks import FORM, register, write_fasta
from virnucpro_core.errors import SettingsError

pytest_plugins = ["tests.fixtures_dags"]

pytestmark = pytest.mark.integration

MAX_MAP_LENGTH = 1024  # Airflow's default of [core] max_map_length


@settings(max_examples=30)
@given(st.integers(0, 12_000))
@example(10_000)
def test_batches_hold_every_file_once_in_few_enough_mapped_tasks(count: int) -> None:
    files = [Path(f"/in/{k}.fa") for k in range(count)]
    batches = make_batches(files)
    assert [name for batch in batches for name in batch] == [str(file) for file in files]
    assert len(batches) <= BATCHES < MAX_MAP_LENGTH
    assert count > BATCHES or all(len(batch) == 1 for batch in batches)


def test_batches_are_named_after_their_files() -> None:
    assert name_batch(["/in/reads.faa.gz"]) == "reads"
    assert name_batch(["/in/reads.faa.gz", "/in/b.fa", "/in/c.fa"]) == "reads and 2 more"


def test_inbox_is_searched_for_fasta_files(inbox: Path) -> None:
    wanted = ["a.fasta", "b.FAA.gz", "deep/er/c.fa.zst", "deep/a.fasta"]
    for name in [*wanted, "a_DNABERT_S.pt", "notes.txt", ".upload.fasta", ".hidden/d.fa", "reads.gz"]:
        write_fasta(inbox / name, "MKV")
    (inbox / "folder.fa").mkdir()
    assert find_inputs(inbox, []) == sorted(inbox / name for name in wanted)


@contextmanager
def as_nobody() -> Iterator[None]:
    """To root everything is readable: be somebody else meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_inbox() -> Iterator[Path]:
    """An inbox that `as_nobody` gets to, which pytest's own folders are too private for."""
    before = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            (Path(folder) / "inbox").mkdir()
            yield Path(folder) / "inbox"
    finally:
        os.umask(before)


@pytest.mark.usefixtures("tiny_model")
def test_what_cannot_be_read_is_refused_by_its_name_and_the_others_go_on(
    open_inbox: Path,
    settings_environment: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings_environment(input_roots=str(open_inbox))
    # It reads the migrations, which may lie where nobody but root comes to.
    monkeypatch.setattr("dags.connections.check_migrated", lambda ledger: None)
    good = write_fasta(open_inbox / "good.fasta", "MKVLAT")
    (closed := write_fasta(open_inbox / "deep/closed/a.fasta", "MKV").parent).chmod(0)
    (below := open_inbox / "listed/below").mkdir(parents=True)
    (listed := write_fasta(open_inbox / "listed/b.fasta", "MKV")).parent.chmod(0o444)
    write_fasta(open_inbox / ".hidden/c.fasta", "MKV").parent.chmod(0)
    with as_nobody():
        found = find_inputs(open_inbox, [])
        files = register(*found)
    assert found == [closed, good, listed, below]
    assert [file["job"] is None for file in files] == [True, False, True, True]
    assert f"Permission denied [{closed}]" in files[0]["refused"]
    assert f"Permission denied [{listed}]" in files[2]["refused"]


def test_an_inbox_that_cannot_be_read_is_an_error(open_inbox: Path) -> None:
    write_fasta(open_inbox / "a.fasta", "MKV")
    open_inbox.chmod(0)
    with as_nobody(), pytest.raises(SettingsError, match=rf"Permission denied \[{open_inbox}\].*readable"):
        find_inputs(open_inbox, [])


def test_links_to_folders_are_not_followed_and_links_to_files_are(inbox: Path, tmp_path: Path) -> None:
    outside = write_fasta(tmp_path / "outside/a.fasta", "MKV")
    inbox.mkdir(exist_ok=True)
    (inbox / "folder").symlink_to(outside.parent)
    (inbox / "folder.fasta").symlink_to(outside.parent)
    (inbox / "file.fasta").symlink_to(outside)
    with capture_logs() as lines:
        assert find_inputs(inbox, []) == [inbox / "file.fasta"]
    assert {line["folder"] for line in lines} == {str(inbox / "folder"), str(inbox / "folder.fasta")}


def test_a_link_that_leads_nowhere_is_refused_by_its_name(
    ledger: Engine, inbox: Path, tmp_path: Path
) -> None:
    (dangling := inbox / "dangling.fasta").symlink_to(tmp_path / "nowhere")
    (loop := inbox / "loop.fasta").symlink_to(loop)
    found = find_inputs(inbox, [])
    assert found == [dangling, loop]
    refused = register(*found, write_fasta(inbox / "good.fasta", "MKVLAT"))
    assert f"there is no such file [{dangling}]" in refused[0]["refused"]
    assert f"the file cannot be opened: Too many levels of symbolic links [{loop}]" in refused[1]["refused"]


def test_a_name_that_is_not_utf_8_is_refused_and_keeps_no_others_out(ledger: Engine, inbox: Path) -> None:
    folder = inbox / os.fsdecode(b"caf\xe9")
    odd = write_fasta(folder / "a.fasta", "MKV")
    (inbox / "link.fasta").symlink_to(Path("/nowhere") / odd.name / folder.name)
    found = find_inputs(inbox, [])
    good = write_fasta(inbox / "good.fasta", "MKVLAT")
    files = register(*found, good)
    assert [Path(file["path"]).name for file in files] == ["a.fasta", "link.fasta", "good.fasta"]
    assert "name is not UTF-8" in files[0]["refused"]
    assert "caf\\udce9" in files[0]["refused"]
    assert "leads out of" in files[1]["refused"]
    json.dumps(files, ensure_ascii=False).encode()
    assert files[2]["job"] is not None


def test_named_files_are_taken_once_and_from_the_inbox(inbox: Path) -> None:
    assert find_inputs(inbox, ["b.fa", "/else/a.fa", "b.fa"]) == [inbox / "b.fa", Path("/else/a.fa")]


def test_an_inbox_that_is_missing_is_an_error_and_an_empty_one_is_not(inbox: Path) -> None:
    assert ingest.find_files.function(params=FORM) == []
    with pytest.raises(SettingsError, match="VIRNUCPRO_INBOX"):
        find_inputs(inbox / "nowhere", [])
