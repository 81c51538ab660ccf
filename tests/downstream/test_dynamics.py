"""Slope of power, autocorrelation and effective rank of series whose own are known."""

import numpy as np
import pytest

from swiftv2.downstream.dynamics import autocorrelation, describe, effective_rank, power_slope
from swiftv2.errors import UsageError


def coloured(
    exponent: float, length: int = 512, dimensions: int = 24, seed: int = 0
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    rng = np.random.default_rng(seed)
    frequency = np.fft.rfftfreq(length)
    shape = np.where(frequency > 0, np.maximum(frequency, 1e-9) ** (-exponent / 2), 0)
    noise = rng.standard_normal((len(frequency), dimensions)) + 1j * rng.standard_normal((len(frequency), dimensions))
    return np.asarray(np.fft.irfft(noise * shape[:, None], n=length, axis=0))


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found_whatever_the_sampling(exponent: float) -> None:
    for seconds in (0.72, 4.0):
        assert power_slope(coloured(exponent), seconds) == pytest.approx(exponent, abs=0.12)


def test_the_autocorrelation_of_a_first_order_process_falls_geometrically() -> None:
    rng = np.random.default_rng(1)
    series = np.zeros((4000, 8))
    for t in range(1, len(series)):
        series[t] = 0.8 * series[t - 1] + rng.standard_normal(8)
    found = autocorrelation(np.column_stack([series, np.ones(len(series))]), 4)
    assert found == pytest.approx(0.8 ** np.arange(5), abs=0.04)


def test_effective_rank_counts_the_directions_that_vary() -> None:
    rng = np.random.default_rng(2)
    base = np.linalg.qr(rng.standard_normal((200, 3)) - 0.0)[0]
    base -= base.mean(axis=0)
    rows = np.linalg.qr(base)[0] @ np.linalg.qr(rng.standard_normal((16, 16)))[0][:3]
    assert effective_rank(rows + 5.0) == pytest.approx(3.0, abs=1e-6)


def test_runs_that_are_too_short_or_unevenly_cut_are_refused() -> None:
    rows = coloured(1.0, length=16)
    with pytest.raises(UsageError, match="no run has 8 clips"):
        describe([(rows[:4], np.arange(4.0), 2.0)])
    with pytest.raises(UsageError, match="not equally spaced"):
        describe([(rows, np.arange(16.0) ** 2, 2.0)])
    found = describe([(rows, np.arange(16.0) * 5, 2.0), (rows, np.arange(16.0) * 5, 2.0)], lags=3)
    assert found["seconds"] == 10.0
    assert found["lag_seconds"] == [0.0, 10.0, 20.0, 30.0]
    assert found["autocorrelation"][0] == pytest.approx(1.0)
