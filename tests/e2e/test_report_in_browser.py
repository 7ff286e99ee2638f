"""The report in a browser: it opens without a network, shows its charts, and runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.report_contents import contents_of
from virnucpro_core.htmlreport.page import render
from virnucpro_core.htmlreport.sampling import SAMPLE_ROWS

if TYPE_CHECKING:
    from tests.fixtures_browser import Browser

pytest_plugins = ["tests.fixtures_browser"]
pytestmark = pytest.mark.system


@pytest.mark.parametrize("rows", [10, SAMPLE_ROWS + 1])
def test_report_opens_without_a_network(browser: Browser, tmp_path: Path, rows: int) -> None:
    page = tmp_path / "proteins.report.html"
    page.write_text(render(contents_of(rows)))
    browser.open(page.as_uri())
    browser.see("Counts", "h2")
    for chart in ("lengths", "speed", "norms", "projection"):
        image = browser.find(f"#{chart}")
        assert int(image.get_property("naturalWidth")) > 300, chart  # it was decoded
    browser.see("<script>", "#failures")  # as text
    assert browser.driver.execute_script("return document.scripts.length") == 0
    assert "VirNucPro" in browser.driver.title

    browser.read_logs()
    # "chrome" are those of the empty window that the browser begins with.
    asked = [url for url in browser.requests if urlsplit(url).scheme not in ("data", "chrome")]
    assert asked == [page.as_uri()]
    # The fixture takes a file for a place outside of this machine.
    browser.requests.remove(page.as_uri())


def test_browser_tells_of_a_page_that_asks_for_something(browser: Browser, tmp_path: Path) -> None:
    """The control: what the test above rules out would be seen."""
    page = tmp_path / "bad.report.html"
    text = render(contents_of())
    page.write_text(text.replace("<h2>Counts", "<img src='http://example.org/x.png'><h2>Counts", 1))
    browser.open(page.as_uri())
    browser.see("Counts", "h2")
    browser.read_logs()
    assert any("Content Security Policy" in line for line in browser.console)
    browser.console.clear()
    browser.requests = [url for url in browser.requests if url.startswith("data:")]
