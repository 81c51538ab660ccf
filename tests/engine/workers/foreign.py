"""Whole runs of the toy under configurations of `swiftv2 pretrain`, one after another: `foreign.py JSON`.

Each task has `config` (a YAML file), `overrides`, and `frozen`: names of parameters that are not trained.
"""

import json
import sys
from pathlib import Path

from toy import DECAY, Batches, Toy

from swiftv2.config.engine import EngineConfig, split_batch
from swiftv2.config.load import dump, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine import launch
from swiftv2.engine.build import build_backend
from swiftv2.engine.launch import World
from swiftv2.engine.loop import fit
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel


def run(config: PretrainConfig, frozen: list[str], world: World) -> None:
    micro, accumulation = split_batch(config.train.global_batch, world.size, config.train.micro_batch)
    model = Toy()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    with (
        RunDirectory.open(config.run.dir, dump(config), world) as directory,
        Sentinel.over(directory, world, config.train, config.faults) as watch,
    ):
        backend = build_backend(config.engine, config.optimizer, model, DECAY, world, micro, accumulation)
        fit(
            backend=backend,
            world=world,
            run=directory,
            watch=watch,
            batches=lambda samples, exclusions: Batches(samples, world, accumulation, exclusions=exclusions),
            train=config.train,
            schedule=config.schedule,
            peak_lr=config.optimizer.lr,
            seed=config.run.seed,
        )
        backend.close()


def main() -> None:
    world = launch.start(EngineConfig(device="cpu"))
    for task in json.loads(sys.argv[1]):
        run(load(PretrainConfig, Path(task["config"]), task["overrides"]), task["frozen"], world)
    launch.stop()


if __name__ == "__main__":
    main()
