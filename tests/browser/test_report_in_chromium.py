"""The page of a run in a real browser: drawn, zoomed, sorted, dark, on a phone, and without a network."""

import re
from pathlib import Path

import pytest
from chromium import Page
from made_runs import EVIL, write_run
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from swiftv2.cli import main
from swiftv2.records import read_metrics

pytestmark = pytest.mark.slow

LOSS = "document.querySelector('[data-chart][aria-label^=\"Training loss.\"]')"
INK = "return getComputedStyle(document.body).color"
TICK = f"return getComputedStyle({LOSS}.querySelector('.xtick text')).fill"
LINE = f"return getComputedStyle({LOSS}.querySelector('.scatterlayer path.js-line')).stroke"
LONG = 20_000


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of many steps, made by hand."""
    folder = tmp_path_factory.mktemp("long")
    assert main(["report", str(write_run(folder / "run", steps=LONG))]) == 0
    return folder / "run" / "report.html"


def test_a_real_run_is_drawn_from_a_file_without_complaint_or_request(browser: Page, real_run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in real_run.rglob("*")}
    assert main(["report", str(real_run), "--out", str(tmp_path / "page.html")]) == 0
    assert {path: path.stat().st_mtime_ns for path in real_run.rglob("*")} == before
    browser.open(tmp_path / "page.html")
    assert browser.look_through() == browser.run("return document.querySelectorAll('[data-chart]').length") >= 6
    losses = [row["loss"] for row in read_metrics(real_run / "metrics.jsonl")]
    assert browser.run(f"return {LOSS}.data[0].y") == pytest.approx(losses, rel=1e-5)
    # Points that lie on the line between their neighbours are left out of its path.
    path = browser.run(f"return {LOSS}.querySelector('.scatterlayer path.js-line').getAttribute('d')")
    assert len(losses) - 3 <= len(re.findall(r"[-\d.]+,[-\d.]+", path)) <= len(losses) == 8
    dots = "document.querySelector('[aria-label^=\"Held-out loss\"]').querySelectorAll('.points path').length"
    assert browser.run(f"return {dots}") == 2
    assert [card.text for card in browser.driver.find_elements(By.CSS_SELECTOR, ".card h3")] == [
        "Has it learned beyond copying?",
        "Is it healthy?",
        "Does it resume?",
    ]
    assert browser.complaints() == []
    assert browser.requests() == []


def test_charts_of_a_shared_page_are_drawn_whatever_users_are_called(browser: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=200, data={"store": "/home/line/of/text/cohort.zarr"})
    assert main(["report", str(run), "--share", "--out", str(tmp_path / "page.html")]) == 0
    browser.open(tmp_path / "page.html")
    assert browser.look_through() == browser.run("return document.querySelectorAll('[data-chart]').length") >= 3
    assert browser.complaints() == []


def test_thousands_of_steps_are_drawn_with_their_peaks(browser: Page, long_page: Path) -> None:
    browser.open(long_page)
    browser.wait(f"return {LOSS}.dataset.drawn", 30) if browser.run(f"{LOSS}.scrollIntoView()") is None else None
    points = browser.run(f"return {LOSS}.data.map(trace => trace.x.length)")
    assert 4990 <= points[0] <= 5000
    assert points[1] <= 5000
    assert browser.run(f"return Math.max(...{LOSS}.data[0].y)") == 9.0
    caption = browser.run(f"return {LOSS}.closest('figure').querySelector('figcaption').textContent")
    assert "20,000 steps, drawn by the lowest and highest" in caption
    assert browser.complaints() == []


def test_dragging_zooms_all_curves_and_a_button_shows_all_again(browser: Page, long_page: Path) -> None:
    browser.open(long_page)
    browser.look_through()
    browser.run(f"{LOSS}.scrollIntoView({{block: 'center'}})")
    whole = browser.run(f"return {LOSS}.layout.xaxis.range")
    area = browser.driver.find_element(By.CSS_SELECTOR, "[aria-label^='Training loss.'] .nsewdrag")
    width = area.size["width"]
    chain = ActionChains(browser.driver).move_to_element_with_offset(area, -width // 4, 0).click_and_hold()
    chain.move_by_offset(width // 4, 2).move_by_offset(width // 8, 2).release().perform()
    browser.wait(f"return {LOSS}.layout.xaxis.range[1] < 0.8 * {whole[1]}")
    zoomed = browser.run(f"return {LOSS}.layout.xaxis.range")
    assert zoomed[0] == pytest.approx(LONG / 4, rel=0.05)
    assert zoomed[1] == pytest.approx(LONG * 5 / 8, rel=0.05)
    norm = "document.querySelector('[aria-label^=\"Gradient norm\"]')"
    assert browser.wait(f"return {norm}.layout.xaxis.range[0] > 100 && {norm}.layout.xaxis.range") == pytest.approx(zoomed)
    # The zoom survives a change of the colour scheme.
    browser.see(dark=True)
    browser.wait(f"return {LOSS}.layout.font.color === '#e8e8ec'")
    assert browser.run(f"return {LOSS}.layout.xaxis.range") == pytest.approx(zoomed)
    browser.run(f"{LOSS}.closest('figure').querySelector('[data-tool=all]').click()")
    browser.wait(f"return Math.abs({norm}.layout.xaxis.range[1] - {whole[1]}) < 2")
    browser.run(f"{LOSS}.closest('figure').querySelector('[data-tool=log]').click()")
    browser.wait(f"return {LOSS}.layout.yaxis.type === 'log'")
    assert browser.complaints() == []


def test_both_schemes_are_readable_and_change_without_loading(browser: Page, long_page: Path) -> None:
    browser.open(long_page)
    browser.look_through()
    light = [browser.run(one) for one in (INK, TICK, LINE)]
    browser.see(dark=True)
    browser.wait(f"return getComputedStyle({LOSS}.querySelector('.xtick text')).fill !== '{light[1]}'")
    dark = [browser.run(one) for one in (INK, TICK, LINE)]
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert dark[0] == dark[1] == "rgb(232, 232, 236)"


def test_a_phone_scrolls_in_one_direction_only(browser: Page, long_page: Path) -> None:
    browser.open(long_page, width=390)
    browser.look_through()
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.run("return [...document.querySelectorAll('.plot svg.main-svg')].every(s => s.clientWidth <= 390)")


def test_tables_sort_by_their_values(browser: Page, tmp_path: Path) -> None:
    assert main(["report", str(write_run(tmp_path / "run"))]) == 0
    browser.open(tmp_path / "run" / "report.html")
    column = "[...document.querySelectorAll('#timeline tbody tr')].map(row => row.cells[0].dataset.value)"
    times = [float(value) for value in browser.run(f"return {column}")]
    button = browser.driver.find_element(By.CSS_SELECTOR, "#timeline th button")
    for expected in (sorted(times), sorted(times, reverse=True)):
        browser.run("arguments[0].click()", button)
        assert [float(value) for value in browser.run(f"return {column}")] == expected
    assert browser.run("return document.querySelector('#timeline th').getAttribute('aria-sort')") == "descending"


def test_runs_side_by_side_share_their_curves_and_unfold(browser: Page, tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, steps=steps, optimizer={"lr": lr})
        for name, steps, lr in (("a", 200, 0.1), ("<b>&", 300, 0.2))
    ]
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "both.html")]) == 0
    browser.open(tmp_path / "both.html")
    drawn = browser.look_through()
    assert browser.run(f"return {LOSS}.data.filter(t => t.showlegend !== false).map(t => t.name)") == ["a", "&lt;b>&amp;"]
    for details in browser.driver.find_elements(By.CSS_SELECTOR, "details.run"):
        browser.run("arguments[0].open = true", details)
    assert browser.look_through() > drawn
    assert browser.complaints() == []


def test_names_of_a_run_stay_text(browser: Page, tmp_path: Path) -> None:
    event = '{"event": "failed", "step": 3, "attempt": 1, "time": 1790000003.0, "problem": "<img src=x onerror=alert(1)>"}\n'
    run = write_run(tmp_path / "run", model={"name": EVIL}, made={"events.jsonl": event})
    assert main(["report", str(run)]) == 0
    browser.open(run / "report.html")
    browser.look_through()
    assert "owned" not in browser.driver.title
    assert browser.run("return document.querySelectorAll('img[src=x], b').length") == 0
    assert EVIL in browser.run("return document.body.textContent")
    assert browser.complaints() == []
    assert browser.requests() == []
