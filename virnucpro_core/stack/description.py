"""What a running stack tells other processes: where it is and which settings reach it. No secrets."""

from __future__ import annotations

import json
import socket
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from virnucpro_core.settings import PREFIX
from virnucpro_core.stack.processes import write_private

STATE_FOLDER = Path(".virnucpro")
FILE = "stack.json"
SOCKET = "supervisord.sock"

LEDGER_URLS = {f"{PREFIX}{role}DATABASE_URL" for role in ("", "OWNER_", "DAG_", "WORKER_")}
"""Settings that stand or fall together: roles that reached different ledgers would not see each other's work."""


@dataclass(frozen=True)
class Description:
    """A running stack.

    Attributes:
        urls: of the pages that a person opens, by name.
        logins: the file with their users and passwords.
        environment: settings for commands that use this stack; secrets by their files' names.
    """

    urls: dict[str, str]
    logins: str
    environment: dict[str, str]

    def write(self, state_folder: Path) -> None:
        """Leave it in the state folder."""
        write_private(state_folder / FILE, json.dumps(asdict(self), indent=2))


def read_description(state_folder: Path = STATE_FOLDER) -> Description | None:
    """The description of the stack that runs from a state folder, None if none does."""
    # A stack that was killed leaves its description behind: only one that listens counts.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(state_folder / SOCKET))
            return Description(**json.loads((state_folder / FILE).read_text()))
        except OSError:
            return None


def use_running_stack(environment: MutableMapping[str, str], state_folder: Path = STATE_FOLDER) -> bool:
    """Point the settings of this process at the running stack, where nothing else is set.

    Call it before the settings are loaded. Returns whether a stack was found.
    """
    found = read_description(state_folder)
    if found is None:
        return False
    given = {name.removesuffix("_FILE") for name in environment}  # by hand, directly or as a file
    if given & LEDGER_URLS:
        given |= LEDGER_URLS
    environment.update(
        {name: value for name, value in found.environment.items() if name.removesuffix("_FILE") not in given}
    )
    return True
