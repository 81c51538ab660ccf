"""The page of a scaling law in a real browser."""

from pathlib import Path

import pytest
from chromium import Page
from scaling_trees import fit_tree
from selenium.webdriver.common.by import By

from swiftv2.report.scaling import write_page

pytestmark = pytest.mark.slow


def test_it_is_shown_sorted_and_dark_without_complaint(browser: Page, tmp_path: Path) -> None:
    write_page(tmp_path, fit_tree())
    browser.open(tmp_path / "index.html")
    assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth > 100)")
    light = browser.run("return getComputedStyle(document.body).backgroundColor")
    table = "[...document.querySelectorAll('table')].find(t => t.querySelector('th button'))"
    button = browser.driver.find_element(By.CSS_SELECTOR, "th button")
    browser.run("arguments[0].click()", button)
    shown = [float(one) for one in browser.run(f"return [...{table}.tBodies[0].rows].map(row => row.cells[0].dataset.value)")]
    assert len(shown) > 5
    assert shown == sorted(shown)
    browser.see(dark=True)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") != light
    browser.see(width=390)
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.complaints() == []
    assert browser.requests() == []
