"""The selftest's verdicts: what they say, and how they are kept with a checkpoint, one per execution class."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from virnucpro_core.embedding.checkpoint import Checkpoint
from virnucpro_core.embedding.execution import ExecutionClass
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.files import new_file

VERDICT_NAME = "selftest.json"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what was to be true, whether it is, and the figures."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a selftest found.

    Attributes:
        weights_sha256: of the checkpoint.
        execution: how it was run; None if the model did not load.
        checks: all eleven, in order.
    """

    weights_sha256: str
    execution: ExecutionClass | None
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "weights_sha256": self.weights_sha256,
            "execution": self.execution.to_json() if self.execution else None,
            "checks": [asdict(check) for check in self.checks],
        }


def keep_verdict(folder: str | os.PathLike[str], verdict: Verdict) -> Path:
    """Keeps a verdict with the checkpoint, beside those of other execution classes, and returns the file.

    Raises:
        ArtifactError: the file cannot be written, or holds something else.
    """
    path = Path(folder, VERDICT_NAME)
    verdicts = read_verdicts(folder)
    verdicts[verdict.execution.sha256 if verdict.execution else "not_loaded"] = verdict.to_json()
    with new_file(path) as file:
        file.write((json.dumps(verdicts, indent=2, sort_keys=True) + "\n").encode())
    return path


def read_verdicts(folder: str | os.PathLike[str]) -> dict[str, object]:
    """The verdicts kept with a checkpoint, by the sha256 of their execution class; none if none was kept.

    Raises:
        ArtifactError: the file holds something else.
    """
    path = Path(folder, VERDICT_NAME)
    if not path.exists():
        return {}
    try:
        verdicts = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError("the verdicts are not JSON", where=str(path), todo="Remove the file.") from error
    if not isinstance(verdicts, dict):
        raise ArtifactError("the verdicts are not an object", where=str(path), todo="Remove the file.")
    return verdicts


def has_passed(checkpoint: Checkpoint, execution: ExecutionClass) -> bool:
    """Whether the selftest of these weights was passed in this execution class.

    Raises:
        ArtifactError: the file of verdicts holds something else.
    """
    verdict = read_verdicts(checkpoint.folder).get(execution.sha256)
    if not isinstance(verdict, dict):
        return False
    return verdict.get("passed") is True and verdict.get("weights_sha256") == checkpoint.sha256
