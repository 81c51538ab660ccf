"""A module small enough to train in milliseconds, and its batches, drawn by key as real ones are."""

import time
from collections.abc import Generator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from swiftv2.engine.launch import World

FEATURES, WIDTH, TARGETS = 13, 31, 7  # odd sizes: partitions of ZeRO need padding
GLOBAL_BATCH = 8
DECAY = {"first.weight", "second.weight"}
Micro = tuple[Tensor, Tensor]


class Toy(nn.Module):
    """Two layers with a norm between them; the loss is the mean over clips of each clip's mean square."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, TARGETS)
        self.unused = nn.Linear(2, 2) if unused else None
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, batch: Micro) -> Tensor:
        inputs, targets = batch
        hidden = torch.nn.functional.gelu(self.norm(self.first(inputs.to(self.first.weight.dtype))))
        error = self.second(hidden).float() * self.scale - targets
        loss: Tensor = error.square().mean(dim=1).mean()
        return loss


def sample(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Input and target of one position in the order; it depends on nothing else."""
    inputs = np.random.default_rng([1, index]).standard_normal(FEATURES, dtype=np.float32)
    teacher = np.random.default_rng(2).standard_normal((FEATURES, TARGETS)).astype(np.float32)
    return inputs, np.tanh(inputs @ teacher)


class Batches:
    """Micro-batches as the loop wants them; nothing is ever of no use."""

    exclusions: list[tuple[int, int]]

    def __init__(self, micro_batches: Generator[Micro, None, None]) -> None:
        self.exclusions = []
        self._micro_batches = micro_batches

    def __next__(self) -> Micro:
        return next(self._micro_batches)

    def __iter__(self) -> Self:
        return self

    def faulty(self) -> bool:
        return False

    def faults(self) -> list[dict[str, Any]]:
        return []

    def exclude(self, exclusions: Sequence[tuple[int, int]]) -> None:
        raise AssertionError(exclusions)

    def close(self) -> None:
        self._micro_batches.close()


def batches(samples: int, world: World, accumulation: int, seconds: float = 0.0) -> Batches:
    """This rank's micro-batches from a position in the order on."""
    return Batches(_micro_batches(samples, world, accumulation, seconds))


def _micro_batches(samples: int, world: World, accumulation: int, seconds: float) -> Generator[Micro, None, None]:
    share = GLOBAL_BATCH // (world.size * accumulation)
    while True:
        for micro in range(accumulation):
            begin = samples + (world.rank * accumulation + micro) * share
            pairs = [sample(begin + i) for i in range(share)]
            time.sleep(seconds)
            yield tuple(torch.from_numpy(np.stack(part)).to(world.device) for part in zip(*pairs, strict=True))  # type: ignore[misc]
        samples += GLOBAL_BATCH
