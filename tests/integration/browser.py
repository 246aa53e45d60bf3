"""A real browser (headless Chromium) for tests that look at pages: what is shown, asked for, and complained about.

with browser(1600, 1000) as page:
    page.open(url)
    page.until(lambda: page.all("table tr"), "the table")
    assert page.errors() == []
    page.screenshot("table")      # tests/integration/screenshots/table.png, for people
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")
SCREENSHOTS = Path(__file__).parent / "screenshots"
# On a busy machine all waits are this many times longer.
PATIENCE = float(os.environ.get("CRISM_MLOPS_TEST_PATIENCE", "1"))
_BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, _BINARIES)), None)


def no_browser() -> str | None:
    """Why there is no browser to look with, for `pytest.mark.skipif`; None where there is one."""
    if _browser() is None:
        return "no Chromium: apt-get install chromium chromium-driver"
    return None if shutil.which("chromedriver") else "no chromedriver: apt-get install chromium-driver"


class Page:
    """A tab of the browser, from `browser`."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self._errors: list[str] = []
        self._urls: list[str] = []

    def open(self, url: str) -> None:
        """Go to a URL (also file:), anew even where only what follows a # differs."""
        if self.driver.current_url.partition("#")[0] == url.partition("#")[0]:
            self.driver.get("about:blank")
        self.driver.get(url)

    def all(self, css: str) -> list[WebElement]:
        """The elements that a CSS selector finds now."""
        return list(self.driver.find_elements(By.CSS_SELECTOR, css))

    def script(self, text: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(text, *arguments)

    def text(self, css: str = "body") -> str:
        """The visible text of the first such element; empty without one."""
        found = self.all(css)
        return found[0].text if found else ""

    def until(self, condition: Callable[[], T], what: str, seconds: float = 30.0) -> T:
        """The first true answer. Raises AssertionError, with a screenshot, where there is none in time."""
        end = time.monotonic() + seconds * PATIENCE
        while True:
            try:
                if answer := condition():
                    return answer
            except StaleElementReferenceException:
                pass  # The page drew it anew meanwhile.
            if time.monotonic() > end:
                place = self.screenshot("not-found")
                raise AssertionError(f"{what}: not within {seconds} s at {self.driver.current_url}; see {place}")
            time.sleep(0.1)

    def until_text(self, *words: str, seconds: float = 30.0) -> None:
        """Wait until the page shows all of these words."""
        self.until(lambda: all(word in self.text() for word in words), f"the words {words}", seconds)

    def click(self, css: str, text: str = "") -> None:
        """Click the first visible element of a selector whose text is `text`, once there is one."""

        def clicked() -> bool:
            for element in self.all(css):
                if element.is_displayed() and (not text or element.text.strip() == text):
                    self.script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)
                    return True
            return False

        self.until(clicked, f"{css} {text}")

    def broken_images(self) -> list[str]:
        """Sources of the images that did not load."""
        return [str(source) for source in self.script(
            "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src.slice(0, 200))"
        )]  # fmt: skip

    def errors(self) -> list[str]:
        """What the console has called severe since the browser started."""
        self._errors += [row["message"] for row in self.driver.get_log("browser") if row["level"] == "SEVERE"]
        return self._errors

    def requests(self) -> list[str]:
        """Every URL that was asked for since the browser started."""
        for row in self.driver.get_log("performance"):
            message = json.loads(row["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._urls.append(str(message["params"]["request"]["url"]))
        return self._urls

    def screenshot(self, name: str) -> Path:
        """Write what is visible to SCREENSHOTS/NAME.png."""
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path


@contextmanager
def browser(width: int = 1600, height: int = 1000) -> Iterator[Page]:
    """A browser of its own (no history, nothing stored), with a page of exactly so many pixels."""
    options = Options()
    options.binary_location = _browser() or ""
    for word in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--no-first-run", f"--window-size={width},{height}",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Named: left to find one itself, selenium asks the internet.
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(60 * PATIENCE)
        # The window's own frame takes some of its height.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield Page(driver)
    finally:
        driver.quit()
