"""Predictions by a fitted law: optima, intervals, how far, and what is refused; real fits of tables of a known law."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_laws import make_table

from swiftv2.errors import UsageError
from swiftv2.scaling.fit import NAMES, Options, estimate, fit_table
from swiftv2.scaling.keep import write_fit
from swiftv2.scaling.law import Runs
from swiftv2.scaling.predict import CONSTANTS, Fit, Numbers, given, judge, law, loss_of, optimum, reach, read_fit, repeated_loss

TRUTH = np.array([0.18, 8.0, 0.28, 600.0, 0.4])
LARGEST = 6 * 8e8 * 6.4e9


def runs(sizes: int, budgets: int, noise: float, seed: int) -> tuple[Numbers, Numbers, Numbers]:
    """Parameters, tokens and losses of a crossed ladder of the known law."""
    grid = np.meshgrid(np.geomspace(7e6, 8e8, sizes), np.geomspace(1e8, 6.4e9, budgets))
    parameters, tokens = (axis.ravel() for axis in grid)
    wobble = np.random.default_rng(seed).normal(size=parameters.size)
    return parameters, tokens, law(TRUTH, parameters, tokens) * np.exp(noise * wobble)


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    """Of 4 x 4 runs."""
    return fit_table(make_table(*runs(4, 4, 0.003, 0)), Options(bootstraps=200))


def changed(tree: dict[str, Any], **values: Any) -> Fit:
    return Fit.model_validate({**tree, **values})


def test_a_fit_on_the_disk_is_read(tree: dict[str, Any], tmp_path: Path) -> None:
    path, _ = write_fit(tmp_path, tree)
    fit = read_fit(path)
    assert NAMES == CONSTANTS
    np.testing.assert_array_equal(fit.constants, [tree[name] for name in NAMES])
    assert fit.refits.shape == (200, 5)
    assert (fit.k, fit.level, fit.derived, len(fit.sound)) == (6.0, 0.9, False, 16)


def test_the_closed_form_is_where_no_other_split_of_the_budget_does_better(tree: dict[str, Any]) -> None:
    fit = Fit.model_validate(tree)
    found = optimum(fit, 10 * LARGEST)
    assert 6 * found.parameters.value * found.tokens.value == pytest.approx(10 * LARGEST)
    for other in (0.8, 0.99, 1.01, 1.25):
        worse = law(fit.constants, found.parameters.value * other, found.tokens.value / other)
        assert worse > found.loss.value


@pytest.mark.parametrize("budget", [0.1, 1.0, 100.0])
def test_the_search_under_a_cost_of_k_n_finds_the_closed_form(tree: dict[str, Any], budget: float) -> None:
    fit = Fit.model_validate(tree)
    closed = optimum(fit, budget * LARGEST)
    searched = optimum(fit, budget * LARGEST, lambda parameters: 6 * parameters)
    for name in ("parameters", "tokens"):
        np.testing.assert_allclose(getattr(searched, name), getattr(closed, name), rtol=1e-5)
    np.testing.assert_allclose(searched.loss, closed.loss, rtol=1e-9)


def test_dearer_parameters_make_for_smaller_models(tree: dict[str, Any]) -> None:
    """FLOPs that grow faster than N, as 6 N^1.2, have their optimum where their own derivative vanishes."""
    fit, power = Fit.model_validate(tree), 1.2
    found = optimum(fit, LARGEST, lambda parameters: 6 * parameters**power)
    _, a, alpha, b, beta = fit.constants
    exact = (alpha * a / (power * beta * b)) ** (1 / (alpha + power * beta))
    exact *= (LARGEST / 6) ** (beta / (alpha + power * beta))
    assert found.parameters.value == pytest.approx(exact, rel=1e-5)
    assert found.parameters.value < optimum(fit, LARGEST).parameters.value
    assert found.tokens.value == pytest.approx(LARGEST / (6 * found.parameters.value**power))


def test_no_size_beyond_those_looked_at_is_told(tree: dict[str, Any]) -> None:
    found = optimum(Fit.model_validate(tree), LARGEST, lambda parameters: 6 * parameters, (1e3, 1e6))
    assert found.parameters.value == pytest.approx(1e6)
    assert found.parameters.high <= 1e6 * (1 + 1e-9)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """90 % intervals at ten times the largest budget; of 80 tables 64 to 79 holding is within three standard errors."""
    template = {
        "columns": {"parameters": "parameters", "tokens": "tokens"},
        "flops_per_parameter_token": {"value": 6.0},
        "monotone": {axis: {"holds": True, "why": ""} for axis in ("parameters", "tokens")},
        "repeated": {"refused": "nothing is repeated"},
    }
    _, a, alpha, b, beta = TRUTH
    budget = 10 * LARGEST
    best = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget / 6) ** (beta / (alpha + beta))
    held = np.zeros(4)
    for seed in range(80):
        parameters, tokens, losses = runs(4, 3, 0.005, seed)
        found = estimate(Runs.make(losses, parameters, tokens), Options(bootstraps=200))
        points = [
            {"parameters": n, "tokens": d, "flops": 6 * n * d, "off": index in found.off}
            for index, (n, d) in enumerate(zip(parameters, tokens, strict=True))
        ]
        ends = {name: (found.intervals[at].low, found.intervals[at].high) for name, at in (("alpha", 2), ("beta", 4))}
        constants = dict(zip(NAMES, found.constants, strict=True))
        draws, level = [tuple(draw) for draw in found.laws.tolist()], {"level": 0.9}
        more = {"points": points, "intervals": level | ends, "draws": draws, "noise": found.robust.noise}
        made = optimum(Fit.model_validate(template | constants | more), budget)
        run = law(TRUTH, made.parameters.value, made.tokens.value)
        run *= np.exp(0.005 * np.random.default_rng([seed, 1]).normal())
        truths = ((made.parameters, best), (made.tokens, budget / 6 / best), (made.loss, run))
        narrow = made.loss.high - made.loss.low < 0.1 * made.loss.value
        held += np.array([*(one.low <= true <= one.high for one, true in truths), narrow], dtype=np.float64)
    assert np.all(held[:3] >= 64)
    assert np.all(held[:3] <= 79)
    assert held[3] >= 78, "an interval that holds everything says nothing"


def test_the_interval_of_a_loss_holds_the_noise_of_a_run(tree: dict[str, Any]) -> None:
    at = (1e8, 1e9)
    calm, noisy = loss_of(changed(tree, noise=0.0), *at), loss_of(changed(tree, noise=0.02), *at)
    assert calm.value == noisy.value
    assert calm.high - calm.low < 0.3 * (noisy.high - noisy.low)
    # Student's t of 11 degrees of freedom, and the law's own doubt, which is small here.
    assert np.log(noisy.high / noisy.low) == pytest.approx(2 * 1.796 * 0.02, rel=0.1)


def test_a_size_and_tokens_that_are_given(tree: dict[str, Any]) -> None:
    fit = Fit.model_validate(tree)
    found = given(fit, 1e8, 1e9)
    assert (found.flops, found.parameters.value, found.tokens.value) == (6e17, 1e8, 1e9)
    assert found.loss == loss_of(fit, 1e8, 1e9)
    assert abs(found.loss.value / float(law(TRUTH, 1e8, 1e9)) - 1) < 0.01
    with pytest.raises(UsageError, match="--tokens nan"):
        given(fit, 1e8, np.nan)


def test_repeated_tokens_are_worth_less_where_a_law_says_so(tree: dict[str, Any]) -> None:
    constants = {name: tree[name] for name in NAMES}
    fit = changed(tree, repeated={"R_star": 10.0, "constants": constants})
    plain = loss_of(fit, 1e8, 1e10).value
    assert repeated_loss(fit, 1e8, 1e10, 1e11) == pytest.approx(plain)
    often = repeated_loss(fit, 1e8, 1e10, 1e8)
    assert often is not None
    assert plain < often < loss_of(fit, 1e8, 1e8).value
    assert repeated_loss(Fit.model_validate(tree), 1e8, 1e10, 1e8) is None


@pytest.mark.parametrize(("times", "verdict"), [(0.5, "within"), (1.0, "within"), (9.0, "near"), (11.0, "far")])
def test_how_far_a_budget_is(tree: dict[str, Any], times: float, verdict: str) -> None:
    fit = Fit.model_validate(tree)
    far = reach(fit, times * LARGEST * (1 - 1e-9))
    assert far.factor == pytest.approx(times)
    assert far.verdict == verdict
    doubled = reach(fit, times * LARGEST, lambda parameters: 12 * parameters)
    assert doubled.factor == pytest.approx(times / 2), "both sides are counted by the same cost"


def test_a_run_that_is_off_the_law_does_not_make_a_budget_near(tree: dict[str, Any]) -> None:
    points = [*tree["points"], {**tree["points"][-1], "flops": 1e3 * LARGEST, "off": True}]
    assert reach(changed(tree, points=points), 2 * LARGEST).factor == pytest.approx(2)


def judged(fit: Fit, times: float) -> tuple[list[str], list[str]]:
    return judge(fit, optimum(fit, times * LARGEST), reach(fit, times * LARGEST))


def test_what_is_near_is_said_without_a_word_and_what_is_far_with_one(tree: dict[str, Any]) -> None:
    fit = Fit.model_validate(tree)
    assert judged(fit, 5.0) == ([], [])
    warnings, refusals = judged(fit, 50.0)
    assert len(warnings) == 1
    assert "50 times" in warnings[0]
    assert refusals == []
    assert any("more than 1,000" in text for text in judged(fit, 2e3)[1])


def test_what_is_refused(tree: dict[str, Any]) -> None:
    exponent = {**tree["intervals"], "alpha": [-0.01, 0.5]}
    assert any("alpha (-0.01 to 0.5) holds 0" in text for text in judged(changed(tree, intervals=exponent), 2.0)[1])
    lines = {**tree["monotone"], "parameters": {"holds": False, "why": "806M is worse than 202M"}}
    crossed = changed(tree, monotone=lines)
    assert any("806M is worse than 202M" in text for text in judged(crossed, 2.0)[1])
    warnings, refusals = judged(crossed, 0.9)
    assert refusals == [], "between the runs a law that bends is still of use"
    assert any("do not fall with parameters" in text for text in warnings)
    rng = np.random.default_rng(0)
    loose = [[0.18, 8.0, a, 600.0, b] for a, b in 0.3 * np.exp(rng.normal(size=(200, 2)))]
    assert any("decades" in text for text in judged(changed(tree, draws=loose), 2.0)[1])
    assert any("fitted to 7 points" in text for text in judged(changed(tree, points=tree["points"][-7:]), 0.9)[0])
    assert any("fitted to 5 points" in text for text in judged(changed(tree, points=tree["points"][-5:]), 0.9)[1])


def test_refits_that_no_size_helps_lean_to_an_end(tree: dict[str, Any]) -> None:
    """Intervals stay numbers where some refits have exponents below zero, and such a law is refused for their width."""
    draws = [*tree["draws"], *[[0.2, 8.0, -0.01, 600.0, 0.4]] * 60]
    fit = changed(tree, draws=draws)
    found = optimum(fit, LARGEST)
    assert np.all(np.isfinite([*found.parameters, *found.tokens, *found.loss]))
    assert any("decades" in text for text in judge(fit, found, reach(fit, LARGEST))[1])


@pytest.mark.parametrize("flops", [0.0, -1e20, np.nan, np.inf])
def test_a_budget_that_is_none(tree: dict[str, Any], flops: float) -> None:
    with pytest.raises(UsageError, match="FLOPs: give a positive number"):
        optimum(Fit.model_validate(tree), flops)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ('{"E": 1.8, "A": 4', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("{}", "no fit of this version"),
        ('{"E": NaN, "A": 1}', "no fit of this version"),
    ],
)
def test_what_is_no_fit(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "fit.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=said) as refused:
        read_fit(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("lost", ["draws", "noise", "points", "monotone", "columns", "intervals", "flops_per_parameter_token"])
def test_a_fit_of_another_version_is_told_by_what_it_lacks(tree: dict[str, Any], tmp_path: Path, lost: str) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps({name: value for name, value in tree.items() if name != lost}), encoding="utf-8")
    with pytest.raises(UsageError, match=f"no fit of this version .{lost}: "):
        read_fit(path)
