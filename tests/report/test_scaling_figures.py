"""Figures of scaling laws: what they show is what the tree says, and the same tree gives the same bytes."""

import copy
import struct
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scaling_trees import BUDGETS, GRID, NOISE, coordinates_tree, fit_tree, transfer_tree

from swiftv2.errors import SwiftError
from swiftv2.report.scaling import (
    coordinates,
    isoflop,
    loss_against_compute,
    loss_against_parameters,
    loss_against_tokens,
    residuals,
    save_figure,
    transfer,
)
from swiftv2.report.scaling.law import Floats, law_of
from swiftv2.report.scaling.style import ALARM, INK, PAGE_INCHES, render

VIEWS = {"flops": loss_against_compute, "tokens": loss_against_tokens, "parameters": loss_against_parameters}


def xs(line: Line2D) -> Floats:
    """Places of a line along x."""
    return np.asarray(line.get_xdata(), dtype=float)


def ys(line: Line2D) -> Floats:
    """Heights of a line."""
    return np.asarray(line.get_ydata(), dtype=float)


def points_of(axes: Axes, *, hollow: bool) -> set[tuple[float, float]]:
    """Places of round, square... markers of runs: those that are off are hollow."""
    lines = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_marker() not in ("*", "_", "|")]
    lines = [line for line in lines if (to_hex(line.get_markeredgecolor()) == ALARM) is hollow]
    return {(float(x), float(y)) for line in lines for x, y in zip(xs(line), ys(line), strict=True)}


def black_lines(axes: Axes) -> tuple[Line2D, Line2D]:
    """The law's line: solid where runs are, dashed beyond them."""
    solid, dashed = [line for line in axes.lines if line.get_color() == INK and line.get_linewidth() > 1.0]
    assert solid.get_linestyle() == "-"
    assert dashed.get_linestyle() == "--"
    return solid, dashed


def texts(figure: Figure) -> str:
    """All words of a figure, of its legends, too."""
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    found += [axes.get_title(loc=side) for axes in figure.axes for side in ("left", "center")]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join(found)


@pytest.mark.parametrize("x", VIEWS)
def test_losses_show_every_run_and_which_are_off(x: str) -> None:
    fit = fit_tree()
    axes = VIEWS[x](fit).axes[0]
    assert [point["off"] for point in fit["points"]].count(True) == 1
    for hollow in (False, True):
        told = {(point[x], point["loss"]) for point in fit["points"] if point["off"] is hollow}
        assert points_of(axes, hollow=hollow) == told


@pytest.mark.parametrize("x", VIEWS)
def test_line_is_law_and_dashed_beyond_runs(x: str) -> None:
    fit = fit_tree()
    solid, dashed = black_lines(VIEWS[x](fit).axes[0])
    last = max(point[x] for point in fit["points"])
    assert xs(solid).max() <= last * 1.001
    assert xs(solid).max() == xs(dashed).min()
    assert xs(dashed).max() > 3 * last
    along = xs(solid)
    if x == "flops":
        # Whatever the size, no run of so many FLOPs may come lower, and one comes as low.
        sizes = np.geomspace(1e4, 1e12, 20001)[:, None]
        best = (fit["E"] + fit["A"] * sizes ** -fit["alpha"] + fit["B"] * (along / 6 / sizes) ** -fit["beta"]).min(axis=0)
    else:
        size, power = ("B", "beta") if x == "tokens" else ("A", "alpha")
        best = fit["E"] + fit[size] * along ** -fit[power]
    np.testing.assert_allclose(ys(solid), best, rtol=1e-6)


def test_compute_follows_costs_of_stages() -> None:
    fit = copy.deepcopy(fit_tree())
    for point in fit["points"]:
        point["flops"] *= (point["parameters"] / 1e8) ** 0.2
    solid, _ = black_lines(loss_against_compute(fit).axes[0])
    sizes = np.geomspace(min(point["parameters"] for point in fit["points"]), 8e8, 20001)[:, None]
    budget = xs(solid)
    tokens = budget / (6 * sizes * (sizes / 1e8) ** 0.2)
    best = (fit["E"] + fit["A"] * sizes ** -fit["alpha"] + fit["B"] * tokens ** -fit["beta"]).min(axis=0)
    # Where the best size is one of those fitted, their costs must be those that count.
    inside = (budget > 1e17) & (budget < 1e20)
    assert inside.sum() > 30
    np.testing.assert_allclose(ys(solid)[inside], best[inside], rtol=2e-3)


def test_band_holds_its_share_of_draws() -> None:
    fit = fit_tree()
    law = law_of(fit)
    sizes, tokens = np.array([1e8, 1e9]), np.array([1e9, 3e10])
    low, high = law.band(sizes, tokens)
    draws = np.array(fit["draws"])
    losses = draws[:, :1] + draws[:, 1:2] * sizes ** -draws[:, 2:3] + draws[:, 3:4] * tokens ** -draws[:, 4:]
    np.testing.assert_allclose(((losses >= low) & (losses <= high)).mean(axis=0), 0.9, atol=0.02)
    wide_low, wide_high = law.band(sizes, tokens, noisy=True)
    least = 2 * 1.645 * fit["noise"] * law.loss(sizes, tokens)
    assert (wide_high - wide_low >= 0.9 * least).all()
    assert 0.5 * NOISE < fit["noise"] < 2 * NOISE


def test_left_out_run_is_measured_beside_foretold() -> None:
    fit = fit_tree()
    told = fit["extrapolation"]
    axes = loss_against_compute(fit).axes[0]
    [star] = [line for line in axes.lines if line.get_marker() == "*"]
    assert (xs(star)[0], ys(star)[0]) == (told["flops"], told["measured"])
    [bar] = axes.collections[-1:]
    [path] = bar.get_paths()
    np.testing.assert_allclose(np.sort(np.asarray(path.vertices)[:, 1]), told["interval"])


def test_irreducible_loss_is_told_even_where_far_below() -> None:
    fit = fit_tree()
    low, high = fit["intervals"]["E"]
    words = f"E = {fit['E']:.4g} [{low:.4g}, {high:.4g}]"
    assert words in texts(loss_against_tokens(fit))
    assert f"{words}: below" not in texts(loss_against_tokens(fit))
    far = {**fit, "E": 1e-3, "intervals": {**fit["intervals"], "E": [0.0, 0.1]}}
    assert "E = 0.001 [0, 0.1]: below this axis" in texts(loss_against_tokens(far))


def test_few_noisy_runs_are_drawn_without_warnings() -> None:
    fit = fit_tree(GRID[:3] + GRID[5:8] + GRID[10:12], off=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in (*VIEWS.values(), residuals):
            render(view(fit))


def test_isoflop_marks_minimum_of_each_budget() -> None:
    fit = fit_tree(BUDGETS, off=None)
    left, right = isoflop(fit).axes
    minima = [(one["parameters"], one["loss"]) for one in fit["isoflop"]["budgets"]]
    stars = [line for line in left.lines if line.get_marker() == "*"]
    assert [(xs(line)[0], ys(line)[0]) for line in stars] == minima
    # The drawn parabolas are lowest where the stars are.
    parabolas = [line for line in left.lines if line.get_marker() == "None"]
    lowest = [xs(line)[np.argmin(ys(line))] for line in parabolas if len(xs(line)) > 2]
    np.testing.assert_allclose(lowest, [size for size, _ in minima], rtol=0.06)
    law = right.lines[0]
    ratio = fit["alpha"] * fit["A"] / (fit["beta"] * fit["B"])
    closed = ratio ** (1 / (fit["alpha"] + fit["beta"])) * (xs(law) / 6) ** fit["a"]
    np.testing.assert_allclose(ys(law), closed, rtol=1e-4)


def test_isoflop_says_why_it_is_refused() -> None:
    fit = fit_tree(tuple((n, d * (1 + 0.7 * place)) for place, (n, d) in enumerate(GRID)), off=None)
    with pytest.raises(SwiftError, match=fit["isoflop"]["refused"][:30]):
        isoflop(fit)


def test_residuals_name_runs_that_are_off() -> None:
    fit = fit_tree()
    figure = residuals(fit)
    assert points_of(figure.axes[0], hollow=True) == {
        (point["fitted"], 100 * point["residual"]) for point in fit["points"] if point["off"]
    }
    named = [text.get_text() for text in figure.axes[0].texts]
    assert named == [f"row {point['row']}" for point in fit["points"] if point["off"]]


def test_transfer_marks_best_rates_and_what_diverged() -> None:
    curves = transfer_tree()
    figure = transfer(curves)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["standard", "muP"]
    for form, title in (("standard", "standard"), ("mup", "muP")):
        own = [one for one in curves["widths"] if one["parametrisation"] == form]
        stars = [line for line in panels[title].lines if line.get_marker() == "*"]
        assert [xs(line)[0] for line in stars] == [one["best_lr"] for one in own]
        crosses = {float(x) for line in panels[title].lines if line.get_marker() == "x" for x in xs(line)}
        lost = {rate for one in own for rate, gone in zip(one["lr"], one["diverged"], strict=True) if gone}
        assert crosses == lost
        assert bool(lost) is (form == "standard")
    assert "diverged" in texts(figure)
    alone = {"widths": [one for one in curves["widths"] if one["parametrisation"] == "mup"]}
    assert [axes.get_title() for axes in transfer(alone).axes] == ["muP"]


@pytest.mark.parametrize("quantities", [3, 5])
def test_coordinates_show_each_quantity_in_both_forms(quantities: int) -> None:
    check = coordinates_tree(quantities)
    first = next(iter(check["quantities"].values()))
    first["mup"][0] = [0.0, 0.0, 0.0]
    figure = coordinates(check)
    drawn = [axes for axes in figure.axes if axes.lines]
    assert len(drawn) == 2 * quantities
    expected = [check["quantities"][name][form] for name in check["quantities"] for form in ("standard", "mup")]
    for axes, lines in zip(drawn, expected, strict=True):
        for line, sizes in zip(axes.lines, lines, strict=True):
            np.testing.assert_array_equal(np.nan_to_num(ys(line)), sizes)
    assert texts(figure).count("slope +0.70") == texts(figure).count("slope +0.00") == quantities
    assert "step 4" in texts(figure)


def test_files_are_the_same_each_time_and_sharp_enough_for_print(tmp_path: Path) -> None:
    paths = save_figure(transfer(transfer_tree()), tmp_path / "new", "rates")
    assert [path.name for path in paths] == ["rates.svg", "rates.png"]
    svg, png = (path.read_bytes() for path in paths)
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path", "svg.hashsalt": None, "axes.spines.top": True}):
        again = render(transfer(transfer_tree()))
    assert (again["svg"], again["png"]) == (svg, png)
    assert b">learning rate</text>" in svg
    assert b"<dc:date>" not in svg
    width, _height = struct.unpack(">II", png[16:24])
    assert width == round(300 * PAGE_INCHES)


def test_drawing_leaves_the_style_of_others_alone() -> None:
    before = dict(mpl.rcParams)
    render(residuals(fit_tree()))
    assert dict(mpl.rcParams) == before
