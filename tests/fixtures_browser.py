"""A headless Chromium that a person's clicks are made with: `pytest_plugins = ["tests.fixtures_browser"]`.

def test_something(browser):
    browser.open("http://127.0.0.1:5555/")
    browser.click("#workers")
    browser.see("1 worker")

Chromium and its driver are those of the system (Debian: chromium, chromium-driver); nothing is downloaded. After each
test it is checked that no page wrote an error to the console and none asked for anything outside this machine.
With SCREENSHOTS=folder in the environment, `browser.picture(name)` stores what is seen there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 60.0  # that anything may take to appear on two busy cores
WIDTH, HEIGHT = 1400, 1000  # pixels
HERE = ("127.0.0.1", "localhost")
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    f"--window-size={WIDTH},{HEIGHT}",
    # Whatever is asked of another machine fails, and shows as an error.
    f"--host-resolver-rules=MAP * ~NOTFOUND, {', '.join(f'EXCLUDE {host}' for host in HERE)}",
]


class Browser:
    """One browser window; selectors are CSS.

    Attributes:
        driver: for what is not offered here.
        allowed: texts in console messages that are expected, such as that of a page refused on purpose.
        downloads: where files are stored that a person downloads.
    """

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads
        self.allowed: list[str] = []
        self.console: list[str] = []
        self.requests: list[str] = []

    def open(self, url: str) -> None:
        self.driver.get(url)

    def find(self, selector: str, text: str = "") -> WebElement:
        """The first visible element with that text in it, once there is one."""

        def look(driver: Any) -> WebElement | None:
            try:
                found = driver.find_elements(By.CSS_SELECTOR, selector)
                return next((one for one in found if one.is_displayed() and text in one.text), None)
            except StaleElementReferenceException:
                return None

        return self.wait(look, f"{selector} with {text!r}")

    def see(self, text: str, selector: str = "body") -> WebElement:
        return self.find(selector, text)

    def click(self, selector: str, text: str = "") -> None:
        """Click on an element once it is there; a live page may replace it at the last moment."""

        def try_it(_: Any) -> bool:
            try:
                element = self.find(selector, text)
                if not element.is_enabled():  # a click would do nothing, and raise nothing
                    return False
                element.click()
            except (StaleElementReferenceException, ElementNotInteractableException):
                return False
            return True

        self.wait(try_it, f"a click on {selector} {text!r}")

    def type(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def wait(self, condition: Any, what: str, seconds: float = SECONDS) -> Any:
        return WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(
            condition, f"{what} did not come; the page says:\n{self.text()[:3000]}"
        )

    def text(self) -> str:
        return str(self.driver.execute_script("return document.body ? document.body.innerText : ''"))

    @contextmanager
    def frame(self, selector: str = "iframe") -> Iterator[None]:
        """What is done meanwhile is done inside a frame of the page."""
        self.driver.switch_to.frame(self.find(selector))
        try:
            yield
        finally:
            self.driver.switch_to.default_content()

    def picture(self, name: str) -> None:
        """Store what is seen as a PNG file, if the environment asks for pictures."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            assert self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def read_logs(self) -> None:
        """Take over what the browser logged since the last time."""
        for entry in self.driver.get_log("browser"):  # type: ignore[no-untyped-call]
            if entry["level"] in ("SEVERE", "ERROR"):
                self.console.append(entry["message"])
        for entry in self.driver.get_log("performance"):  # type: ignore[no-untyped-call]
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    def faults(self) -> list[str]:
        """Errors on the console, and requests to the outside."""
        self.read_logs()
        errors = [line for line in self.console if not any(text in line for text in self.allowed)]
        outside = [url for url in self.requests if is_outside(url)]
        assert self.requests, "the browser has logged no request at all"
        return errors + outside


def is_outside(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in HERE


def require_program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed (Debian: apt install chromium chromium-driver)")
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A fresh browser that nobody is logged in with."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    options = webdriver.ChromeOptions()
    options.binary_location = require_program("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(require_program("chromedriver")))
    opened = Browser(driver, downloads)
    try:
        yield opened
        assert opened.faults() == []
    finally:
        driver.quit()
