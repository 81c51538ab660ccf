"""Rank 1 leaves while a thread of gloo, which a busy machine held up, waits to let go of what was reduced."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from swiftv2.config.engine import EngineConfig
from swiftv2.engine import launch
from swiftv2.engine.launch import World


def compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def late(action: Callable[..., Any]) -> Callable[..., Any]:
    def act() -> None:
        action()
        compute(1.5)

    return act


def main() -> World:
    world = launch.start(EngineConfig(device="cpu"))
    numbers = torch.ones(4)
    if world.rank == 0:
        time.sleep(0.5)
        dist.all_reduce(numbers, group=world.control)
    else:
        dist.all_reduce(numbers, group=world.control, async_op=True)
        sys.setswitchinterval(100)  # no other thread gets the interpreter while this one computes
        dist.destroy_process_group = late(dist.destroy_process_group)
    launch.stop()
    return world


if __name__ == "__main__":
    kept = main()  # the group's threads live on with it, as they do with DeepSpeed
