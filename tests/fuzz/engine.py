"""The two engines: hypothesis, whose inputs have a structure, and atheris, which follows coverage.

python -m tests.fuzz.engine TARGET RUNS SEED FOLDER SCRATCH     atheris on one target; what it found is in FOLDER
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
INSTRUMENTED = ["virnucpro_core", "workers", "torch._weights_only_unpickler"]
LARGEST_INPUT = 4096  # bytes
LONGEST_RUN = 20  # seconds that one input may take
LARGEST_PROCESS = 2500  # MiB; torch alone takes 500


@dataclass
class Figures:
    """What a fuzzer did.

    Attributes:
        runs: inputs tried.
        outcomes: how many gave records, and how many each error.
        seconds: time taken.
        mebibytes: the process's memory at most.
    """

    target: str
    engine: str
    runs: int = 0
    outcomes: dict[str, int] = field(default_factory=Counter)
    seconds: float = 0.0
    mebibytes: int = 0

    def add(self, other: Figures) -> None:
        self.runs += other.runs
        self.outcomes = dict(Counter(self.outcomes) + Counter(other.outcomes))
        self.seconds += other.seconds
        self.mebibytes = max(self.mebibytes, other.mebibytes)

    def write(self, folder: Path) -> None:
        (folder / f"{self.target}-{self.engine}.json").write_text(json.dumps(vars(self)))


class Attempts:
    """Runs a target on input after input, which it may write into a folder, and keeps the figures."""

    def __init__(self, name: str, engine: str, scratch: Path) -> None:
        from tests.fuzz import targets

        self.figures = Figures(name, engine)
        self.target = targets.TARGETS.get(name, targets.control)
        self.run = targets.run
        self.started = time.monotonic()
        self.scratch = scratch

    def __call__(self, data: bytes) -> None:
        self.figures.runs += 1
        self.figures.outcomes[self.run(self.target, data, self.scratch)] += 1

    def measure(self) -> Figures:
        self.figures.seconds = round(time.monotonic() - self.started, 1)
        self.figures.mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return self.figures


def run_hypothesis(name: str, examples: int, seed: int, scratch: Path) -> Figures:
    """Try examples of a target's strategy.

    Args:
        scratch: an empty folder; best in memory.

    Raises:
        Exception: a finding, with the smallest input that hypothesis could find.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.fuzz.seeds import STRATEGIES

    attempts = Attempts(name, "hypothesis", scratch)

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(STRATEGIES[name])
    def attempt(data: bytes) -> None:
        attempts(data)

    attempt()
    return attempts.measure()


def run_atheris(name: str, runs: int, seed: int, folder: Path, scratch: Path) -> None:
    """Fuzz a target until so many inputs were tried; ends this process, with another code than 0 if it found one.

    Args:
        folder: gets the figures, the inputs that reached something new, and what was found, as `TARGET-crash-…`,
            `-timeout-…` or `-oom-…`.
        scratch: an empty folder, best in memory; left as it is then, as libFuzzer ends the process at once.
    """
    import atheris

    instrumented: Callable[..., AbstractContextManager[object]] = atheris.instrument_imports
    with instrumented(include=INSTRUMENTED) if name != "control" else nullcontext():
        from tests.fuzz.seeds import SEEDS

        attempts = Attempts(name, "atheris", scratch)
    if name == "pt":
        import torch  # noqa: F401 - or it would be imported while libFuzzer times the first input
    grown = folder / f"{name}-corpus"
    grown.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(SEEDS[name]):
        (grown / f"seed-{number}").write_bytes(content)
    kept = CORPUS / name

    def try_input(data: bytes) -> None:
        attempts(data)
        if attempts.figures.runs % 500 == 0 or attempts.figures.runs >= runs:
            attempts.measure().write(folder)  # libFuzzer ends the process without another word

    options = {
        "runs": runs,
        "seed": seed,
        "max_len": LARGEST_INPUT,
        "len_control": 20,  # let inputs grow soon
        "timeout": LONGEST_RUN,
        "rss_limit_mb": LARGEST_PROCESS,
        "artifact_prefix": f"{folder}/{name}-",
    }
    corpora = [str(grown), *([str(kept)] if kept.is_dir() else [])]
    atheris.Setup(
        [sys.argv[0], *(f"-{option}={value}" for option, value in options.items()), *corpora], try_input
    )
    atheris.Fuzz()


if __name__ == "__main__":
    run_atheris(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
