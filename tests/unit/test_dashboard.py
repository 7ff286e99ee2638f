"""The dashboard that is committed is the one that the code builds."""

from __future__ import annotations

import json

import pytest
import yaml

from monitoring.dashboard import FILE, SOURCE, build
from virnucpro_core.ledger.database import CONNECT_TIMEOUT

pytestmark = pytest.mark.unit


def test_the_committed_dashboard_is_the_one_that_the_code_builds() -> None:
    assert FILE.read_text() == build(), "run `python -m monitoring.dashboard`"


def test_every_panel_asks_the_data_source_that_is_provisioned() -> None:
    provisioned = (FILE.parents[1] / "provisioning" / "datasources" / "prometheus.yml").read_text()
    assert f"uid: {SOURCE.uid} " in provisioned
    panels = [panel for panel in json.loads(build())["panels"] if panel["type"] != "row"]
    assert len(panels) > 15
    for panel in panels:
        assert panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {SOURCE.uid}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_scrape_outlasts_the_search_for_a_ledger_that_is_away() -> None:
    """A scrape that is cut off first says that the metrics are away, and nothing of the ledger."""
    written = yaml.safe_load((FILE.parents[2] / "prometheus" / "prometheus.yml").read_text())["global"]
    timeout, interval = (
        int(written[name].removesuffix("s")) for name in ("scrape_timeout", "scrape_interval")
    )
    assert CONNECT_TIMEOUT + 2 <= timeout <= interval
