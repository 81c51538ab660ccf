"""What no law can be fitted to is refused; what is off or does not fall is called so, and noise alone is not."""

import numpy as np
import pytest
from known_laws import grid, losses, make_table, noisy

from swiftv2.errors import UsageError
from swiftv2.scaling.diagnosis import find_off, groups, judge_monotone, refuse_degenerate
from swiftv2.scaling.intervals import fit_robust
from swiftv2.scaling.law import Floats, Runs, fit_law

MANY = np.geomspace(1e7, 1e9, num=12)
POSITIVE = {"alpha": (0.1, 0.5), "beta": (0.1, 0.5)}


@pytest.mark.parametrize(
    ("parameters", "tokens", "said"),
    [
        (np.full(12, 1e8), MANY * 50, "all runs are of one size"),
        (MANY, np.full(12, 1e10), "equally many tokens"),
        (MANY, 1e19 / MANY, "one budget of FLOPs"),
        (MANY, 20.0 * MANY, "go together"),
        (MANY, 3.0 * MANY**1.3, "go together"),
        (np.tile([1e8, 1e9], 6), MANY * 50, "only two sizes"),
        (MANY, np.tile([1e9, 1e10], 6), "only two token counts"),
        (MANY[:5], np.array([1e9, 3e9, 1e9, 2e9, 5e9]), "5 runs; a law of 5 constants needs at least 6"),
        (np.tile(MANY[[0, 4, 11]], 4), np.tile([1e9, 1e10, 4e9], 4), "3 different pairs"),
    ],
)
def test_degenerate_tables_are_refused(parameters: Floats, tokens: Floats, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        refuse_degenerate(make_table(parameters, tokens, losses(parameters, tokens)))


def test_a_grid_is_not_refused() -> None:
    n, d = grid(3, 3)
    refuse_degenerate(make_table(n, d, losses(n, d)))
    with pytest.raises(UsageError, match=r"all losses are 2\.5"):
        refuse_degenerate(make_table(n, d, np.full(9, 2.5)))


def test_four_points_of_a_ladder_that_rises_are_refused_and_called_so() -> None:
    sizes, loss = np.array([51e6, 202e6, 806e6, 3.2e9]), np.array([0.249, 0.244, 0.217, 0.230])
    with pytest.raises(UsageError, match=r"4 runs.*not monotone.*3\.2e\+09 has loss 0\.23, 8\.06e\+08 has 0\.217"):
        refuse_degenerate(make_table(sizes, np.full(4, 1e9), loss))


@pytest.mark.parametrize("excess", [0.06, 0.2])
def test_a_largest_model_that_is_worse_is_called_so(excess: float) -> None:
    """Also where the rise itself is most of what a law takes for noise."""
    n, d = grid()
    loss = noisy(losses(n, d), 0.003)
    loss[9:] = loss[6:9] * (1.0 + excess)
    table = make_table(n, d, loss)
    runs = Runs.make(loss, n, d)
    robust = fit_robust(runs, fit_law(runs).coordinates)
    judged = judge_monotone(table, robust.noise, robust.freedom, POSITIVE)
    assert not judged["parameters"]["holds"]
    assert "larger models are worse" in judged["parameters"]["why"]
    assert judged["tokens"]["holds"]


def test_noise_alone_is_not_called_a_rise() -> None:
    """The loss of these sizes is all but level: noise makes a larger one the worse in nearly every table."""
    n, d = grid(4, 4)
    flat = losses(n * 1e4, d)
    called = rising = 0
    for seed in range(100):
        loss = noisy(flat, 0.01, seed)
        judged = judge_monotone(make_table(n, d, loss), 0.01, 11, POSITIVE)
        called += not judged["parameters"]["holds"]
        rising += bool(np.any(np.diff(loss.reshape(4, 4), axis=0) > 0))
    assert rising > 90
    assert called <= 15


def test_without_equal_tokens_the_exponents_decide() -> None:
    n = np.geomspace(1e7, 1e9, num=8)
    d = n * np.tile([10.0, 30.0], 4)
    table = make_table(n, d, losses(n, d))
    assert judge_monotone(table, 0.01, 3, POSITIVE)["parameters"]["holds"]
    doubtful = judge_monotone(table, 0.01, 3, {"alpha": (-0.1, 0.5), "beta": (0.1, 0.5)})
    assert not doubtful["parameters"]["holds"]
    assert "interval of alpha" in doubtful["parameters"]["why"]


def test_runs_that_are_off_are_found_and_no_others() -> None:
    n, d = grid(6, 6)
    wrong = found = 0
    for seed in range(12):
        loss = noisy(losses(n, d), 0.005, seed)
        runs = Runs.make(loss, n, d)
        clean = fit_robust(runs, fit_law(runs).coordinates)
        assert len(find_off(runs, clean)[0]) <= 1
        loss[8] *= 1.06
        loss[20] *= 0.95
        runs = Runs.make(loss, n, d)
        off, others = find_off(runs, fit_robust(runs, fit_law(runs).coordinates))
        found += {8, 20} <= set(off)
        wrong += len(set(off) - {8, 20})
        if {8, 20} <= set(off):
            assert off[8] > 0.0 > off[20]
            assert others.noise == pytest.approx(clean.noise, rel=0.25)
    assert found == 12
    assert wrong <= 1


def test_groups_are_no_wider_than_near() -> None:
    values = np.array([1.0, 1.015, 1.03, 2.0, 1.0])
    assert [sorted(group.tolist()) for group in groups(values)] == [[0, 1, 4], [2], [3]]
