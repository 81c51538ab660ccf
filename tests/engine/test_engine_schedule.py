"""Shapes of the learning rate over steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiftv2.config.engine import ScheduleConfig
from swiftv2.engine.schedule import learning_rate

COSINE = ScheduleConfig(kind="cosine", warmup_steps=10, final_ratio=0.1)
CONSTANT = ScheduleConfig(kind="constant", warmup_steps=10, cooldown_steps=20, final_ratio=0.0)


def test_the_warm_up_is_linear_from_zero() -> None:
    for config in (COSINE, CONSTANT):
        assert [learning_rate(s, config, 2.0, 100) for s in (0, 1, 5, 10)] == pytest.approx([0.0, 0.2, 1.0, 2.0])


def test_the_cosine_ends_at_the_final_ratio() -> None:
    assert learning_rate(55, COSINE, 2.0, 100) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(100, COSINE, 2.0, 100) == pytest.approx(0.2)


def test_the_constant_rate_cools_down_linearly() -> None:
    assert [learning_rate(s, CONSTANT, 2.0, 100) for s in (11, 80, 90, 100)] == pytest.approx([2.0, 2.0, 1.0, 0.0])


def test_without_cooldown_any_step_before_the_cooldown_is_the_same_for_all_lengths() -> None:
    """So that cooldown branches can start from any checkpoint of one trunk."""
    assert {learning_rate(50, CONSTANT, 2.0, length) for length in (70, 100, 10_000)} == {2.0}


@given(
    kind=st.sampled_from(["cosine", "constant"]),
    warmup=st.integers(0, 50),
    cooldown=st.integers(0, 50),
    ratio=st.floats(0, 1),
    length=st.integers(1, 80),
)
def test_rates_stay_between_zero_and_the_peak(kind: str, warmup: int, cooldown: int, ratio: float, length: int) -> None:
    values = {"kind": kind, "warmup_steps": warmup, "cooldown_steps": cooldown, "final_ratio": ratio}
    config = ScheduleConfig.model_validate(values)
    rates = [learning_rate(s, config, 1.0, length) for s in range(1, length + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
