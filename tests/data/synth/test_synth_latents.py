"""The latents, the traits and the ceilings that are published with a generated cohort."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from swiftv2.config.synth import SynthConfig
from swiftv2.data import keyed
from swiftv2.data.synth.latents import breathing, haemodynamic_response, network_bold
from swiftv2.data.synth.oracle import auroc, ceilings, readings
from swiftv2.data.synth.people import BINARY, Person, draw_people

CONFIG = SynthConfig(sibling_share=0.0)
DRAWS = 800


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return draw_people(CONFIG, DRAWS, purpose="test people")


@pytest.fixture(scope="module")
def measured(people: list[Person]) -> list[dict[str, float]]:
    """What a perfect reader measures on one run of each, on other draws than those of the published ceilings."""
    return [readings(CONFIG, person, "test latents") for person in people]


def _times(count: int, step: float) -> NDArray[np.float64]:
    return np.arange(count, dtype=np.float64) * np.float64(step)


@pytest.mark.parametrize(("trait", "ceiling"), [("coupling_weak", 0.65), ("coupling_medium", 0.75), ("coupling_strong", 0.9)])
def test_connectivity_tells_the_coupling_as_well_as_said(
    people: list[Person], measured: list[dict[str, float]], trait: str, ceiling: float
) -> None:
    found = auroc([person.labels[trait] for person in people], [values[trait] for values in measured])
    assert found == pytest.approx(ceiling, abs=0.045)


def test_only_a_lag_tells_the_lagged_trait(people: list[Person], measured: list[dict[str, float]]) -> None:
    labels = [person.labels["lagged"] for person in people]
    assert auroc(labels, [values["lagged"] for values in measured]) > 0.95
    assert auroc(labels, [values["lagged_static"] for values in measured]) == pytest.approx(0.5, abs=0.06)


def test_no_correlation_at_equal_times_tells_the_lagged_trait(people: list[Person]) -> None:
    seconds = _times(CONFIG.frames, 2.0)
    edges = []
    for person in people[:300]:
        bold = network_bold(person, keyed.generator(0, "static", person.index), seconds)
        edges.append(np.asarray(np.corrcoef(bold.T))[np.triu_indices(bold.shape[1], 1)])
    labels = [person.labels["lagged"] for person in people[:300]]
    scores = np.array([auroc(labels, edge) for edge in np.array(edges).T])
    # 136 edges: the largest deviation of as many null scores (standard error 0.033) stays within four of them.
    assert np.abs(scores - 0.5).max() < 0.14
    assert np.abs(scores - 0.5).mean() < 0.04


def test_nothing_tells_the_null_trait(people: list[Person], measured: list[dict[str, float]]) -> None:
    labels = [person.labels["null"] for person in people]
    for trait in BINARY:
        assert auroc(labels, [values[trait] for values in measured]) == pytest.approx(0.5, abs=0.07)


def test_slope_and_confounded_traits(people: list[Person], measured: list[dict[str, float]]) -> None:
    slope = np.corrcoef([person.labels["slope"] for person in people], [values["slope"] for values in measured])[0, 1]
    assert slope == pytest.approx(0.4, abs=0.09)
    for trait in ("motion_confounded", "site_confounded"):
        assert auroc([person.labels[trait] for person in people], [values[trait] for values in measured]) > 0.7


@pytest.mark.slow
def test_published_ceilings_agree_with_other_draws(people: list[Person], measured: list[dict[str, float]]) -> None:
    published = ceilings(CONFIG)
    for trait in BINARY:
        found = auroc([person.labels[trait] for person in people], [values[trait] for values in measured])
        assert abs(found - published[trait]["oracle"]) < 4 * np.hypot(published[trait]["standard_error"], 0.02)


def test_signals_do_not_know_the_repetition_time(people: list[Person]) -> None:
    slow = dataclasses.replace(people[0], tr=2.0)
    fast = dataclasses.replace(people[0], tr=1.0)
    coarse = network_bold(slow, keyed.generator(0, "signal", 0), _times(60, 2.0))
    fine = network_bold(fast, keyed.generator(0, "signal", 0), _times(120, 1.0))
    np.testing.assert_allclose(fine[::2], coarse, atol=1e-5)


def test_signals_have_unit_variance_and_breathing_its_rhythm(people: list[Person]) -> None:
    seconds = _times(150, 2.0)
    bold = np.stack([network_bold(person, keyed.generator(1, "signal", person.index), seconds) for person in people[:40]])
    assert bold.var(axis=1).mean() == pytest.approx(1.0, abs=0.1)
    fine = _times(600, 0.5)
    power = np.abs(np.fft.rfft(breathing(keyed.generator(0, "breathing"), fine))) ** 2
    assert 0.2 < np.fft.rfftfreq(len(fine), 0.5)[power.argmax()] < 0.38


def test_the_response_peaks_at_five_seconds_and_undershoots() -> None:
    times = _times(320, 0.1)
    response = haemodynamic_response(times)
    assert times[response.argmax()] == pytest.approx(5.0, abs=0.1)
    assert 12 < times[response.argmin()] < 18
    assert response.min() < 0
