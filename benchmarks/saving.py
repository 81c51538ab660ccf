"""What a checkpoint costs a run: the part that training waits for, the part beside it, and DeepSpeed's own save.

One process trains a model for real and takes turns: steps alone, steps while an ephemeral checkpoint is written, and a save
by DeepSpeed's `save_checkpoint`, which training waits for. All is paired within a round.

    python benchmarks/saving.py --out benchmarks/results/YYYY-MM-DD-saving.md
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import machine

from swiftv2.config.engine import TrainConfig
from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine import launch
from swiftv2.engine.build import build_backend
from swiftv2.engine.checkpoint import TrainerState
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.saver import Saver
from swiftv2.models import decay_names
from swiftv2.recipes.planning import find_window, make_batch, make_objective
from swiftv2.records import read_lines

TARGET = 0.01
RATE = 1e-6


class Round(NamedTuple):
    """Seconds of one round."""

    alone: float
    """A step with nothing beside it."""
    beside: float
    """A step while a checkpoint is written."""
    steps: int
    """Steps that began while it was written."""
    blocking: float
    """Training waited for the save."""
    whole: float
    """From its beginning to the checkpoint that counts."""
    deepspeed: float
    """Training waits for DeepSpeed's own save."""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to be written instead of the screen")
    parser.add_argument("--model", default="51M", help="pretraining preset (default 51M)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; a temporary folder by default")
    parser.add_argument("words", nargs="*", metavar="SECTION.KEY=VALUE", help="changes of the preset")
    arguments = parser.parse_args()
    words = ["data.store=none.zarr", "train.global_batch=1", "train.micro_batch=1", *arguments.words]
    config = load(PretrainConfig, find_preset("pretrain", arguments.model), words)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rounds, size = _measure(config, Path(folder) / "run", arguments.rounds)
    machine.write_page(_page(config, rounds, size), arguments.out)


def _measure(config: PretrainConfig, folder: Path, count: int) -> tuple[list[Round], int]:
    world = launch.start(config.engine)
    window = find_window(config)
    objective = make_objective(config, window)
    backend = build_backend(config.engine, config.optimizer, objective, decay_names(objective), world, 1, 1)
    batch = make_batch(config, window, 1).to(world.device)
    train = TrainConfig(max_steps=10**6, global_batch=1, keep_last=1, deepspeed_files=False)
    rounds = []

    def step() -> None:
        backend.forward_backward(batch)
        backend.step(RATE)

    with RunDirectory.open(folder, "{}", world) as run, Saver(run, backend, world, train) as saver:
        for number in range(count + 1):
            alone = statistics.median(_timed(step) for _ in range(3))
            state = TrainerState(number, number, 1, 0, 1, 1, 1, "")
            beside = []
            saver.begin(state, permanent=False)
            while not saver.flushed:
                beside.append(_timed(step))
            saver.finish()
            (*_, told) = (e for e in read_lines(folder / "events.jsonl") if e["event"] == "saved")
            native = _timed(lambda: backend.save_native(folder / "native", 1, 1))
            rounds.append(
                Round(alone, statistics.fmean(beside), len(beside), told["blocking_seconds"], told["seconds"], native)
            )
            print(rounds[-1], file=sys.stderr)
    backend.close()
    launch.stop()
    return rounds[1:], told["bytes"]


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _page(config: PretrainConfig, rounds: list[Round], size: int) -> str:
    interval = 60 * config.train.save_minutes
    slower = [one.beside / one.alone for one in rounds]
    lost = [(one.beside - one.alone) * one.steps for one in rounds]
    blocking = statistics.median(one.blocking for one in rounds)
    share = blocking / interval
    text = (
        f"{config.model.name}, {config.engine.backend}, {config.engine.precision}, one rank, one clip a step; a checkpoint of "
        f"{size / 1e6:,.0f} MB (fp32 weights and both moments). Medians over {len(rounds)} rounds after one that is not "
        "counted, lowest to highest in brackets. The state is copied while training waits; a thread writes, hashes and syncs "
        "it beside the next steps, for which on this machine it takes processor time from them."
    )
    rows = [
        ("step alone, s", _range([one.alone for one in rounds])),
        ("training waits for an ephemeral checkpoint, s", _range([one.blocking for one in rounds])),
        ("from its beginning until it counts, s", _range([one.whole for one in rounds])),
        ("step beside the writing, times a step alone", _range(slower)),
        ("time lost to that, s a checkpoint", _range(lost)),
        ("training waits for DeepSpeed's own save, s", _range([one.deepspeed for one in rounds])),
        ("DeepSpeed's wait, times ours", _range([one.deepspeed / one.blocking for one in rounds])),
    ]
    verdict = (
        f"Every {config.train.save_minutes:g} minutes (the default), training waits {share:.2%} of its time: the target is "
        f"{TARGET:.0%}, {'met' if share < TARGET else 'MISSED'}. With what steps lose beside the writing it is "
        f"{(blocking + statistics.median(lost)) / interval:.2%}."
    )
    body = [*machine.prose(text), *machine.table(("what", "measured"), rows), *machine.prose(verdict)]
    return machine.page("What a checkpoint costs a run", ("torch", "deepspeed"), body)


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
