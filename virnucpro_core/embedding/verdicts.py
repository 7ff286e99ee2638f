"""The selftest's verdicts: what they say, and how they are kept with a checkpoint, one per execution class."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from virnucpro_core.embedding.checkpoint import Checkpoint
from virnucpro_core.embedding.execution import ExecutionClass
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.files import new_file

log = structlog.get_logger()

VERDICT_NAME = "selftest.json"

VERSION = 1
"""Rises with every change of a check or a limit: FP8 then has to pass again."""


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
        token_dropout: as the checkpoint's config has it.
        execution: how it was run; None if the model did not load.
        checks: all of them, in order.
    """

    weights_sha256: str
    token_dropout: bool
    execution: ExecutionClass | None
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "passed": self.passed,
            "token_dropout": self.token_dropout,
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


def read_verdicts(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The verdicts kept with a checkpoint, by the sha256 of their execution class; none if none was kept.

    Raises:
        ArtifactError: the file holds something else.
    """
    path = Path(folder, VERDICT_NAME)
    try:
        verdicts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(
            f"the verdicts cannot be read: {error}", where=str(path), todo="Remove the file."
        ) from error
    if not isinstance(verdicts, dict) or not all(isinstance(each, dict) for each in verdicts.values()):
        raise ArtifactError("the verdicts are not objects", where=str(path), todo="Remove the file.")
    return verdicts


def has_passed(checkpoint: Checkpoint, execution: ExecutionClass) -> bool:
    """Whether this version of the selftest was passed with these weights in this execution class.

    A file of verdicts that cannot be read says no, and the log says so.
    """
    try:
        verdict = read_verdicts(checkpoint.folder).get(execution.sha256, {})
    except ArtifactError as error:
        log.warning("verdicts_unusable", reason=str(error))
        return False
    demanded = {"version": VERSION, "weights_sha256": checkpoint.sha256, "passed": True}
    demanded["token_dropout"] = checkpoint.token_dropout
    return all(verdict.get(key) == value for key, value in demanded.items())
