"""Sampling: some rows of a matrix of any size, drawn by a fixed rule, and what they look like in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from virnucpro_core.features.matrices import Matrix

SAMPLE_ROWS = 5_000
SEED = 0
LEAST_ROWS = 3
"""Rows that a projection needs: two points always lie on a line."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of a matrix.

    Attributes:
        rows: of the matrix they were drawn from.
        records: int64 (k,), the records that they are the embeddings of, rising.
        norms: float64 (k,), their Euclidean lengths.
        projection: None of fewer than `LEAST_ROWS`.
    """

    rows: int
    records: npt.NDArray[np.int64]
    norms: Floats
    projection: Projection | None


@dataclass(frozen=True, slots=True)
class Projection:
    """Points on their first two principal components.

    Attributes:
        points: float64 (k, 2).
        shares: float64 (2,), the share of the variance that each component explains, from 0 to 1.
    """

    points: Floats
    shares: Floats


def take_sample(matrix: Matrix) -> Sample:
    """Draws rows of a matrix and measures them; reads nothing else of it."""
    rows = draw_rows(len(matrix))
    embeddings = matrix.take(rows).astype(np.float64)
    return Sample(
        rows=len(matrix),
        records=matrix.records[rows],
        norms=np.linalg.norm(embeddings, axis=1),
        projection=project(embeddings) if len(rows) >= LEAST_ROWS else None,
    )


def draw_rows(rows: int, most: int = SAMPLE_ROWS) -> npt.NDArray[np.int64]:
    """At most so many of the numbers below `rows`, int64, rising; the same ones whenever it is asked."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(SEED).choice(rows, most, replace=False, shuffle=False))


def project(embeddings: Floats) -> Projection:
    """Principal components of rows: float64 (k, width), at least `LEAST_ROWS` of them.

    Of each component the point farthest from 0 is on the positive side: a sign has no meaning of its own.
    """
    centred = embeddings - embeddings.mean(axis=0)
    rows, width = centred.shape
    # Either way the eigenvectors of the smaller of the two products.
    if rows >= width:
        _, axes = np.linalg.eigh(centred.T @ centred)
        points = centred @ axes[:, :-3:-1]
    else:
        squares, axes = np.linalg.eigh(centred @ centred.T)
        points = axes[:, :-3:-1] * np.sqrt(np.maximum(squares[:-3:-1], 0))
    farthest = points[np.abs(points).argmax(axis=0), [0, 1]]
    points = points * np.where(farthest < 0, -1, 1)
    variance = np.square(centred).sum()
    shares = np.square(points).sum(axis=0) / variance if variance else np.zeros(2)
    return Projection(points, shares)
