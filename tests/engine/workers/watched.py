"""Ranks that step together under the sentinel, and what befalls one of them: `watched.py FOLDER JSON`."""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from swiftv2.config.engine import EngineConfig
from swiftv2.engine import launch
from swiftv2.engine.collective import agree
from swiftv2.engine.launch import World
from swiftv2.engine.pace import Pace
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.signals import STOPPED_EARLY, StopRequest

LONG = 100.0


def befall(fault: str) -> None:
    """Hold this rank up where it is."""
    if fault == "sleep":
        time.sleep(LONG)
    elif fault == "lock":
        ctypes.PyDLL(None).sleep(int(LONG))  # Called with Python's lock held: no other thread runs any more.


def train(world: World, watch: Sentinel, request: StopRequest, folder: Path, options: dict[str, Any]) -> int:
    for step in range(1, options["steps"] + 1):
        (folder / f"step-{world.rank}").write_text(str(step))
        for phase in ("data", "compute"):
            watch.at(step, phase)
            if (world.rank, step, phase) == tuple(options.get("at", ())):
                befall(options["fault"])
        if world.size > 1:
            dist.all_reduce(torch.ones(3))
        time.sleep(options.get("seconds", 0.02))
        if agree(world, stop=request.code).stop:
            return STOPPED_EARLY
    return 0


def slow(world: World) -> dict[str, Any]:
    """What is told of ranks of which the last waits for data and computes longer than the others."""
    module = torch.nn.Identity()
    pace = Pace(world, module)
    last = world.rank == world.size - 1
    module.register_forward_pre_hook(lambda *_: time.sleep(0.03 if last else 0.002))
    for _ in range(5):
        pace.waited(0.05 if last else 0.001)
        module.train()(torch.ones(1))
        module.eval()(torch.ones(1))
        pace.stepped(0.1)
    return pace.report(world)


def main() -> int:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = launch.start(EngineConfig(device="cpu"))
    if options.get("slow"):
        (folder / f"slow-{world.rank}.json").write_text(json.dumps(slow(world)))
        return 0

    def tell(kind: str, values: dict[str, Any]) -> None:
        with (folder / "told.jsonl").open("a") as lines:
            lines.write(json.dumps({"kind": kind, "told_by": world.rank, **values}) + "\n")
        if options.get("tell") == "hangs":
            time.sleep(LONG)

    watch = Sentinel(world, folder / "logs", 1, options["hang"], options["grace"], tell, options["lost"])
    with watch, StopRequest(heard=watch.stopping) as request:
        status = train(world, watch, request, folder, options)
        time.sleep(options.get("stay", [0.0] * world.size)[world.rank])
    time.sleep(options.get("after", 0.0))
    launch.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
