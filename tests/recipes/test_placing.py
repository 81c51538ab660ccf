"""Where a run fits, and that it is told as `swiftv2 plan` tells it."""

import pytest

from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.recipes.placing import find_machine, place
from swiftv2.recipes.planning import plan

WORDS = (
    *("data.store=none.zarr", "model.image_size=[24,24,24]", "model.depths=[1,1]"),
    *("train.global_batch=64", "train.micro_batch=2", "engine.precision=bf16"),
)


def run(*words: str) -> PretrainConfig:
    return load(PretrainConfig, find_preset("pretrain", "demo"), (*WORDS, *words))


@pytest.mark.slow
def test_memory_and_hours_are_those_of_the_plan() -> None:
    config = run("train.max_steps=1000")
    placed = place(config, find_machine("a100-40"), 0.35, nodes=4)
    planned = plan(placed.config, nodes=4, gpu="a100-40")
    assert placed.config == config
    assert (placed.machine, placed.nodes) == (planned.machine, 4)
    assert placed.memory_bytes == planned.memory.total
    likely, fast, slow = placed.hours(1000)
    assert likely == pytest.approx(24 * planned.budget["days_likely"])
    assert fast == pytest.approx(24 * planned.budget["days_fast"])
    assert slow == pytest.approx(24 * planned.budget["days_slow"])
    assert fast <= likely <= slow


@pytest.mark.slow
def test_as_few_nodes_as_end_in_time() -> None:
    config, machine = run("train.max_steps=100000"), find_machine("perlmutter-a100-40")
    slowly = 1e-4  # Of the peak: what is sent then takes no time beside the passes.
    one = place(config, machine, slowly)
    assert one.nodes == 1
    needed = one.hours(100000)[0]
    two = place(config, machine, slowly, hours=0.9 * needed)
    assert two.nodes == 2
    assert two.hours(100000)[0] <= 0.9 * needed
    assert one.affords(needed) in {99999, 100000}
    with pytest.raises(UsageError, match=r"h at least on the nodes of perlmutter-a100-40 over which train\.global_batch=64"):
        place(config, machine, slowly, hours=1e-6)


@pytest.mark.slow
def test_what_does_not_fit_as_configured_is_made_lighter() -> None:
    """Clips at a time by thousands do not fit 40 GB; fewer do, and nothing else is changed."""
    big = run("train.global_batch=262144", "train.micro_batch=65536")
    placed = place(big, find_machine("a100-40"), 0.35, nodes=1)
    assert placed.memory_bytes <= find_machine("a100-40").gpu.memory_bytes
    assert placed.config.train.micro_batch is not None
    assert 65536 % placed.config.train.micro_batch == 0
    assert placed.config.train.micro_batch < 65536
    assert placed.config.model == big.model
    longer = run("train.global_batch=262144", "train.max_steps=7")
    assert placed.lasting(longer).train.max_steps == 7
    assert placed.lasting(longer).train.micro_batch == placed.config.train.micro_batch


def test_weights_that_are_larger_than_the_gpu_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"does not fit 1 node of perlmutter-a100-40: .* GB short"):
        place(run("model.embed_dim=24000"), find_machine("a100-40"), 0.35, nodes=1)


def test_machines_and_nodes_that_are_not() -> None:
    assert find_machine("h200") == find_machine("h200-ndr")
    with pytest.raises(UsageError, match=r"no machine is named 'laptop'; there are perlmutter-a100-40, .*, h200"):
        find_machine("laptop")
    machine = find_machine("perlmutter-a100-80")
    with pytest.raises(UsageError, match="has 1 to 256 nodes"):
        place(run(), machine, 0.35, nodes=9999)
    with pytest.raises(UsageError, match="global_batch=64 cannot be split over 12 ranks"):
        place(run(), machine, 0.35, nodes=3)
    with pytest.raises(UsageError, match="cannot be split over the 4 GPUs of a node"):
        place(run("train.global_batch=6"), machine, 0.35)
