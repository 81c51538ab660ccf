from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn import signal

from swiftv2.data.ingest.quantise import to_stored
from swiftv2.data.statistics import is_cleaned, run_statistics, voxel_statistics


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["int16", "uint16", "uint8", "float32"]),
    slope=st.sampled_from([1.0, 0.075, -2.0]),
    frames=st.integers(2, 40),
    seed=st.integers(0, 1000),
)
def test_statistics_equal_those_of_numpy(dtype: str, slope: float, frames: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bold = (rng.normal(100, 40, size=(frames, 17)).clip(0, 255)).astype(dtype)
    brain = rng.random(17) < 0.6
    brain[3] = True
    values = bold[:, brain].astype(np.float64) * slope + 5.0
    quarters = np.quantile(values, [0.25, 0.5, 0.75])
    expected = (values.mean(), values.std(), values.min(), values.max(), quarters[1], quarters[2] - quarters[0])
    got = run_statistics(bold, brain, slope, 5.0)
    np.testing.assert_allclose(got.as_tuple(), expected, rtol=1e-10, atol=1e-9)
    mean, std = voxel_statistics(bold, brain, slope, 5.0)
    np.testing.assert_allclose(mean[brain], values.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std[brain], values.std(axis=0), rtol=1e-5, atol=1e-5)
    assert not mean[~brain].any()
    assert not std[~brain].any()


def bold_like(voxels: int = 300, frames: int = 200) -> np.ndarray:
    """Means of 400 to 1,600, drift, a shared signal, noise of 1 to 4 %: what comes out of preprocessing."""
    rng = np.random.default_rng(5)
    mean = rng.uniform(400, 1600, voxels)
    time = np.linspace(-1, 1, frames)[:, None]
    shared = np.cumsum(rng.normal(size=(frames, 1)), axis=0)
    return np.asarray(
        mean + mean * (0.01 * time * rng.normal(size=voxels) + 0.002 * shared + 0.02 * rng.normal(size=(frames, voxels)))
    )


def zero_mean(bold: np.ndarray) -> np.ndarray:
    return np.asarray(bold - bold.mean(axis=0))


def z_scored_and_scaled_to_integers(bold: np.ndarray) -> np.ndarray:
    return np.asarray(np.rint(zero_mean(bold) / bold.std(axis=0) * 1000), dtype=np.int16)


def percent_change(bold: np.ndarray) -> np.ndarray:
    return np.asarray(100 * (bold / bold.mean(axis=0) - 1))


def without_global_signal(bold: np.ndarray) -> np.ndarray:
    centred = zero_mean(bold)
    course = centred.mean(axis=1, keepdims=True)
    return np.asarray(centred - course @ (course.T @ centred) / (course.T @ course))


def band_passed_with_mean(bold: np.ndarray) -> np.ndarray:
    return np.asarray(bold.mean(axis=0) + signal.clean(bold, low_pass=0.1, high_pass=0.01, t_r=2.0, standardize=None))


@pytest.mark.parametrize(
    ("change", "cleaned"),
    [
        (zero_mean, True),
        (z_scored_and_scaled_to_integers, True),
        (percent_change, True),
        (without_global_signal, True),
        (np.asarray, False),
        (band_passed_with_mean, False),  # documented: what keeps its means cannot be told
    ],
)
def test_what_was_done_to_data_shows_in_their_means(change: Callable[[np.ndarray], np.ndarray], cleaned: bool) -> None:
    bold = change(bold_like())
    brain = np.ones(bold.shape[1], dtype=bool)
    mean, std = voxel_statistics(bold, brain, 1.0, 0.0)
    assert is_cleaned(mean, std, brain) is cleaned


def test_leaving_out_loud_volumes_does_not_hide_that_data_were_cleaned() -> None:
    bold = bold_like(frames=400)
    changed = bold - bold.mean(axis=0)
    changed[:5] += 15 * changed.std(axis=0)
    changed = (changed - changed.mean(axis=0))[5:]
    brain = np.ones(bold.shape[1], dtype=bool)
    mean, std = voxel_statistics(changed, brain, 1.0, 0.0)
    assert float(np.median(np.abs(mean)) / np.median(std)) > 0.05
    assert is_cleaned(mean, std, brain)


def test_zeros_outside_the_brain_do_not_count() -> None:
    bold = np.hstack([bold_like(), np.zeros((200, 900))])
    brain = (bold != 0).any(axis=0)
    mean, std = voxel_statistics(bold, brain, 1.0, 0.0)
    assert not is_cleaned(mean, std, brain)
    mean, std = voxel_statistics(zero_mean(bold), brain, 1.0, 0.0)
    assert is_cleaned(mean, std, brain)


@pytest.mark.parametrize(("level", "cleaned"), [(0.0, True), (0.01, True), (2.0, True), (5.0, False), (1000.0, False)])
def test_already_cleaned_data_are_told(level: float, cleaned: bool) -> None:
    rng = np.random.default_rng(0)
    bold = rng.normal(0, 10, size=(200, 50))
    bold += level - bold.mean(axis=0)
    brain = np.ones(50, dtype=bool)
    mean, std = voxel_statistics(bold, brain, 1.0, 0.0)
    assert is_cleaned(mean, std, brain) is cleaned


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"])
def test_whole_numbers_stay_exact(dtype: str) -> None:
    numbers = np.arange(120).reshape(6, 20).astype(dtype)
    stored = to_stored(numbers, 0.25, 7.0)
    assert stored.values == "exact"
    assert stored.max_error == 0.0
    np.testing.assert_array_equal(stored.bold * stored.slope + stored.intercept, numbers * 0.25 + 7.0)


def test_large_whole_numbers_move_into_the_intercept() -> None:
    numbers = np.array([[100_000, 165_535], [100_001, 130_000]], dtype=np.int32)
    stored = to_stored(numbers, 2.0, 1.0)
    assert (stored.bold.dtype.name, stored.values) == ("uint16", "exact")
    np.testing.assert_array_equal(stored.bold * stored.slope + stored.intercept, numbers * 2.0 + 1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_are_scaled_with_the_error_stated(dtype: str) -> None:
    numbers = np.random.default_rng(0).normal(9000, 300, size=(50, 40)).astype(dtype)
    stored = to_stored(numbers, 1.0, 0.0)
    assert (stored.bold.dtype.name, stored.values) == ("int16", "scaled")
    error = np.abs(stored.bold * stored.slope + stored.intercept - numbers).max()
    assert stored.max_error == pytest.approx(error, rel=1e-6)
    assert error <= stored.slope / 2 * (1 + 1e-6)
    kept = to_stored(numbers, 1.0, 0.0, keep_float=True)
    assert (kept.bold.dtype.name, kept.values) == ("float32", "float32")
    assert (kept.max_error == 0.0) is (dtype == "float32")


def test_integers_of_too_wide_a_range_are_scaled() -> None:
    stored = to_stored(np.array([[0, 1_000_000], [3, 500_000]], dtype=np.int32), 1.0, 0.0)
    assert stored.values == "scaled"
    assert 0 < stored.max_error <= 1_000_000 / 65_534
