"""Rank 1 leaves while a thread of gloo waits for the interpreter, to let go of what was reduced."""

import sys
import time

import torch
import torch.distributed as dist

from swiftv2.config.engine import EngineConfig
from swiftv2.engine import launch


def main() -> None:
    world = launch.start(EngineConfig(device="cpu"))
    numbers = torch.ones(4)
    if world.rank == 0:
        time.sleep(0.5)
        dist.all_reduce(numbers)
    else:
        dist.all_reduce(numbers, async_op=True)
        sys.setswitchinterval(100)  # no other thread gets the interpreter while this one computes
        end = time.perf_counter() + 1.5
        while time.perf_counter() < end:
            pass
    launch.stop()


if __name__ == "__main__":
    main()
