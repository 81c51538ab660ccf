"""Loss against one variable, isoFLOP parabolas, the envelope: each finds what the law behind the runs says."""

import numpy as np
import pytest
from known_laws import LAW, losses, make_table, noisy

from swiftv2.scaling.curves import budgets, envelope, envelope_indices, isoflop, loss_curve
from swiftv2.scaling.law import Floats
from swiftv2.scaling.table import Table

E, A, ALPHA, B, BETA = LAW
EXPONENT = BETA / (ALPHA + BETA)


def best_size(flops: float) -> float:
    """The size of least loss at C = 6 N D."""
    return float((ALPHA * A / (BETA * B) * (flops / 6.0) ** BETA) ** (1.0 / (ALPHA + BETA)))


def budgeted(noise: float, spread: float = 0.0, seed: int = 0) -> Table:
    """Nine sizes about the best of each of five budgets, whose FLOPs stray a little."""
    generator = np.random.default_rng(seed)
    sizes: list[Floats] = []
    flops: list[Floats] = []
    for budget in np.geomspace(1e18, 1e21, num=5):
        sizes.append(best_size(budget) * np.geomspace(0.3, 3.0, num=9))
        flops.append(budget * np.exp(spread * generator.uniform(-1.0, 1.0, 9)))
    n, c = np.concatenate(sizes), np.concatenate(flops)
    d = c / (6.0 * n)
    return make_table(n, d, noisy(losses(n, d), noise, seed))


def test_parabolas_find_the_best_size_and_its_exponent() -> None:
    tree = isoflop(budgeted(0.001), 0.9)
    assert len(tree["budgets"]) == 5
    for one in tree["budgets"]:
        low, high = one["interval"]
        # A parabola is not quite the law's valley: within 10 % of its lowest point.
        assert one["parameters"] == pytest.approx(best_size(one["flops"]), rel=0.1)
        assert low < one["parameters"] < high
        c0, c1, c2 = one["coefficients"]
        x = np.log(one["parameters"])
        assert c0 + c1 * x + c2 * x**2 == pytest.approx(one["loss"])
        assert c1 + 2.0 * c2 * x == pytest.approx(0.0, abs=1e-6)
    assert tree["exponent"] == pytest.approx(EXPONENT, abs=0.02)
    assert tree["interval"][0] < tree["exponent"] < tree["interval"][1]


def test_intervals_of_minima_hold_the_truth() -> None:
    held = []
    for seed in range(60):
        x = np.geomspace(0.3, 3.0, num=9)
        loss = 2.0 + 0.1 * np.log(x / 1.2) ** 2
        table = make_table(1e8 * x, 1e19 / x, loss * np.exp(0.003 * np.random.default_rng(seed).standard_normal(9)))
        low, high = isoflop(table, 0.9)["budgets"][0]["interval"]
        held.append(low <= 1.2e8 <= high)
    assert 46 <= sum(held) <= 60


def test_budgets_that_stray_a_little_are_budgets_and_scattered_runs_are_none() -> None:
    assert [group.size for group in budgets(budgeted(0.0, spread=0.05).flops)] == [9] * 5
    for count in (20, 60, 200):
        even = np.geomspace(1e18, 1e20, num=count)
        assert budgets(even) == []
    sizes = np.geomspace(1e7, 1e9, num=40)
    assert "do not group" in isoflop(make_table(sizes, 1e12 / sizes**0.5, losses(sizes, sizes)), 0.9)["refused"]


def test_a_valley_beyond_the_sizes_has_no_minimum() -> None:
    n = np.geomspace(1e7, 1e8, num=6)
    for loss, said in (
        (2.0 + (np.log(n) - 30.0) ** 2 / 100.0, "beyond"),
        (3.0 - (np.log(n) - 17.0) ** 2 / 10.0, "curve upwards"),
    ):
        one = isoflop(make_table(n, 1e18 / n, loss), 0.9)["budgets"][0]
        assert one["parameters"] is None
        assert said in one["why"]


def test_the_envelope_holds_what_nothing_cheaper_beats() -> None:
    table = budgeted(0.0)
    chosen = envelope_indices(table)
    for index in range(table.loss.size):
        cheaper = (table.flops <= table.flops[index]) & (table.loss < table.loss[index])
        same = (table.flops == table.flops[index]) & (table.loss == table.loss[index])
        assert (index in chosen) == (not cheaper.any() and same.sum() == 1)
    tree = envelope(table, 0.9)
    assert tree["rows"] == [table.rows[i] for i in chosen]
    assert np.all(np.diff(tree["flops"]) > 0)
    assert np.all(np.diff(tree["loss"]) < 0)


def test_loss_against_one_variable_finds_its_law() -> None:
    d = np.geomspace(1e9, 1e12, num=10)
    table = make_table(np.full(10, 1e9), d, noisy(losses(np.full(10, 1e9), d), 0.001))
    tree = loss_curve(table, range(10), d, "ten runs", 0.9, 1e-3)
    asymptote = E + A * 1e9**-ALPHA
    for name, value in (("E", asymptote), ("A", B), ("alpha", BETA)):
        low, high = tree["intervals"][name]
        assert low <= tree["constants"][name] <= high
        assert low <= value <= high
    few = loss_curve(table, range(3), d, "three runs", 0.9, 1e-3)
    assert "at least 4" in few["refused"]
