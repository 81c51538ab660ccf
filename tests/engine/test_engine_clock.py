"""Where a step's time goes: parts nest, lose nothing and count nothing twice."""

import time

import pytest
import torch

from swiftv2.engine.clock import PARTS, Clock, Part

CPU = torch.device("cpu")


def test_parts_nest_and_add_up_to_the_time_that_passed() -> None:
    clock = Clock(CPU)
    clock.take()
    began = time.perf_counter()
    time.sleep(0.02)
    with clock.part("backward"):
        time.sleep(0.03)
        with clock.part("communication"):
            time.sleep(0.05)
        time.sleep(0.01)
    with clock.part("data"):
        time.sleep(0.02)
    found = clock.take()
    passed = time.perf_counter() - began
    assert sum(found.values()) == pytest.approx(passed, abs=1e-3)
    assert tuple(found) == PARTS
    slept: dict[Part, float] = {"other": 0.02, "backward": 0.04, "communication": 0.05, "data": 0.02}
    for name, least in slept.items():
        assert found[name] >= least, name  # sleeps last a little longer, and never shorter
    assert found["forward"] == found["copy"] == 0.0
    assert sum(clock.take().values()) < 5e-3, "what was taken begins anew"


def test_an_error_ends_its_part() -> None:
    clock = Clock(CPU)
    with pytest.raises(ValueError, match="lost"), clock.part("forward"):
        raise ValueError("lost")
    clock.take()
    time.sleep(0.01)
    found = clock.take()
    assert found["forward"] == 0.0
    assert found["other"] >= 0.01


@pytest.mark.gpu
def test_a_gpus_parts_are_those_of_its_own_time_line() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    (x @ x).sum().item()
    clock = Clock(device)
    clock.lap()
    (x @ x).sum().item()
    clock.lap()
    torch.zeros(1, device=device).item()
    clock.waited()
    clock.take()
    began = time.perf_counter()
    with clock.part("forward"):
        for _ in range(20):
            y = x @ x
    issued = time.perf_counter() - began
    with clock.part("data"):
        time.sleep(0.2)  # the products end meanwhile: the device stands still for the rest
    clock.lap()
    y.sum().item()
    clock.waited()
    passed = time.perf_counter() - began
    found = clock.take()
    assert issued < found["forward"] < 0.2, "queued at once, computed later"
    assert 0.0 < found["data"] < 0.2, "only as far as the device had nothing to do"
    assert sum(found.values()) == pytest.approx(passed, rel=0.05)
