"""A real Chromium without a window, as people's browsers are: what it draws, says on its console and asks of the network."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemons import installed
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

PROGRAMS = {"chromium": "chromium", "chromedriver": "chromium-driver"}
"""Each program that is needed, and its package in Debian."""
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_HERE = ("file:", "data:", "blob:", "chrome:", "about:")


def lacking() -> str | None:
    """Why no Chromium can be started here, in one line, after missing packages were installed where that can be done."""
    packages = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    return installed(packages) if packages else None


@contextmanager
def started(profile: Path) -> Iterator["Page"]:
    """A browser with a profile of its own."""
    options = Options()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    """A window and what is looked at in it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Open a file; what earlier pages left in the logs is forgotten."""
        self.see(width=width, dark=dark)
        self.driver.get("about:blank")
        self.complaints(), self.requests()
        self.driver.get(path.resolve().as_uri())

    def see(self, *, width: int = 1280, dark: bool = False) -> None:
        """Look by another width or colour scheme, without loading anew."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """What a script returns once that is true."""
        until = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < until, f"not true after {seconds:g} s: {script}"
            time.sleep(0.05)
        return found

    def look_through(self) -> int:
        """Scroll down to the end, as charts are drawn when they come into view; how many there are."""
        for place in range(0, int(self.run("return document.documentElement.scrollHeight")) + 900, 600):
            self.run("scrollTo(0, arguments[0])", place)
            time.sleep(0.02)
        self.wait("return [...document.querySelectorAll('[data-chart]')].every(p => p.dataset.drawn || !p.checkVisibility())")
        return int(self.run("return document.querySelectorAll('[data-chart][data-drawn]').length"))

    def complaints(self) -> list[str]:
        """What stands on the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """What was asked of a network since the last call."""
        told = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        asked = [one["params"]["request"]["url"] for one in told if one["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(_HERE)]
