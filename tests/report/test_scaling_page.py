"""The page of a scaling law: complete, in one file, with what speaks against the law, whatever names a table holds."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from scaling_trees import BUDGETS, GRID, OFF, coordinates_tree, fit_tree, prediction_tree, transfer_tree

from swiftv2.report.markup import Content, document, number
from swiftv2.report.scaling import sections, write_page

OF_FIT = ("loss_against_compute", "loss_against_tokens", "loss_against_parameters", "residuals")
VOID = {"meta", "img"}
SCATTERED = tuple((n, d * (1 + 0.7 * place)) for place, (n, d) in enumerate(GRID))
"""Sizes and tokens that make no budgets of equal compute."""


class Reader(HTMLParser):
    """Texts, elements and links of a page; elements must be closed as they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            self.cells[-1] += data


def read(page: Path | bytes) -> Reader:
    """A page by its folder, or by its bytes."""
    reader = Reader()
    reader.feed((page if isinstance(page, bytes) else (page / "index.html").read_bytes()).decode())
    reader.close()
    assert not reader.open
    return reader


def worded(*parts: list[Content]) -> Reader:
    """Parts of a page without its figures, which take long to draw."""
    return read(document("words", [one for part in parts for one in part]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Path, ...], dict[str, Any]]:
    """A page with all parts, of a fit with one run off whose name is HTML."""
    folder = tmp_path_factory.mktemp("page") / "law"
    fit = fit_tree()
    extra = {"transfer": transfer_tree(), "coordinates": coordinates_tree(2), "prediction": prediction_tree()}
    return folder, write_page(folder, fit, **extra), fit


def test_all_files_are_written_and_the_page_needs_none_of_them(whole: tuple[Path, tuple[Path, ...], dict[str, Any]]) -> None:
    folder, paths, fit = whole
    names = {f"{name}.{ending}" for name in (*OF_FIT, "transfer", "coordinates") for ending in ("svg", "png")}
    names |= set() if "refused" in fit["isoflop"] else {"isoflop.svg", "isoflop.png"}
    assert paths[0] == folder / "index.html"
    assert {path.name for path in paths} == names | {"index.html"} == {path.name for path in folder.iterdir()}
    page = read(folder)
    inside = [source for source in page.sources if source.startswith("data:image/svg+xml;base64,")]
    assert {base64.b64decode(source.split(",")[1]) for source in inside} == {
        path.read_bytes() for path in paths if path.suffix == ".svg"
    }
    # Links lead to the files beside the page, and nowhere else.
    assert set(page.sources) - set(inside) == names
    assert {"link", "iframe", "object"}.isdisjoint(page.tags)
    assert "@import" not in (folder / "index.html").read_text()


def test_names_from_tables_stay_text(whole: tuple[Path, tuple[Path, ...], dict[str, Any]]) -> None:
    folder, _, fit = whole
    page = read(folder)
    assert OFF in page.cells
    assert prediction_tree()["config"] in page.cells
    assert "b" not in page.tags
    evil = {
        **fit,
        "table": "</title><script>alert(1)</script>",
        "warnings": ["</script><img src=x onerror=alert(1)>", "\ud800"],
    }
    page = read(document(evil["table"], [*sections.heading(evil), *sections.warnings(evil), *sections.method(evil)]))
    assert page.tags.count("script") == 1
    assert "x" not in page.sources
    assert evil["warnings"][0] in page.texts


def test_the_law_is_told_with_intervals_and_warnings_before_figures(
    whole: tuple[Path, tuple[Path, ...], dict[str, Any]],
) -> None:
    folder, _, fit = whole
    page = read(folder)
    says = next(text for text in page.texts if text.startswith("Loss falls towards E"))
    for name in ("E", "alpha", "beta", "a", "b"):
        low, high = fit["intervals"][name]
        assert f"{name} = {number(fit[name])} (" in says
        assert f"{number(low)} to {number(high)}" in says
    whole_text = " ".join(page.texts)
    assert fit["warnings"]
    for warning in fit["warnings"]:
        assert whole_text.index(says) < whole_text.index(warning) < whole_text.index("Figures")
    told = fit["extrapolation"]
    inside = "inside" if told["interval"][0] <= told["measured"] <= told["interval"][1] else "outside"
    assert f"measured is {number(told['measured'])}, {inside} that interval" in whole_text


def test_a_run_outside_its_interval_is_said_to_be_so() -> None:
    fit = fit_tree()
    fit["extrapolation"] = {**fit["extrapolation"], "measured": 2 * fit["extrapolation"]["interval"][1]}
    assert ", outside that interval" in " ".join(worded(sections.summary(fit)).texts)


def test_every_constant_and_run_is_in_a_table(whole: tuple[Path, tuple[Path, ...], dict[str, Any]]) -> None:
    folder, _, fit = whole
    page = read(folder)
    for name in ("E", "A", "alpha", "B", "beta", "a", "b"):
        place = page.cells.index(name)
        low, high = fit["intervals"][name]
        assert page.cells[place + 1 : place + 4] == [
            number(fit[name], 5),
            f"{number(low)} to {number(high)}",
            number(fit["standard_errors"][name], 2),
        ]
    for point in fit["points"]:
        place = page.cells.index(point["name"])
        assert page.cells[place - 1] == str(point["row"])
        assert page.cells[place + 4] == number(point["loss"])
        assert page.cells[place + 7] == (point["why"] or "")
    raw = (folder / "index.html").read_text()
    values = [float(value) for value in re.findall(r'data-value="([^"]+)"', raw)]
    # Titles sort by numbers as they are, not as they are shown.
    assert {point["tokens"] for point in fit["points"]} <= set(values)
    assert raw.count('<button type="button">') == 9


def test_prediction_is_told(whole: tuple[Path, tuple[Path, ...], dict[str, Any]]) -> None:
    page = read(whole[0])
    cells = dict(zip(page.cells, page.cells[1:], strict=False))
    assert cells["best parameters"] == "2.10e9 (1.50e9 to 2.90e9)"
    assert cells["loss"] == "2.310 (2.290 to 2.330)"
    assert cells["size to train"] == "2B"
    assert cells["hours"] == "7.5 h"
    assert "6.90 times" in cells["extrapolation"]
    assert prediction_tree()["warnings"][0] in page.texts
    given = {**prediction_tree(), "parameters_interval": None, "nodes": None, "hours": None, "config": None}
    page = worded(sections.prediction(given))
    assert "2.10e9" in page.cells
    assert "nodes" not in page.cells


@pytest.mark.slow
def test_what_was_refused_is_shown_with_the_reason(tmp_path: Path) -> None:
    write_page(tmp_path, fit_tree(BUDGETS, off=None))
    assert (tmp_path / "isoflop.svg").is_file()
    fit = fit_tree(SCATTERED, off=None)
    fit["extrapolation"] = {"refused": "without the largest budget: only two sizes"}
    paths = write_page(tmp_path, fit)
    page = read(tmp_path)
    told = " ".join(page.texts)
    assert "isoFLOP parabolas: refused" in told
    for tree in (fit["isoflop"], fit["repeated"], fit["extrapolation"]):
        assert tree["refused"] in told
    # The picture of the earlier fit would be taken for one of this.
    assert not (tmp_path / "isoflop.svg").exists()
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}


def test_a_law_that_is_not_borne_out_is_not_told_as_one() -> None:
    fit = fit_tree()
    fit["intervals"] = {**fit["intervals"], "beta": [-0.1, 0.4]}
    fit["monotone"] = {**fit["monotone"], "tokens": {"holds": False, "why": "not monotone: longer training is worse"}}
    told = " ".join(worded(sections.summary(fit), sections.checks(fit)).texts)
    assert "These runs do not show that loss falls with tokens" in told
    assert "Loss falls towards" not in told
    assert "not monotone: longer training is worse" in told


@pytest.mark.slow
def test_the_same_fit_gives_the_same_page_also_from_json(
    whole: tuple[Path, tuple[Path, ...], dict[str, Any]], tmp_path: Path
) -> None:
    _, paths, fit = whole
    again = json.loads(json.dumps([fit, transfer_tree(), coordinates_tree(2), prediction_tree()]))
    write_page(tmp_path, again[0], transfer=again[1], coordinates=again[2], prediction=again[3])
    for path in paths:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_nothing_is_written_where_a_figure_fails(tmp_path: Path) -> None:
    broken = {key: value for key, value in fit_tree().items() if key != "envelope"}
    with pytest.raises(KeyError):
        write_page(tmp_path / "law", broken)
    assert not (tmp_path / "law").exists()


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(1.8699, 4, "1.870"), (118.3, 2, "118"), (3.2e19, 2, "3.2e19"), (0.0, 4, "0"), (-0.5, 2, "-0.50"), (2e-7, 3, "2.00e-7")],
)
def test_numbers_keep_their_digits(value: float, digits: int, shown: str) -> None:
    assert number(value, digits) == shown
