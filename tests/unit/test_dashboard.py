"""The dashboard that is committed is the one that the code builds."""

from __future__ import annotations

import json

import pytest

from monitoring.dashboard import FILE, SOURCE, build

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
