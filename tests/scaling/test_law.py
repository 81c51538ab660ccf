"""The law and its fit: against finite differences, the published recipe run by scipy, and laws that are known."""

import itertools

import numpy as np
import pytest
from known_laws import LAW, grid, losses, noisy
from scipy.optimize import minimize
from scipy.special import logsumexp

from swiftv2.scaling.law import Floats, Runs, fit_law, huber, jacobian, log_loss, refine


@pytest.fixture
def runs() -> Runs:
    n, d = grid(6, 5)
    return Runs.make(noisy(losses(n, d), 0.005), n, d)


def test_coordinates_and_constants_are_one_law(runs: Runs) -> None:
    n, d = grid(6, 5)
    coordinates = runs.to_coordinates(np.array(LAW))
    assert np.allclose(np.exp(log_loss(coordinates[None], runs.logs)[0]), losses(n, d), rtol=1e-12)
    assert np.allclose(runs.to_constants(coordinates), LAW, rtol=1e-10)


def test_slopes_are_those_of_finite_differences(runs: Runs) -> None:
    here = runs.to_coordinates(np.array(LAW))
    slopes = jacobian(here[None], runs.logs)[0]
    for index in range(5):
        step = np.zeros(5)
        step[index] = 1e-6
        rise = log_loss((here + step)[None], runs.logs)[0] - log_loss((here - step)[None], runs.logs)[0]
        assert np.allclose(slopes[:, index], rise / 2e-6, atol=1e-8)


@pytest.mark.parametrize(
    "law", [LAW, (0.15, 40.0, 0.35, 300.0, 0.4), (1.69, 406.4, 0.34, 410.7, 0.28), (0.0, 3.0, 0.1, 9.0, 0.2)]
)
def test_a_law_without_noise_is_found(law: tuple[float, ...]) -> None:
    n, d = grid(4, 4)
    runs = Runs.make(losses(n, d, law), n, d)
    fit = fit_law(runs)
    found = runs.to_constants(fit.coordinates)
    assert np.allclose(found, law, rtol=1e-4, atol=1e-4)
    assert fit.objective < 1e-12


def published_recipe(loss: Floats, n: Floats, d: Floats, delta: float) -> float:
    """Objective of L-BFGS from Hoffmann et al.'s grid of starts (thinned), on uncentred logarithms, the best kept."""

    def objective(point: Floats) -> float:
        a, b, e, alpha, beta = point
        terms = [a - alpha * np.log(n), b - beta * np.log(d), np.full(n.size, e)]
        return float(huber(np.log(loss) - logsumexp(terms, axis=0), delta).sum())

    starts = itertools.product((5.0, 10.0), (5.0, 10.0), (0.5,), (0.25, 0.5), (0.5,))
    return min(float(minimize(objective, start, method="L-BFGS-B", options={"maxiter": 500}).fun) for start in starts)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_worse_than_the_published_recipe(seed: int) -> None:
    n, d = grid(6, 5)
    loss = noisy(losses(n, d), 0.005, seed)
    runs = Runs.make(loss, n, d)
    fit = fit_law(runs)
    reference = published_recipe(loss, n, d, 1e-3)
    assert fit.objective <= reference * (1.0 + 1e-9)
    found = np.log(losses(n, d, tuple(runs.to_constants(fit.coordinates))))
    assert fit.objective == pytest.approx(float(huber(np.log(loss) - found, 1e-3).sum()), rel=1e-8)
    assert 1 <= fit.starts_in_best_basin <= fit.starts


def test_the_objective_is_a_sum(runs: Runs) -> None:
    """Twice the same runs cost twice: a mean would not."""
    fit = fit_law(runs)
    twice = Runs(np.tile(runs.logs, 2), runs.means, np.tile(runs.target, 2))
    assert fit_law(twice).objective == pytest.approx(2.0 * fit.objective, rel=1e-6)


def test_a_weight_of_two_is_a_run_twice(runs: Runs) -> None:
    fit = fit_law(runs)
    weights = np.ones((1, runs.count))
    weights[0, 3], weights[0, 7] = 2.0, 0.0
    rows = [*[i for i in range(runs.count) if i != 7], 3]
    weighed, value = refine(fit.coordinates[None], runs.logs, runs.target, 0.01, weights=weights)
    copied, reference = refine(fit.coordinates[None], runs.logs[:, rows], runs.target[rows], 0.01)
    assert value[0] == pytest.approx(reference[0], rel=1e-8)
    assert np.allclose(weighed, copied, atol=1e-5)


def test_many_refits_reach_what_lbfgs_reaches(runs: Runs) -> None:
    """A batch of bootstrap refits, all begun at the best fit, ends where scipy ends for each alone."""
    fit, generator = fit_law(runs), np.random.default_rng(0)
    weights = generator.multinomial(runs.count, np.full(runs.count, 1.0 / runs.count), size=12).astype(np.float64)
    ends, values = refine(np.repeat(fit.coordinates[None], 12, axis=0), runs.logs, runs.target, 1e-3, weights=weights)
    for weight, end, value in zip(weights, ends, values, strict=True):

        def objective(point: Floats, weight: Floats = weight) -> float:
            return 1e4 * float(np.sum(weight * huber(runs.target - log_loss(point[None], runs.logs)[0], 1e-3)))

        alone = min(
            minimize(objective, start, method=method).fun for start in (fit.coordinates, end) for method in ("L-BFGS-B", "BFGS")
        )
        assert value <= alone * 1e-4 * 1.01


def test_a_fit_keeps_to_the_directions_it_is_given(runs: Runs) -> None:
    start = runs.to_coordinates(np.array(LAW))
    start[2] = 0.5
    basis = np.delete(np.eye(5), 2, axis=1)
    end, value = refine(start[None], runs.logs, runs.target, 1e-3, basis=basis[None])
    assert end[0, 2] == 0.5
    assert value[0] > fit_law(runs).objective
