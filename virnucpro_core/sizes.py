"""Sizes that the library takes, and the pipeline unless its settings say otherwise."""

from __future__ import annotations

CHUNK_TOKENS = 2_000_000
"""Tokens that are read and embedded at a time."""

MAX_EXPANSION = 250
"""How many times its own size a compressed input may unpack to. Proteins compress to a third or a tenth; millions
of nearly equal ones under names of their own to a hundredth. Deflate alone can reach 1000, zstd 30,000."""

EXPORT_ROWS = 200_000
"""Rows in one `.pt` file, 1.4 GB of memory to write or read; more are written as numbered shards."""
