"""The memory of a rank: the account of a step against live tensors, ZeRO against the number of ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import environment

from swiftv2.config.engine import EngineConfig
from swiftv2.plan.accounts import Layout, Ledger, account, padded
from swiftv2.plan.memory import Passes, RankMemory, largest_micro_batch, rank_memory
from swiftv2.plan.tape import FREED, GRADIENT, HELD, Event, Tape

ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"backend": "plain", "precision": "fp32"},
    "plain bf16": {"backend": "plain"},
    "zero0": {"zero_stage": 0, "precision": "fp32"},
    "zero0 bf16": {"zero_stage": 0, "gradient_accumulation_dtype": "bf16"},
    "zero1": {"zero_stage": 1, "precision": "fp32"},
    "zero1 bf16": {"zero_stage": 1},
    "zero2": {"zero_stage": 2, "precision": "fp32"},
    "zero2 bf16": {"zero_stage": 2},
    "zero2 bf16 states": {"gradient_accumulation_dtype": "bf16", "optimizer_dtype": "bf16"},
}
WORKER = Path(__file__).parent / "workers" / "states.py"


LAYOUT = Layout((77_357, 257, 103_571, 403, 80_197, 199), (0, 1) * 3)
"""Three linear layers whose sizes no number of ranks divides."""


def between_steps(name: str, world: int, layout: Layout) -> float:
    """Bytes that the account holds when a step is over."""
    ledger = Ledger()
    books = account(ledger, layout, EngineConfig.model_validate(ENGINES[name]), world, cuda=False)
    books.begin()
    start = ledger.total
    for index in reversed(range(len(layout.sizes))):
        books.gradient(index)
    books.passed(last=True)
    books.update()
    assert ledger.total == pytest.approx(start), "what a step takes it gives back"
    return start


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_states_are_those_of_the_real_backends(world: int, tmp_path: Path) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    chosen = {name: engine for name, engine in ENGINES.items() if world == 1 or engine.get("zero_stage")}
    program = [sys.executable, *several, str(WORKER), json.dumps(chosen), str(tmp_path)]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert len(ranks) == world
    for name in chosen:
        layout = Layout(tuple(ranks[0][name]["sizes"]), tuple(ranks[0][name]["group"]))
        assert max(rank[name]["held"] for rank in ranks) == pytest.approx(between_steps(name, world, layout), rel=0.01), name


EVEN = Layout((1_000,) * 64, (0, 1) * 32)


def a_tape(sizes: tuple[int, ...], element: int) -> Tape:
    """Activations of 10 MB a clip, then one gradient after another."""
    events = [Event(HELD, 0, 0.0, 1e7)]
    for index in reversed(range(len(sizes))):
        size = float(element * sizes[index])
        events += [Event(HELD, index + 1, size, 0.0), Event(GRADIENT, index, size, 0.0)]
    return Tape((*events, Event(FREED, 0, 0.0, 1e7)), sizes, 0, (0.0, 0.0), element)


def memory(
    name: str, world: int, layout: Layout = LAYOUT, clips: int = 1, accumulation: int = 1, cuda: bool = False, **engine: Any
) -> RankMemory:
    config = EngineConfig.model_validate({**ENGINES[name], **engine})
    tape = a_tape(layout.sizes, 4 if config.precision == "fp32" else 2)
    passes = Passes(lambda _: tape, lambda count: 10.0 * count)
    return rank_memory(passes, layout, config, world, clips, accumulation, cuda=cuda)


@pytest.mark.parametrize("world", [1, 2, 3, 8, 64])
def test_optimizer_states_are_shared_out(world: int) -> None:
    flat = sum(padded(sum(LAYOUT.sizes[i] for i in group), world) for group in LAYOUT.groups)
    for name in ("zero1", "zero2", "zero1 bf16", "zero2 bf16"):
        assert memory(name, world).most["optimizer"] == 12 * flat // world, name
    assert memory("zero2 bf16 states", world).most["optimizer"] == 6 * flat // world
    for name, each in (("plain", 8), ("plain bf16", 12), ("zero0", 8), ("zero0 bf16", 12)):
        assert memory(name, world).most["optimizer"] == each * LAYOUT.total, name


def test_stage_2_keeps_its_part_of_the_gradients_and_stage_1_all_until_the_last_pass() -> None:
    one, two = (memory(name, 8, EVEN, reduce_bucket_size=6_000) for name in ("zero1", "zero2"))
    assert one.most["gradients"] >= 4 * EVEN.total
    # Its eighth, whole parameters, once more as one flat tensor, and what is on its way to the bucket.
    assert 4 * EVEN.total / 8 <= two.most["gradients"] <= 3 * 4 * EVEN.total / 8
    assert two.most["buckets"] == 4 * 6_000 + 4 * 6_000, "a bucket, and its copy while it is summed"


def test_sums_over_micro_batches_stay_beside_new_gradients() -> None:
    once, twice, often = (memory("zero2", 4, accumulation=n) for n in (1, 2, 5))
    assert once.most["gradients"] < twice.most["gradients"] == often.most["gradients"]
    assert memory("plain", 1).most["gradients"] == memory("plain", 1, accumulation=4).most["gradients"]


def test_a_gpu_takes_buffers_whole_and_a_reserve() -> None:
    cpu, gpu = (memory("zero2", 2, cuda=cuda, reduce_bucket_size=1_000_000) for cuda in (False, True))
    assert gpu.most["buckets"] >= 4_000_000 > cpu.most["buckets"]
    assert gpu.reserve > 1e9
    assert cpu.reserve == 0
    double = memory("zero2", 2, cuda=True, reduce_bucket_size=1_000_000, overlap_comm=True)
    assert double.most["buckets"] == gpu.most["buckets"] + 4_000_000


def test_activations_grow_with_the_clips() -> None:
    few, many = (memory("plain", 1, clips=n) for n in (10, 30))
    assert many.activations - few.activations == 20 * 10_000_000
    assert many.other - few.other == 200


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    tape = a_tape(LAYOUT.sizes, 4)
    held = Passes(lambda _: tape, lambda _: 0.0)
    engine = EngineConfig.model_validate({**ENGINES["zero2"], "reduce_bucket_size": 100_000})
    for clips in (1, 2, 3, 100):
        room = rank_memory(held, LAYOUT, engine, 1, clips, 1).total
        assert largest_micro_batch(held, LAYOUT, engine, 1, room, accumulated=False) == clips
        assert largest_micro_batch(held, LAYOUT, engine, 1, room - 1, accumulated=False) == clips - 1
