"""Bytes of all tensors that real backends hold after a step of a small model, written as JSON by each rank."""

import gc
import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ["DS_ACCELERATOR"] = "cpu"

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import launch
from swiftv2.engine.build import build_backend
from swiftv2.models import decay_names

WIDTHS = (301, 257, 403, 199)


class Chain(nn.Module):
    """Linear layers whose sizes no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(WIDTHS)))

    def forward(self, batch: Tensor) -> Tensor:
        """(B, 301) -> a scalar."""
        out: Tensor = self.layers(batch.to(next(self.parameters()).dtype))
        return out.float().square().mean()


def held() -> dict[int, torch.UntypedStorage]:
    """Storages of all tensors by address; what former backends left stays as long as this is kept."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), Tensor) and x.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in storages}


def main() -> None:
    """Words: a JSON mapping of names to engine settings, the folder of the answers."""
    engines = json.loads(sys.argv[1])
    world = launch.start(EngineConfig(device="cpu"))
    found: dict[str, Any] = {}
    for name, settings in engines.items():
        config = EngineConfig.model_validate({**settings, "device": "cpu"})
        before = held()
        module = Chain()
        names = decay_names(module)
        sizes = [p.numel() for p in module.parameters()]
        group = [int(key not in names) for key, _ in module.named_parameters()]
        backend = build_backend(config, OptimizerConfig(), module, names, world, 1, 1)
        batch = torch.ones(2, WIDTHS[0])
        for _ in range(2):
            backend.forward_backward(batch)
            backend.step(1e-3)
        del batch
        size = sum(storage.nbytes() for pointer, storage in held().items() if pointer not in before)
        found[name] = {"held": size, "sizes": sizes, "group": group}
        backend.close()
        del backend, module
    (Path(sys.argv[2]) / f"{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
