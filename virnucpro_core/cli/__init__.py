"""The `virnucpro` command."""

from virnucpro_core.cli.application import main

__all__ = ["main"]
