"""What a line says of speed: parts that add up, averages that an outage does not spoil, nothing that is not known."""

import time

import pytest
import torch

from swiftv2.engine import meter as module
from swiftv2.engine.clock import Clock
from swiftv2.engine.energy import DeviceReadings
from swiftv2.engine.launch import World
from swiftv2.engine.meter import Meter
from swiftv2.engine.pace import RankPace, compare

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
COUNTS = {"brain_tokens": 300.0, "flops": 6e9, "clips": 4.0}


def _meter(peak_flops: float | None = None) -> tuple[Meter, Clock]:
    clock = Clock(CPU)
    return Meter(4, 100, clock, DeviceReadings(ALONE), CPU, peak_flops), clock


def _step(meter: Meter, clock: Clock, counts: dict[str, float], waits: float = 0.01, computes: float = 0.03) -> float:
    meter.begin()
    with clock.part("data"):
        time.sleep(waits)
    meter.waited(waits)
    with clock.part("forward"):
        time.sleep(computes)
    return meter.end(counts)


def test_parts_of_a_step_add_up_to_it() -> None:
    meter, clock = _meter()
    seconds = _step(meter, clock, COUNTS)
    values = meter.values(1)
    parts = {name: value for name, value in values.items() if name.startswith("seconds/") and name != "seconds/step"}
    assert values["seconds/step"] == pytest.approx(sum(parts.values()))
    assert values["seconds/step"] == pytest.approx(seconds, abs=2e-3)
    assert parts["seconds/data"] >= 0.01
    assert parts["seconds/forward"] >= 0.03
    assert "seconds/evaluation" not in values
    with clock.part("evaluation"):
        time.sleep(0.05)
    with clock.part("checkpoint"):
        time.sleep(0.02)
    meter.told()
    seconds = _step(meter, clock, COUNTS)
    values = meter.values(2)
    assert values["seconds/evaluation"] >= 0.05
    assert values["seconds/checkpoint"] >= 0.02
    assert values["seconds/step"] == pytest.approx(seconds + values["seconds/checkpoint"], abs=3e-3)


def test_between_lines_parts_are_averaged() -> None:
    meter, clock = _meter()
    for computes in (0.02, 0.06):
        _step(meter, clock, COUNTS, computes=computes)
    assert meter.values(2)["seconds/forward"] == pytest.approx(0.04, abs=4e-3)
    meter.told()
    _step(meter, clock, COUNTS, computes=0.02)
    assert meter.values(3)["seconds/forward"] == pytest.approx(0.02, abs=4e-3)


def test_rates_follow_from_counts_and_seconds() -> None:
    meter, clock = _meter(peak_flops=1e12)
    seconds = [_step(meter, clock, COUNTS) for _ in range(3)]
    values = meter.values(3)
    mean = sum(seconds) / 3
    assert values["clips_per_second"] == pytest.approx(4 / mean)
    assert values["brain_tokens_per_second"] == pytest.approx(300 / mean)
    assert values["tflops"] == pytest.approx(6e9 / mean / 1e12)
    assert values["mfu"] == pytest.approx(6e9 / mean / 1e12)
    assert values["memory/host_gb"] > 0.05


def test_what_is_not_counted_is_not_there() -> None:
    meter, clock = _meter(peak_flops=1e12)
    _step(meter, clock, {})
    unknown = {"tflops", "mfu", "brain_tokens_per_second", "memory/peak_gb", "gpu/utilisation", "spread/step_seconds"}
    assert not unknown & meter.values(1).keys()


def test_an_outage_spoils_no_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUTAGE_SECONDS", 0.2)
    meter, clock = _meter()
    for waits in (0.01, 0.01, 0.01, 0.5, 0.01):
        _step(meter, clock, COUNTS, waits=waits, computes=0.01)
    values = meter.values(5)
    assert values["clips_per_second"] > 4 / 0.05
    assert values["seconds_left"] < 95 * 0.05
    assert meter.longest > 0.5, "but what a step may take is known"


def test_the_spread_over_ranks_is_told_until_the_next() -> None:
    meter, clock = _meter()
    paces = [RankPace(0, "a", 0.1, 0.4, 1.0), RankPace(1, "b", 0.1, 0.6, 1.1), RankPace(2, "c", 0.1, 0.4, 1.0)]
    meter.compared(compare(paces))
    for step in (1, 2):
        _step(meter, clock, COUNTS)
        values = meter.values(step)
        assert values["spread/step_seconds"] == pytest.approx(1.1)
        assert values["spread/compute_seconds"] == pytest.approx(1.5)
        assert values["spread/data_seconds"] == 1.0
