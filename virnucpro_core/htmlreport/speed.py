"""Speed: tokens per second over time, per worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt

from virnucpro_core.ledger.runs import ChunkRun

MOST_STEPS = 120
LEAST_STEP = 0.5  # seconds
MOST_LINES = 8
"""Workers that are told apart in a chart."""

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class WorkerShare:
    """What one node did for a job; `seconds` are those that its device computed."""

    node: str
    host: str
    device: str
    chunks: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a job was embedded.

    Attributes:
        started_at: when the first chunk was claimed.
        edges: float64 (steps + 1,), seconds since then at which steps of time begin and end.
        rates: by worker, float64 (steps,), its tokens per second in each step. Where there are many, those that did
            least are one, called `… others`.
        workers: what each worker did, the most tokens first.
    """

    started_at: datetime
    edges: Floats
    rates: dict[str, Floats]
    workers: list[WorkerShare]

    @property
    def seconds(self) -> float:
        """From the first claim to the end of the last computation."""
        return float(self.edges[-1])


def measure_speed(runs: Sequence[ChunkRun]) -> Speed | None:
    """Spreads the tokens of each chunk evenly over the seconds that it took; None without a chunk."""
    if not runs:
        return None
    started_at = min(run.started_at for run in runs)
    begins = np.array([(run.started_at - started_at).total_seconds() for run in runs])
    ends = begins + np.maximum([run.seconds for run in runs], 1e-3)
    tokens = np.array([run.tokens for run in runs], dtype=np.float64)
    steps = int(np.clip(ends.max() / LEAST_STEP, 1, MOST_STEPS))
    edges = np.linspace(0.0, float(ends.max()), steps + 1)
    workers = share_work(runs)
    named = {worker.node: worker.node for worker in workers}
    if len(workers) > MOST_LINES:
        others = workers[MOST_LINES - 1 :]
        named |= {worker.node: f"{len(others)} others" for worker in others}
    rates: dict[str, Floats] = {}
    for place, run in enumerate(runs):
        until = np.clip((edges - begins[place]) / (ends[place] - begins[place]), 0, 1) * tokens[place]
        rates.setdefault(named[run.node], np.zeros(steps))
        rates[named[run.node]] += np.diff(until) / np.diff(edges)
    ordered = dict.fromkeys(named.values())
    return Speed(started_at, edges, {name: rates[name] for name in ordered}, workers)


def share_work(runs: Sequence[ChunkRun]) -> list[WorkerShare]:
    """What each node did, the most tokens first."""
    shares: dict[str, WorkerShare] = {}
    for run in runs:
        share = shares.setdefault(run.node, WorkerShare(run.node, run.host, run.device))
        share.chunks += 1
        share.tokens += run.tokens
        share.seconds += run.seconds
    return sorted(shares.values(), key=lambda share: (-share.tokens, share.node))
