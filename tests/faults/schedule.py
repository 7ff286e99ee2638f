"""Schedules: a seed says which faults strike, where, and how many chunks are done by then."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.traps import ACTIONS, STEPS, TRANSACTION_FAULTS

LEAST, MOST = 2, 5  # faults in a schedule
LAST = 100  # a fault strikes once this many chunks are done, at the latest

LAUNCHERS = ["a", "b"]
TRAPS = [
    f"{queue}.{step}.{action}"
    for queue in ("extract", "finish")
    for step in STEPS
    for action in [*ACTIONS, *(TRANSACTION_FAULTS if step == "committing" else ())]
    # A finishing child reports no records; one that stops inside a transaction is woken before its lease ends.
    if not (queue == "finish" and step == "extracting")
]

KINDS: dict[str, tuple[int, list[str]]] = {
    "kill child": (2, LAUNCHERS),
    "kill parent": (2, LAUNCHERS),
    "kill both": (2, LAUNCHERS),
    "kill launcher": (1, LAUNCHERS),
    "terminate launcher": (2, LAUNCHERS),
    "stop child": (2, LAUNCHERS),
    "trap": (14, TRAPS),
    "kill relay": (2, [""]),
    "stop relay": (1, [""]),
    "restart broker": (2, ["kept", "lost"]),
    "broker down": (2, [""]),
    "flush broker": (2, [""]),
    "reset broker": (2, [""]),
    "repeat messages": (2, [""]),
    "garbage": (2, ["extract", "finish"]),
    "restart database": (3, ["fast", "immediate"]),
    "database down": (2, ["fast", "immediate"]),
    "cut connections": (2, [""]),
    "damage artifact": (3, ["deleted", "cut", "flipped"]),
    "block output": (2, ["extract", "merge", "validate"]),
}
"""How likely each fault is, and where it may strike."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a schedule.

    Attributes:
        after: chunks that are done when it strikes.
        kind: its name in `faults.STRIKES`.
        where: what the kind does it to.
        seconds: until it is undone, if it is something that lasts.
    """

    after: int
    kind: str
    where: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind}{self.where and ' '}{self.where}@{self.after}"


def plan(seed: int) -> list[Fault]:
    """The schedule of a seed, in the order of time."""
    draw = random.Random(seed)
    names = list(KINDS)
    weights = [KINDS[name][0] for name in names]
    kinds = draw.choices(names, weights, k=draw.randint(LEAST, MOST))
    faults = [
        Fault(
            after=draw.randint(0, LAST),
            kind=kind,
            where=draw.choice(KINDS[kind][1]),
            # up to twice the lease: what half a minute is at default settings
            seconds=round(draw.uniform(0.3, 6.0), 1),
        )
        for kind in kinds
    ]
    return sorted(faults, key=lambda fault: fault.after)
