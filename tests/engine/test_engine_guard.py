"""Which steps are refused: the arithmetic of mean + 6 sigma, and what is never accepted."""

import math
import statistics

from hypothesis import given
from hypothesis import strategies as st

from swiftv2.config.engine import FaultsConfig
from swiftv2.engine.guard import SpikeGuard

WINDOW = 16
NUMBERS = st.floats(0.1, 10.0)


def _guard(losses: list[float], norms: list[float]) -> SpikeGuard:
    return SpikeGuard(FaultsConfig(spike_window=WINDOW, spike_sigma=6.0), zip(losses, norms, strict=True))


@given(losses=st.lists(NUMBERS, min_size=WINDOW, max_size=WINDOW), share=st.floats(0.0, 2.0))
def test_the_limit_is_mean_plus_six_sigma(losses: list[float], share: float) -> None:
    guard = _guard(losses, [1.0] * WINDOW)
    mean, sigma = statistics.fmean(losses), statistics.pstdev(losses)
    value = mean + share * 6 * sigma
    margin = 1e-5 * mean + 1e-9 * sigma
    if value > mean + 6 * sigma + margin:
        assert "its loss" in (guard.judge(value, 1.0) or "")
    elif value < mean + 6 * sigma - margin or share <= 1:
        assert guard.judge(value, 1.0) is None


@given(wrong=st.sampled_from([math.nan, math.inf, -math.inf]), filled=st.booleans())
def test_numbers_that_are_not_finite_are_refused_from_the_first_step_on(wrong: float, filled: bool) -> None:
    guard = _guard(*([[1.0] * WINDOW] * 2 if filled else [[], []]))
    assert "loss is not finite" in (guard.judge(wrong, 1.0) or "")
    assert "gradient norm is not finite" in (guard.judge(1.0, wrong) or "")


def test_nothing_finite_is_refused_before_the_window_is_full() -> None:
    guard = _guard([1.0] * (WINDOW - 1), [1.0] * (WINDOW - 1))
    assert guard.judge(1e6, 1e6) is None
    guard.accept(1.0, 1.0)
    assert "gradient norm" in (guard.judge(1.0, 1e6) or "")


def test_refused_steps_do_not_widen_what_is_accepted() -> None:
    guard = _guard([1.0, 1.1] * (WINDOW // 2), [1.0] * WINDOW)
    former = guard.history
    for _ in range(WINDOW):
        assert guard.judge(50.0, 1.0) is not None
    assert guard.history == former
    guard.accept(1.05, 1.0)
    assert len(guard.history) == WINDOW
    assert guard.history[-1] == (1.05, 1.0)


def test_equal_numbers_leave_room_for_rounding() -> None:
    guard = _guard([1.0] * WINDOW, [1.0] * WINDOW)
    assert guard.judge(1.0 + 1e-7, 1.0 + 1e-7) is None
    assert guard.judge(1.01, 1.0) is not None
