"""One rank of a toy's run through `fit` that is to meet a fault: `victim.py RUN_DIR JSON` under a launcher's variables.

Options, all but `engine` and `train` may be left out: `engine`, `train`, `faults`: settings; `seconds`: of every micro-batch;
`evaluate`: {parts, seconds}; `poison`: {clip: factor on its targets}; `gradient`: clips whose gradient is infinite; `exclude`:
[[clip, position]]; `slow`: {rank, step, seconds} of one wait for data; `ask`: a signal to itself before the first batch;
`die`: {stage, rank, step}, see `stages`.

It touches files in `logs` that tell where it is.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "engine" / "workers"))
from stages import arm
from toy import DECAY, GLOBAL_BATCH, Batches, Micro, Toy, sample

from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig, split_batch
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import launch
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.launch import World
from swiftv2.engine.loop import FitResult, fit
from swiftv2.engine.loss import after_loss, lost_each_other
from swiftv2.engine.place import find_place
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import SwiftError

HELD_OUT = 1_000_000
"""Clips from here on are never trained on."""


class Fragile(Batches):
    """The toy's batches, which may keep a rank waiting once."""

    def __init__(self, options: dict[str, Any], logs: Path, samples: int, world: World, accumulation: int, gone: Any) -> None:
        poison = {int(clip): float(factor) for clip, factor in options.get("poison", {}).items()}
        super().__init__(samples, world, accumulation, options.get("seconds", 0.0), gone, poison)
        self._slow, self._logs, self._rank = options.get("slow", {}), logs, world.rank

    def __next__(self) -> Micro:
        step = self._next // GLOBAL_BATCH + 1
        if self._slow.get("rank") == self._rank and self._slow["step"] == step:
            with mark(self._logs, "waiting"):
                time.sleep(self._slow["seconds"])
        return super().__next__()

    def clips(self) -> list[int]:
        """Of the last micro-batch."""
        return [clip for clip, _ in self._handed[-1]]


@contextmanager
def mark(logs: Path, name: str) -> Iterator[None]:
    """A file is there meanwhile."""
    (logs / name).touch()
    try:
        yield
    finally:
        (logs / name).unlink(missing_ok=True)


def evaluation(backend: Backend, world: World, logs: Path, parts: int, seconds: float) -> Callable[..., dict[str, float]]:
    """The toy's loss on held-out clips, a few at a time."""

    def evaluate(step: int, tick: Callable[[], None]) -> dict[str, float]:
        del step
        losses = []
        backend.module.eval()
        try:
            with torch.no_grad(), mark(logs, f"evaluating-{world.rank}"):
                for part in range(parts):
                    pairs = [sample(HELD_OUT + 4 * part + index) for index in range(4)]
                    inputs, targets = (
                        torch.stack([torch.from_numpy(one) for one in side]) for side in zip(*pairs, strict=True)
                    )
                    losses.append(float(backend.module((inputs, targets))))
                    time.sleep(seconds)
                    tick()
        finally:
            backend.module.train()
        return {"heldout/loss": sum(losses) / len(losses)}

    return evaluate


def train(path: Path, options: dict[str, Any]) -> FitResult:
    """The run, as a recipe would put it together."""
    settings = TrainConfig(global_batch=GLOBAL_BATCH, **options["train"])
    engine = EngineConfig(device="cpu", **options["engine"])
    schedule = ScheduleConfig(kind="constant", warmup_steps=5)
    optimizer = OptimizerConfig(lr=1e-2)
    # Before ranks meet, as recipes do: else one may leave while another still looks for it.
    micro, accumulation = split_batch(settings.global_batch, find_place(os.environ).size, settings.micro_batch)
    world = launch.start(engine)
    sections = {"engine": engine, "train": settings, "schedule": schedule, "optimizer": optimizer}
    text = yaml.safe_dump({name: section.model_dump(mode="json") for name, section in sections.items()})
    if "die" in options:
        arm(world.rank, **options["die"])
    module, streams = Toy(), list[Fragile]()
    poisoned = set(options.get("gradient", ()))
    module.second.weight.register_hook(  # type: ignore[no-untyped-call]  # of PyTorch's
        lambda gradient: torch.full_like(gradient, torch.inf) if poisoned & set(streams[-1].clips()) else gradient
    )

    def batches(samples: int, exclusions: list[Exclusion]) -> Fragile:
        if "ask" in options and samples == 0 and world.rank == world.size - 1:
            os.kill(os.getpid(), options["ask"])
        gone = exclusions or [Exclusion(*one) for one in options.get("exclude", [])]
        streams.append(Fragile(options, path / "logs", samples, world, accumulation, gone))
        return streams[-1]

    try:
        faults = FaultsConfig(**options.get("faults", {}))
        with RunDirectory.open(path, text, world) as run, Sentinel.over(run, world, settings, faults) as watch:
            backend = build_backend(engine, optimizer, module, DECAY, world, micro, accumulation)
            asked = options.get("evaluate")
            result = fit(
                backend=backend,
                world=world,
                run=run,
                watch=watch,
                batches=batches,
                train=settings,
                schedule=schedule,
                peak_lr=optimizer.lr,
                seed=0,
                faults=faults,
                evaluate=evaluation(backend, world, path / "logs", **asked) if asked else None,
                best_metric="heldout/loss" if asked else None,
            )
            backend.close()
            return result
    finally:
        launch.stop()


def main(path: Path, options: dict[str, Any]) -> int:
    """Train, and tell failures as the command line does: one line, and a status."""
    faulthandler.enable()
    try:
        return train(path, options).exit_status
    except SwiftError as error:
        sys.stderr.write(f"swiftv2: {error}\n")
        return error.exit_status
    except OSError as error:
        sys.stderr.write(f"swiftv2: {error.filename}: {error.strerror}\n")
        return 1
    except RuntimeError as error:
        if not lost_each_other(error):
            raise
        told = after_loss(error)
        sys.stderr.write(f"swiftv2: {told}\n")
        return told.exit_status


def rank(path: Path, options: dict[str, Any], variables: dict[str, str], log: Path) -> None:
    """What a process that was forked for it runs: a rank with its own variables, whose words go to a file."""
    os.environ.update(variables)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(path, options))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
