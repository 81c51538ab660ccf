"""A run of a few steps whose evaluation and whose last save take long: `shown.py FOLDER`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from toy import DECAY, Toy, batches

from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import launch, progress
from swiftv2.engine.build import build_backend
from swiftv2.engine.loop import fit
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.saver import Saver
from swiftv2.engine.sentinel import Sentinel

LONG = 2.5


def evaluate(step: int, tick: Callable[[], None]) -> dict[str, float]:
    tick()
    time.sleep(LONG)
    return {"heldout/loss": float(step)}


def main() -> None:
    progress.LINE_SECONDS = 1.0  # a line every second, so that nobody waits for ten
    world = launch.start(EngineConfig(device="cpu"))
    finish = Saver.finish

    def slowly(saver: Saver) -> object:
        if saver.busy:
            time.sleep(LONG)
        return finish(saver)

    Saver.finish = slowly  # type: ignore[method-assign, assignment]
    train = TrainConfig(max_steps=30, global_batch=8, evaluate_every=15, save_every=100, save_minutes=0)
    backend = build_backend(EngineConfig(backend="plain"), OptimizerConfig(), Toy(), DECAY, world, 8 // world.size, 1)
    with (
        RunDirectory.open(Path(sys.argv[1]), "x: 1\n", world) as run,
        Sentinel.over(run, world, train, FaultsConfig()) as watch,
    ):
        fit(
            backend=backend,
            world=world,
            run=run,
            watch=watch,
            batches=lambda samples, _: batches(samples, world, 1, seconds=0.1),
            train=train,
            schedule=ScheduleConfig(warmup_steps=2),
            peak_lr=1e-3,
            seed=0,
            evaluate=evaluate,
        )
    launch.stop()


if __name__ == "__main__":
    main()
