"""What the GPU benchmarks work on: inputs of stated lengths, their FLOPs, and the ceiling to compare with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from virnucpro_core.embedding.packing import EXTRA_TOKENS
from virnucpro_core.embedding.reference import NATURAL_LETTERS
from virnucpro_core.recipe import TRUNCATION

CUBE = 8192
CEILING_DTYPES = ("bfloat16", "float16", "fp8")
HEAT_SECONDS = 2.0
PAUSE_SECONDS = 1.0

_LETTERS = np.frombuffer(NATURAL_LETTERS.encode(), dtype=np.uint8)
"""A random byte picks one."""

_BLOCK_RECORDS = 200_000


def _draw_mixed(records: int) -> NDArray[np.int64]:
    lengths = np.random.default_rng(0).lognormal(5.6, 0.6, records)
    return lengths.clip(20, TRUNCATION).astype(np.int64)


WORKLOADS: dict[str, Callable[[int], NDArray[np.int64]]] = {
    "viral500": lambda records: 165 + np.arange(records) % 2,
    "viral300": lambda records: 99 + np.arange(records) % 2,
    "mixed": _draw_mixed,
    "reads": lambda records: np.full(records, 50),
}
"""Residues of each record, from the number of records.

Six-frame translations of windows of 500 and of 300 bases, proteins of 20 to 1024 residues (320 on average),
and translations of short reads.
"""


def draw_lengths(name: str, records: int) -> NDArray[np.int64]:
    """Residues of each record of a workload, int64 (records,); fewer records are the first of more.

    Raises:
        KeyError: there is no such workload.
    """
    return WORKLOADS[name](records)


def write_fasta(path: Path, name: str, records: int, seed: int = 0) -> None:
    """Writes a workload, each record with a header and one line of residues; a million reads take a second."""
    random = np.random.default_rng(seed)
    lengths = draw_lengths(name, records)
    with path.open("wb") as file:
        for first in range(0, records, _BLOCK_RECORDS):
            part = lengths[first : first + _BLOCK_RECORDS]
            headers = "".join(f">{name}_{number:09d}\n" for number in range(first + 1, first + len(part) + 1))
            header = np.frombuffer(headers.encode(), dtype=np.uint8).reshape(len(part), -1)
            ends = np.cumsum(header.shape[1] + part + 1)
            begins = ends - part - 1 - header.shape[1]
            text = _LETTERS[np.frombuffer(random.bytes(int(ends[-1])), dtype=np.uint8)]
            text[begins[:, None] + np.arange(header.shape[1])] = header
            text[ends - 1] = ord("\n")
            file.write(text.data)


def count_flops(lengths: NDArray[np.int64]) -> float:
    """Floating-point operations of one forward pass over each sequence, padding not counted.

    For the weights as others count them for this model: 637 million, though 33 layers' products hold 649 million.
    Attention's two products take 2 * 1280 operations each for every pair of tokens, in 33 layers.

    Args:
        lengths: residues of each sequence, at most 1024.
    """
    tokens = lengths.astype(np.float64) + EXTRA_TOKENS
    return float((2 * 637e6 * tokens + 4 * 33 * 1280 * tokens**2).sum())


def measure_ceilings() -> dict[str, dict[str, float]]:
    """The GPU's ceiling by dtype, in TFLOP/s: `burst` each after a pause, and `hot` after two seconds of work."""
    measure_ceiling("bfloat16")  # the first one of a process is a few percent lower
    burst = {}
    for dtype in CEILING_DTYPES:
        time.sleep(PAUSE_SECONDS)
        burst[dtype] = measure_ceiling(dtype)
    return {
        dtype: {"burst": burst[dtype], "hot": measure_ceiling(dtype, heat=HEAT_SECONDS)}
        for dtype in CEILING_DTYPES
    }


def measure_ceiling(dtype: str, *, heat: float = 0.0) -> float:
    """TFLOP/s of a product of two 8192-cubes: the mean of 30, after 5 and `heat` seconds of the same.

    FP8 is `torch._scaled_mm` with fast accumulation, by row or by tensor, whichever is faster.
    """
    return max(_time_product(product, heat) for product in _make_products(dtype))


def _make_products(dtype: str) -> list[Callable[[], object]]:
    import torch

    # Rounded once, to the dtype itself: numbers with zeros in their last bits cost less power, and so go faster.
    narrow = torch.float8_e4m3fn if dtype == "fp8" else getattr(torch, dtype)
    left, right = (torch.randn(CUBE, CUBE, device="cuda").to(narrow) for _ in range(2))
    if dtype != "fp8":
        return [lambda: left @ right]
    one = torch.ones((), device="cuda")
    by_row = torch.ones(CUBE, 1, device="cuda")

    def multiply(scale_a: torch.Tensor, scale_b: torch.Tensor) -> object:
        return torch._scaled_mm(  # noqa: SLF001 - FP8 products have no public name
            left, right.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return [lambda: multiply(by_row, by_row.t()), lambda: multiply(one, one)]


def _time_product(multiply: Callable[[], object], heat: float, repeats: int = 30) -> float:
    import torch

    def run(times: int) -> None:
        for _ in range(times):
            multiply()

    run(5)
    started = time.perf_counter()
    while time.perf_counter() - started < heat:
        run(repeats)
        torch.cuda.synchronize()
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    begin.record()
    run(repeats)
    end.record()
    torch.cuda.synchronize()
    return 2 * CUBE**3 * repeats / float(begin.elapsed_time(end)) / 1e9
