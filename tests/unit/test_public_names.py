"""The package's public names load on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import virnucpro_core

pytestmark = pytest.mark.unit


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, virnucpro_core; print({'torch', 'transformers'} & sys.modules.keys() or None)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "None"


@pytest.mark.parametrize("name", virnucpro_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(virnucpro_core, name).__name__ == name
    assert name in dir(virnucpro_core)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'embed_all'"):
        _ = virnucpro_core.embed_all  # type: ignore[attr-defined]
