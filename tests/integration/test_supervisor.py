"""supervisord as the stack uses it: started, asked, and gone without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from virnucpro_core.errors import ServiceError, SettingsError
from virnucpro_core.stack.supervisor import Program, Supervisor, is_alive

pytestmark = pytest.mark.integration

FAMILY = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""
PRINTER = """
import os, time
others = [value for value in os.environ.values() if "somebody:secret" in value]
print(os.environ["TOLD"], others, flush=True)
time.sleep(600)
"""
NEEDY = """
import os, sys, time
os.path.exists(os.environ["OUTAGE"]) and sys.exit("nobody answers")
time.sleep(600)
"""
SUPERVISORDS_TRIES = 4  # after so many failed starts it would give up by default


def python(name: str, code: str, **options: object) -> Program:
    argv = [sys.executable, "-c", code]
    return Program(name=name, group="services", argv=argv, **({"settle_seconds": 1} | options))  # type: ignore[arg-type]


def eventually(check: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    if supervisor.is_running():
        supervisor.shutdown()


def launch(supervisor: Supervisor, *programs: Program) -> None:
    supervisor.launch(programs, working_folder=supervisor.folder, detached=False)
    for program in programs:
        supervisor.start(program.name)


def test_a_program_gets_its_environment_and_no_setting_of_ours(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRNUCPRO_DATABASE_URL", "postgresql://somebody:secret@elsewhere/ledger")
    monkeypatch.setenv(
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://somebody:secret@elsewhere/airflow"
    )
    monkeypatch.setenv("FLOWER_PORT", "tcp://somebody:secret@elsewhere:5555")
    awkward = "100%, it's a=b; back\\slash"
    launch(supervisor, python("printer", PRINTER, environment={"TOLD": awkward}))
    log = supervisor.log_of("printer")
    eventually(lambda: log.exists() and log.read_text() == f"{awkward} []\n")


def test_a_folders_name_may_hold_what_supervisord_expands(near_root: Path) -> None:
    folder = near_root / "100%_of it"
    folder.mkdir()
    supervisor = Supervisor(folder)
    try:
        launch(supervisor, python("printer", PRINTER, environment={"TOLD": "told"}))
        log = folder / "logs" / "printer.log"
        eventually(lambda: log.exists() and log.read_text() == "told []\n")
    finally:
        supervisor.shutdown()


def test_what_the_configuration_cannot_hold_is_refused(supervisor: Supervisor) -> None:
    program = python("printer", PRINTER, environment={"TOLD": "folder #2"})
    with pytest.raises(SettingsError, match="folder #2"):
        supervisor.launch([program], working_folder=supervisor.folder, detached=False)


def test_a_program_that_ends_is_started_again(supervisor: Supervisor) -> None:
    launch(supervisor, python("steady", "import time; time.sleep(600)"))
    eventually(lambda: supervisor.states()["steady"] == "RUNNING")
    first = supervisor.pid("steady")
    os.kill(first, signal.SIGKILL)
    eventually(lambda: supervisor.pid("steady") not in (0, first))


def test_a_program_that_keeps_failing_is_given_up(supervisor: Supervisor) -> None:
    launch(supervisor, python("broken", "raise SystemExit('no such thing')"))
    assert supervisor.is_alive("broken")
    eventually(lambda: not supervisor.is_alive("broken"))
    assert "no such thing" in supervisor.log_of("broken").read_text()


def test_a_program_that_was_up_outlives_an_outage_of_any_length(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    outage = tmp_path / "outage"
    # supervisord looks once a second: with one second to settle it takes some that end at once for settled.
    launch(supervisor, python("needy", NEEDY, environment={"OUTAGE": str(outage)}, settle_seconds=2))
    eventually(lambda: supervisor.states()["needy"] == "RUNNING")
    outage.touch()
    os.kill(supervisor.pid("needy"), signal.SIGKILL)
    log = supervisor.log_of("needy")
    eventually(lambda: log.read_text().count("nobody answers") >= SUPERVISORDS_TRIES)
    outage.unlink()
    eventually(lambda: supervisor.states()["needy"] == "RUNNING")


def test_shutdown_leaves_no_process(supervisor: Supervisor) -> None:
    launch(supervisor, python("family", FAMILY), python("deaf", DEAF, stop_seconds=1))
    eventually(lambda: len(psutil.Process(supervisor.pid("family")).children()) == 1)
    eventually(lambda: supervisor.log_of("deaf").exists() and "deaf" in supervisor.log_of("deaf").read_text())
    supervisord = psutil.Process(supervisor.pid("family")).parent()
    assert supervisord is not None
    family = [supervisord, *supervisord.children(recursive=True)]
    assert len(family) >= 4  # supervisord, family and its child, deaf
    supervisor.shutdown()
    assert [process for process in family if is_alive(process)] == []
    assert not supervisor.is_running()


def test_one_that_is_ending_is_waited_for(supervisor: Supervisor) -> None:
    """Whoever told it to was interrupted: until it is gone nothing else starts there, nor is it said to be gone."""
    launch(supervisor, python("deaf", DEAF, stop_seconds=600))
    eventually(lambda: supervisor.log_of("deaf").exists() and "deaf" in supervisor.log_of("deaf").read_text())
    deaf = psutil.Process(supervisor.pid("deaf"))
    supervisord = deaf.parent()
    assert supervisord is not None
    supervisord.terminate()
    log = supervisor.log_of("supervisord")
    eventually(lambda: "waiting for deaf to die" in log.read_text())
    assert supervisor.is_running()
    with ThreadPoolExecutor(1) as pool:
        gone = pool.submit(supervisor.shutdown)
        deaf.kill()
        gone.result()
    assert not is_alive(supervisord)
    assert not supervisor.is_running()


def test_a_launch_that_is_interrupted_leaves_no_process(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr(supervisor, "is_running", interrupt)
        with pytest.raises(KeyboardInterrupt):
            supervisor.launch([], working_folder=supervisor.folder, detached=True)
    assert supervisor.process is not None
    assert supervisor.process.poll() is not None
    assert not supervisor.is_running()


def test_the_socket_is_private(supervisor: Supervisor) -> None:
    launch(supervisor)
    assert supervisor.socket.stat().st_mode & 0o077 == 0
    assert supervisor.configuration.stat().st_mode & 0o077 == 0


def test_a_folder_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with pytest.raises(SettingsError, match="too long for a unix socket"):
        Supervisor(folder).launch([], working_folder=folder, detached=False)


def test_asking_one_that_does_not_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="make up"):
        Supervisor(tmp_path).states()


STARTER = """
    import sys, time
    from pathlib import Path
    from virnucpro_core.stack.processes import tied_to_parent
    from virnucpro_core.stack.supervisor import Program, Supervisor

    folder = Path(sys.argv[1])
    supervisor = Supervisor(folder)
    program = Program(name="sleeper", group="services", argv=tied_to_parent(["sleep", "600"]))
    supervisor.launch([program], working_folder=folder, detached=sys.argv[2] == "detached")
    supervisor.start("sleeper")
    print(supervisor.pid("sleeper"), flush=True)
    time.sleep(600)
"""


def kill_starter(folder: Path, how: str) -> psutil.Process:
    """Start supervisord from a process of its own and kill that one; returns the program's process."""
    argv = [sys.executable, "-c", textwrap.dedent(STARTER), str(folder), how]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        sleeper = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    return sleeper


def test_all_ends_with_the_process_that_started_it(supervisor: Supervisor) -> None:
    sleeper = kill_starter(supervisor.folder, "tied")
    eventually(lambda: not is_alive(sleeper))
    eventually(lambda: not supervisor.is_running())


def test_detached_it_goes_on_until_it_is_stopped(supervisor: Supervisor) -> None:
    sleeper = kill_starter(supervisor.folder, "detached")
    assert is_alive(sleeper)
    supervisor.shutdown()
    assert not is_alive(sleeper)


def test_programs_end_when_supervisord_is_killed(supervisor: Supervisor) -> None:
    sleeper = kill_starter(supervisor.folder, "detached")
    supervisord = sleeper.parent()
    assert supervisord is not None
    supervisord.kill()
    eventually(lambda: not is_alive(sleeper))


SLOW_SETPRIV = """\
#!/bin/sh
while ! test -e {go}; do sleep 0.01; done
exec {setpriv} "$@"
"""


def test_a_program_whose_supervisord_was_killed_before_it_was_tied_ends_too(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setpriv, go = tmp_path / "bin" / "setpriv", tmp_path / "go"
    setpriv.parent.mkdir()
    setpriv.write_text(SLOW_SETPRIV.format(go=go, setpriv=shutil.which("setpriv")))
    setpriv.chmod(0o755)
    monkeypatch.setenv("PATH", str(setpriv.parent), prepend=os.pathsep)
    sleeper = kill_starter(supervisor.folder, "detached")
    supervisord = sleeper.parent()
    assert supervisord is not None
    supervisord.kill()
    psutil.wait_procs([supervisord], timeout=60)
    go.touch()
    eventually(lambda: not is_alive(sleeper))
