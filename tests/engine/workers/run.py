"""A whole run of the toy through `fit`: `run.py RUN_DIR JSON`; ends with the exit status of `fit`."""

import json
import sys
from pathlib import Path

import yaml
from toy import DECAY, GLOBAL_BATCH, Batches, Toy

from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig, split_batch
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import launch
from swiftv2.engine.build import build_backend
from swiftv2.engine.loop import fit
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.stream import Exclusion


def main() -> int:
    path, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    train = TrainConfig(global_batch=GLOBAL_BATCH, **options["train"])
    engine = EngineConfig(device="cpu", **options["engine"])
    schedule = ScheduleConfig(kind="constant", warmup_steps=5)
    optimizer = OptimizerConfig(lr=1e-2)
    world = launch.start(engine)
    micro, accumulation = split_batch(train.global_batch, world.size, train.micro_batch)
    sections = {"engine": engine, "train": train, "schedule": schedule, "optimizer": optimizer}
    text = yaml.safe_dump({name: section.model_dump(mode="json") for name, section in sections.items()})
    faults = FaultsConfig(**options.get("faults", {}))
    with RunDirectory.open(path, text, world) as run, Sentinel.over(run, world, train, faults) as watch:
        backend = build_backend(engine, optimizer, Toy(), DECAY, world, micro, accumulation)
        result = fit(
            backend=backend,
            world=world,
            run=run,
            watch=watch,
            batches=lambda samples, exclusions: Batches(
                samples,
                world,
                accumulation,
                options.get("seconds", 0.0),
                exclusions or [Exclusion(*one) for one in options.get("exclude", [])],
                {int(clip): factor for clip, factor in options.get("poison", {}).items()},
            ),
            train=train,
            schedule=schedule,
            peak_lr=optimizer.lr,
            seed=0,
            faults=faults,
        )
        backend.close()
    launch.stop()
    return result.exit_status


if __name__ == "__main__":
    sys.exit(main())
