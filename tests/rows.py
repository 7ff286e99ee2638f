"""Rows of embeddings to write, merge and validate."""

from __future__ import annotations

import numpy as np


def make_rows(rows: int, width: int = 1280) -> np.ndarray:
    """So many random rows, the same for the same number, as float32."""
    return np.random.default_rng(rows).standard_normal((rows, width), dtype=np.float32)
