"""Measures how fast a plain FASTA file of 1 GB is registered, and in how much memory.

    python -m benchmarks.registration [--megabytes 1000] [--rounds 5]

Two files are made in a temporary folder: proteins wrapped at 60 columns, and unwrapped short reads. In each
round every measurement runs once, in a process of its own, so that a ratio compares runs of the same minute.
The file is in the page cache. Results go to benchmarks/results/registration.json; the exit code is 1 when
the best round misses the target.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dnaio
import numpy as np
from numpy.typing import NDArray

from virnucpro_core.sequences.fasta import find_records, parse_records
from virnucpro_core.sequences.scan import read_range, scan_input

RESULTS = Path(__file__).parent / "results" / "registration.json"
BLOCK = 1 << 20
CHUNK_TOKENS = 4_000_000
TARGET_RATE = 400
TARGET_MEMORY = 300
AMINO_ACIDS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", dtype=np.uint8)


def make_residues(random: np.random.Generator, count: int) -> bytes:
    residues: NDArray[np.uint8] = AMINO_ACIDS[random.integers(0, len(AMINO_ACIDS), count)]
    return residues.tobytes()


def make_proteins(random: np.random.Generator) -> Iterator[bytes]:
    """Yields proteins of 380 residues on average, 60 to a line."""
    for number in range(1, sys.maxsize):
        residues = make_residues(random, 20 + int(random.gamma(2, 180)))
        lines = b"\n".join(residues[i : i + 60] for i in range(0, len(residues), 60))
        yield b">P%08d synthetic protein OS=none\n%s\n" % (number, lines)


def make_reads(random: np.random.Generator) -> Iterator[bytes]:
    """Yields translated reads of 40 to 59 residues, one to a line."""
    for number in range(1, sys.maxsize):
        yield b">read_%08d/1\n%s\n" % (number, make_residues(random, int(random.integers(40, 60))))


def write_fasta(path: Path, records: Iterator[bytes], size: int) -> None:
    """Writes whole records of at least `size` bytes; 16 MB of different ones are repeated."""
    part = bytearray()
    for record in records:
        part += record
        if len(part) >= 16_000_000:
            break
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(part)


def read_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            yield block


def hash_alone(path: Path) -> None:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)


def scan_alone(path: Path) -> None:
    for block in read_blocks(path):
        find_records(np.frombuffer(block, dtype=np.uint8), line_start=True, in_header=False)


def parse_with_dnaio(path: Path) -> None:
    with dnaio.open(path, fileformat="fasta", open_threads=0) as reader:
        for _ in reader:
            pass


def register(path: Path) -> None:
    scan_input(path, chunk_tokens=CHUNK_TOKENS, spool_root=path.parent / "spool")


def register_and_tokenise(path: Path) -> None:
    """What a worker does with the chunks comes on top: read, verify, tokenise."""
    scanned = scan_input(path, chunk_tokens=CHUNK_TOKENS, spool_root=path.parent / "spool")
    for chunk in scanned.chunks:
        parse_records(
            read_range(scanned.location, scanned.compression, chunk), first_record=chunk.first_record
        )


MEASUREMENTS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (register, hash_alone, scan_alone, parse_with_dnaio, register_and_tokenise)
}


def measure(name: str, path: Path) -> dict[str, float]:
    """Runs one measurement in this process: MB/s, CPU seconds a GB, peak resident MB (Linux)."""
    size = path.stat().st_size
    begin, cpu_begin = time.perf_counter(), time.process_time()
    MEASUREMENTS[name](path)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
    return {"rate": size / seconds / 1e6, "cpu": cpu / size * 1e9, "memory": peak_kib * 1024 / 1e6}


def measure_apart(name: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.registration", "--measure", name, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def compare(path: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Runs all measurements in turn, `rounds` times."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MEASUREMENTS}
    for _ in range(rounds):
        for name, done in runs.items():
            done.append(measure_apart(name, path))
    return {
        name: {
            "mb_per_second_best": round(max(run["rate"] for run in done)),
            "mb_per_second_median": round(statistics.median(run["rate"] for run in done)),
            "mb_per_second_runs": [round(run["rate"]) for run in done],
            "cpu_seconds_per_gb_best": round(min(run["cpu"] for run in done), 2),
            "peak_memory_mb": round(max(run["memory"] for run in done)),
            "ratio_of_register_median": round(
                statistics.median(
                    ours["rate"] / run["rate"] for ours, run in zip(runs["register"], done, strict=True)
                ),
                2,
            ),
        }
        for name, done in runs.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how fast FASTA is registered.")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of each file")
    parser.add_argument("--rounds", type=int, default=5, help="times that each measurement runs")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, file = arguments.measure
        print(json.dumps(measure(name, Path(file))))
        return 0

    random = np.random.default_rng(0)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        for label, records in {"proteins, 60 columns": make_proteins, "short reads": make_reads}.items():
            path = Path(folder) / "input.fasta"
            write_fasta(path, records(random), arguments.megabytes * 1_000_000)
            results[label] = compare(path, arguments.rounds)
            path.unlink()
    met = all(
        result["register"]["mb_per_second_best"] >= TARGET_RATE
        and result["register"]["peak_memory_mb"] < TARGET_MEMORY
        for result in results.values()
    )
    report = {
        "file_megabytes": arguments.megabytes,
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average_before_and_after": [load_before, os.getloadavg()],
        "niceness": os.nice(0),
        "target": {"register_mb_per_second": TARGET_RATE, "peak_memory_mb_below": TARGET_MEMORY, "met": met},
        "results": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
