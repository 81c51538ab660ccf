"""How often a step brings numbers to the host: ours, which judges it, and DeepSpeed's alone; prints JSON."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.zero import stage_1_and_2
from torch.overrides import TorchFunctionMode
from toy import DECAY, Batches, Toy

from swiftv2.config.engine import EngineConfig, FaultsConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import launch
from swiftv2.engine.guard import SpikeGuard
from swiftv2.engine.zero import ZeroBackend

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu"}
MODULES = (stage_1_and_2, bf16_optimizer, unfused_optimizer)


class Reads(TorchFunctionMode):
    """Counts calls that wait for a number on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], object]) -> int:
    with Reads() as reads:
        step()
    return sum(reads.counts.values())


def main() -> None:
    settings = json.loads(sys.argv[1])
    own = {module: module.is_invalid_grad_norm for module in MODULES}
    world = launch.start(EngineConfig(device="cpu"))
    config = EngineConfig(device="cpu", **settings)
    backend = ZeroBackend(config, OptimizerConfig(lr=1e-2), Toy(), DECAY, world, 8, 1)
    guard = SpikeGuard(FaultsConfig(spike_window=2))
    stream = Batches(0, world, 1)

    def judged() -> None:
        backend.forward_backward(next(stream))
        result = backend.step(1e-2, guard.judge)
        guard.accept(result.loss, result.grad_norm)

    def alone() -> None:
        backend.engine.backward(backend.engine(next(stream)))
        backend.engine.step()

    for _ in range(4):
        judged()
    ours = counted(judged)
    for module, function in own.items():
        module.is_invalid_grad_norm = function
    alone()
    report = {"judged": ours, "deepspeed": counted(alone)}
    print(json.dumps(report))  # noqa: T201 (the test reads it)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
