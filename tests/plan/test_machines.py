"""Machines by name: what they hold, where each figure comes from, what is said of others."""

import pytest
from pydantic import ValidationError

from swiftv2.errors import UsageError
from swiftv2.plan.machines import Gpu, gpu, gpu_names, machine, machine_names, machine_of


@pytest.mark.parametrize("name", machine_names())
def test_every_figure_of_a_machine_and_its_gpu_names_its_source(name: str) -> None:
    entry = machine(name)
    assert all(source.strip() for source in (*entry.sources.values(), *entry.gpu.sources.values()))
    assert entry.injection_bandwidth == entry.nics_per_node * entry.nic_bandwidth


def test_figures_that_stand_in_the_vendors_sheets() -> None:
    perlmutter, aurora, frontier, h200 = (machine(n) for n in ("perlmutter-a100-80", "aurora", "frontier", "h200-ndr"))
    assert (perlmutter.gpus_per_node, perlmutter.nodes, machine("perlmutter-a100-40").nodes) == (4, 256, 1536)
    assert (perlmutter.injection_bandwidth, aurora.injection_bandwidth) == (100e9, 200e9)
    assert (frontier.injection_bandwidth, h200.injection_bandwidth) == (100e9, 400e9)
    assert (aurora.gpus_per_node, frontier.gpus_per_node, h200.gpus_per_node) == (12, 8, 8)
    assert gpu("a100-40").memory_bytes / 2**30 == pytest.approx(39.39, abs=0.01)
    assert gpu("a100-80").memory_bytes / 2**30 == pytest.approx(79.15, abs=0.01)
    assert gpu("h200").memory_bytes / 2**30 == pytest.approx(139.8, abs=0.01)


@pytest.mark.parametrize("name", gpu_names())
def test_units_of_a_gpu(name: str) -> None:
    """Bytes and FLOP/s, not GB and TFLOP/s."""
    entry = gpu(name)
    assert 30e9 < entry.memory_bytes < 200e9
    assert 1e12 < entry.memory_bandwidth < 1e13
    assert 1e13 < entry.peak_fp32_flops < entry.peak_bf16_flops < 1e15


def test_a_machine_is_found_by_its_gpu() -> None:
    assert machine_of("a100-80").name == "perlmutter-a100-80"
    assert machine_of("h200").gpu is gpu("h200")


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"no gpu is named 'v100'; there are a100-40, a100-80, h200"):
        machine_of("v100")
    with pytest.raises(UsageError, match=r"no machine is named 'summit'; there are perlmutter-a100-40"):
        machine("summit")


def test_a_figure_without_source_is_refused() -> None:
    tree = gpu("h200").model_dump()
    del tree["sources"]["memory_bytes"]
    with pytest.raises(ValidationError, match="h200: sources must name"):
        Gpu.model_validate(tree)
