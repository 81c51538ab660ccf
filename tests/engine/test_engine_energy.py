"""Energy by the counters of real machines' file trees: full ones begin again, unreadable ones give no figure."""

import math
import os
import time
from pathlib import Path

import pytest
import torch

from swiftv2.engine.energy import DeviceReadings, find_packages
from swiftv2.engine.launch import World

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def _zone(root: Path, name: str, microjoules: int, whole: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{whole}\n")
    return folder


def test_a_full_counter_begins_again_and_loses_nothing(tmp_path: Path) -> None:
    folder = _zone(tmp_path, "intel-rapl:0", 900_000_000, whole=1_000_000_000)
    (package,) = find_packages(tmp_path)
    assert package.joules() == 0
    for reading, spent in ((950_000_000, 50), (20_000_000, 120), (20_000_000, 120), (999_000_000, 1099), (0, 1100)):
        (folder / "energy_uj").write_text(f"{reading}\n")
        assert package.joules() == pytest.approx(spent)


def test_parts_of_a_package_do_not_count_beside_it(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        _zone(tmp_path, name, 5)
    assert len(find_packages(tmp_path)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    (_zone(tmp_path, "intel-rapl:0", 5) / "energy_uj").chmod(0)
    assert find_packages(tmp_path) == []


def test_without_counters_nothing_is_claimed(tmp_path: Path) -> None:
    with DeviceReadings(CPU, tmp_path / "none") as readings:
        assert readings.sources == []
        assert math.isnan(readings.spent())
        assert readings.utilisation() is None


def test_joules_are_told_once(tmp_path: Path) -> None:
    folder = _zone(tmp_path, "intel-rapl:0", 0)
    with DeviceReadings(CPU, tmp_path) as readings:
        assert readings.sources == ["cpu"]
        (tmp_path / "next").write_text("7000000\n")
        (tmp_path / "next").rename(folder / "energy_uj")
        spent, deadline = 0.0, time.monotonic() + 20
        while not spent and time.monotonic() < deadline:
            time.sleep(0.05)
            spent = readings.spent()
        assert spent == 7.0
        assert readings.spent() == 0.0


def test_other_ranks_of_a_node_leave_its_processors_to_the_first(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", 0)
    with DeviceReadings(World(1, 2, 1, 2, torch.device("cpu")), tmp_path) as readings:
        assert readings.spent() == 0.0, "known, and none of its own"


@pytest.mark.gpu
def test_a_gpu_tells_what_it_spends() -> None:
    world = World(0, 1, 0, 1, torch.device("cuda", 0))
    x = torch.randn(8192, 8192, device=world.device)
    with DeviceReadings(world) as readings:
        assert "gpu" in readings.sources
        ends = time.monotonic() + 4
        while time.monotonic() < ends:
            (x @ x).sum().item()
        spent, used = readings.spent(), readings.utilisation()
    assert 50 < spent < 10_000, "some hundred watts for some seconds"
    assert used is not None
    assert 0.3 < used <= 1
