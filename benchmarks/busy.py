"""How much of a run the GPU computes.

Profiling the millions of kernels of a long run would slow it down. So events on the GPU time its packs, and a
shorter run under the profiler tells which part of its packs' time kernels filled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from benchmarks.bare import Result
from virnucpro_core.embedding.model import FastEsm

NOT_KERNELS = ("Memcpy", "Memset", "Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")
"""What else the profiler lists as a GPU's; while the host waits in a `Sync`, the GPU may idle."""


class TimedEncoder:
    """Stands in for the encoder of a model with the fused plan, and times each pack on the GPU."""

    def __init__(self, encoder: Callable[..., torch.Tensor]) -> None:
        self._encoder = encoder
        self._packs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        begin.record()
        embeddings = self._encoder(*args, **kwargs)
        end.record()
        self._packs.append((begin, end))
        return embeddings

    def take_seconds(self) -> float:
        """Time of all packs since the last call."""
        packs, self._packs = self._packs, []
        return float(sum(begin.elapsed_time(end) for begin, end in packs)) / 1e3


def measure_busy(
    model: FastEsm, run_long: Callable[[], Result], run_short: Callable[[], Result]
) -> tuple[Result, dict[str, float]]:
    """The result of a long run, and the share of its time in which the GPU computed.

    The time is that from opening the input to the last artifact on disk. The share is that of the packs
    (`packs`) times the part of packs that kernels fill (`filled`), which the short run tells. `short` is what
    the profiler saw of the short run itself: less, because its beginning and end weigh more.

    Args:
        model: what both runs embed with, under the fused plan.
        run_long: makes the run that is asked about.
        run_short: makes one of the same kind that may be profiled.
    """
    whole = model.encoder
    encoder = TimedEncoder(whole)
    model.encoder = encoder  # type: ignore[assignment]
    try:
        long = run_long()
        long_packs = encoder.take_seconds()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            short = run_short()
        short_packs = encoder.take_seconds()
    finally:
        model.encoder = whole
    kernels = find_kernels(profiler)
    computing = cover(kernels) / 1e9
    packs, filled = long_packs / long.seconds, computing / short_packs
    return long, {
        "gpu_busy": packs * filled,
        "packs": packs,
        "filled": filled,
        "records": long.records,
        "seconds": long.seconds,
        "scan_seconds": long.scan_seconds,
        "residues_per_s": round(long.residues_per_s),
        "short": computing / short.seconds,
        "short_records": short.records,
        "short_residues_per_s": round(short.residues_per_s),
        "short_kernels": len(kernels),
    }


def find_kernels(profiler: profile) -> NDArray[np.int64]:
    """When the kernels ran that a profiler saw: begins and ends in ns, int64 (n, 2)."""
    # Not `events()`: it makes a tree of Python objects, which takes minutes for so many.
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return np.array(
        [
            (event.start_ns(), event.start_ns() + event.duration_ns())
            for event in profiler.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
            and not event.name().startswith(NOT_KERNELS)
        ],
        dtype=np.int64,
    ).reshape(-1, 2)


def cover(intervals: NDArray[np.int64]) -> int:
    """Length of the union of intervals, int64 (n, 2)."""
    if not len(intervals):
        return 0
    begins, ends = intervals[np.argsort(intervals[:, 0])].T
    reached = np.maximum.accumulate(ends)
    gaps = np.maximum(begins[1:] - reached[:-1], 0)
    return int(reached[-1] - begins[0] - gaps.sum())
