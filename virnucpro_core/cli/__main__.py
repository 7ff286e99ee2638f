"""`python -m virnucpro_core.cli` is `virnucpro`, where no script of that name is on the path."""

from __future__ import annotations

from virnucpro_core.cli import main

main()
