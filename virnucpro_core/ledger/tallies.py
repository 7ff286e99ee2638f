"""Tallies: what workers have done in all. Unlike a job's counters they never fall, so that rates can be made of them.

Each worker adds to rows of its own: no commit waits for another's. The sum over all workers is what counts, so
those of workers long gone are put together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from sqlalchemy import Connection, text

from virnucpro_core.ledger.work import Claim, Result

CHUNK_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, float("inf"))
"""Upper bounds of the classes that chunks are sorted into by the seconds they took."""

# Sequences are labelled by what became of them: embedded, or the reason of a failure.
SEQUENCES, EMBEDDED = "sequences", "embedded"
RESIDUES, TOKENS, POSITIONS = "residues", "tokens", "positions"
CHUNKS, SECONDS = "chunks", "seconds"  # chunks are labelled by the upper bound of their class
DUPLICATES = "duplicates"
SETBACKS = "setbacks"  # labelled by their kind

TICKS = 1024
"""Parts of a second that seconds are counted in. Sums of such are exact, whatever they are put together of: a counter
that falls by a rounding error would be taken for one that began anew."""

ADD = text("""
    INSERT INTO tallies (worker_id, stage, name, label, value)
    SELECT :worker, :stage, added.* FROM unnest(CAST(:names AS text[]), CAST(:labels AS text[]),
                                                CAST(:values AS float8[])) added
    ON CONFLICT (worker_id, stage, name, label) DO UPDATE SET value = tallies.value + excluded.value
""")

FOLD = text("""
    WITH gone AS (
         DELETE FROM tallies t USING workers w
          WHERE w.id = t.worker_id AND w.id > (SELECT min(id) FROM workers)
            AND w.state <> 'live' AND w.heartbeat_at < now() - make_interval(secs => :keep)
         RETURNING t.stage, t.name, t.label, t.value)
    INSERT INTO tallies (worker_id, stage, name, label, value)
    SELECT (SELECT min(id) FROM workers), stage, name, label,
           ceil(sum(value) * :ticks) / :ticks  -- earlier versions counted seconds to the last bit
      FROM gone GROUP BY stage, name, label ORDER BY stage, name, label
    ON CONFLICT (worker_id, stage, name, label) DO UPDATE SET value = tallies.value + excluded.value
""")


def count_commit(tx: Connection, claim: Claim, result: Result) -> None:
    """Add what came of a chunk, with its commit."""
    bound = next(bound for bound in CHUNK_SECONDS if result.seconds <= bound)
    added = {(CHUNKS, str(bound)): 1.0, (SECONDS, ""): round(result.seconds * TICKS) / TICKS}
    if result.embeddings or result.failures:
        outcomes = Counter(str(failure.reason) for failure in result.failures)
        outcomes[EMBEDDED] = result.embeddings
        added |= {(SEQUENCES, outcome): count for outcome, count in outcomes.items()}
        added |= {
            (RESIDUES, ""): claim.work.range.residues,
            (TOKENS, ""): result.tokens,
            (POSITIONS, ""): result.positions,
        }
    add(tx, claim.worker_id, claim.work.stage, added)


def count_duplicate(tx: Connection, claim: Claim) -> None:
    """Add a result that was dropped, as the lease had passed to somebody else."""
    add(tx, claim.worker_id, claim.work.stage, {(DUPLICATES, ""): 1.0})


def add(tx: Connection, worker_id: int, stage: str, added: Mapping[tuple[str, str], float]) -> None:
    tx.execute(
        ADD,
        {
            "worker": worker_id,
            "stage": stage,
            "names": [name for name, _ in added],
            "labels": [label for _, label in added],
            "values": [float(value) for value in added.values()],  # an array has one type
        },
    )


def fold_tallies(tx: Connection, *, keep_days: float) -> None:
    """Give the first worker the tallies of those that have been gone for `keep_days`, or what is read would grow
    with every process that ever ran. The sums stay as they are.
    """
    tx.execute(FOLD, {"keep": keep_days * 86_400, "ticks": float(TICKS)})


@dataclass(frozen=True, slots=True)
class Tallies:
    """The sums over all workers, by stage, name and label."""

    sums: Mapping[tuple[str, str, str], float]

    def total(self, name: str) -> float:
        """Of a name, whatever the stage and the label."""
        return sum(value for (_, other, _), value in self.sums.items() if other == name)

    def by_label(self, name: str) -> dict[str, float]:
        """Of a name, whatever the stage."""
        found: defaultdict[str, float] = defaultdict(float)
        for (_, other, label), value in self.sums.items():
            if other == name:
                found[label] += value
        return dict(found)

    def chunk_seconds(self, stage: str) -> tuple[list[tuple[float, float]], float]:
        """How many of a stage's chunks took at most so many seconds, for each bound; and all their seconds."""
        classes = [self.sums.get((stage, CHUNKS, str(bound)), 0.0) for bound in CHUNK_SECONDS]
        return list(zip(CHUNK_SECONDS, accumulate(classes), strict=True)), self.sums.get(
            (stage, SECONDS, ""), 0.0
        )


def read_tallies(tx: Connection) -> Tallies:
    """All tallies; reads a few rows for each worker that has not been gone for long."""
    rows = tx.execute(text("SELECT stage, name, label, sum(value) FROM tallies GROUP BY stage, name, label"))
    return Tallies({(stage, name, label): value for stage, name, label, value in rows})
