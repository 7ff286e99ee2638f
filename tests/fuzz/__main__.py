"""Fuzzing at length: `make fuzz RUNS=1000000`. Prints a line for each target and engine, and a summary.

python -m tests.fuzz --runs N [--seed S] [--folder F] [--targets fasta,pt]

What is found lies in the folder afterwards; once it is mended, it belongs into `tests/fuzz/corpus/TARGET/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.engine import Figures, run_hypothesis

SHARES = {"message": 0.3, "manifest": 0.3, "matrix": 0.13, "pt": 0.15, "fasta": 0.12}
HYPOTHESIS_SHARE = 0.1  # of each target's inputs; its inputs cost more
BATCH = 20_000  # inputs of one process: atheris keeps some kilobytes of each, and slows down


def fuzz(name: str, runs: int, seed: int, folder: Path) -> list[Figures]:
    """Both engines on one target; prints what each did.

    Raises:
        SystemExit: there was a finding; its traceback and its file are shown.
    """
    by_hypothesis = max(1, round(runs * HYPOTHESIS_SHARE))
    by_atheris = runs - by_hypothesis
    with scratch_folder() as scratch:
        figures = [run_hypothesis(name, by_hypothesis, seed, scratch), Figures(name, "atheris")]
    tell(figures[0])
    while figures[1].runs < by_atheris:
        figures[1].add(fuzz_batch(name, min(BATCH, by_atheris - figures[1].runs), seed, folder))
        seed += 1
    tell(figures[1])
    return figures


def fuzz_batch(name: str, runs: int, seed: int, folder: Path) -> Figures:
    """A process of atheris, which goes on from what those before it reached."""
    log = folder / f"{name}-atheris.log"
    with log.open("wb") as output, scratch_folder() as scratch:
        arguments = [name, str(runs), str(seed), str(folder), str(scratch)]
        command = [sys.executable, "-m", "tests.fuzz.engine", *arguments]
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if code:
        print(log.read_text(errors="replace")[-5000:])
        found = [str(path) for path in sorted(folder.glob(f"{name}-*-*")) if path.is_file()]
        raise SystemExit(f"{name}: a finding (exit {code}): {', '.join(found)}")
    return Figures(**json.loads((folder / f"{name}-atheris.json").read_text()))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for a while; in memory where there is one, as a million files would wear a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def tell(figures: Figures) -> None:
    """Print a line of figures, the most frequent outcome first."""
    frequent = sorted(figures.outcomes.items(), key=lambda outcome: -outcome[1])
    outcomes = ", ".join(f"{count:,} {what}" for what, count in frequent)
    done = f"{figures.runs:>10,} inputs {figures.seconds:>8.1f} s {figures.mebibytes:>6} MiB"
    print(f"{figures.target:<9}{figures.engine:<11}{done}  {outcomes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--targets", default=",".join(SHARES))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # torch warns of each odd pickle that it then refuses
    names = options.targets.split(",")
    whole = sum(SHARES.get(name, 1) for name in names)
    done = [
        one
        for name in names
        for one in fuzz(name, round(options.runs * SHARES.get(name, 1) / whole), options.seed, options.folder)
    ]
    print(f"{sum(one.runs for one in done):,} inputs in {sum(one.seconds for one in done):.0f} s: no finding")


if __name__ == "__main__":
    main()
