"""A module small enough to train in milliseconds, and its batches, drawn by key as real ones are."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from swiftv2.engine.launch import World
from swiftv2.engine.stream import Exclusion

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
    """Input and target of one clip; they depend on nothing else."""
    inputs = np.random.default_rng([1, index]).standard_normal(FEATURES, dtype=np.float32)
    teacher = np.random.default_rng(2).standard_normal((FEATURES, TARGETS)).astype(np.float32)
    return inputs, np.tanh(inputs @ teacher)


class Batches:
    """Micro-batches as the loop wants them: position p is clip p, or, once that is left out, clip p + 100,000.

    Args:
        samples: position of the first sample.
        world: ranks.
        accumulation: micro-batches of a step.
        seconds: that every micro-batch takes.
        exclusions: what is left out.
        poison: factors, by clip, on the targets; NaN among them.
    """

    def __init__(
        self,
        samples: int,
        world: World,
        accumulation: int,
        seconds: float = 0.0,
        exclusions: Sequence[Exclusion] = (),
        poison: Mapping[int, float] | None = None,
    ) -> None:
        self.exclusions = [Exclusion(*one) for one in exclusions]
        self._next, self._world, self._accumulation, self._seconds = samples, world, accumulation, seconds
        self._poison = poison or {}
        self._turn = 0
        self._handed: list[list[tuple[int, int]]] = []

    def __next__(self) -> Micro:
        share = GLOBAL_BATCH // (self._world.size * self._accumulation)
        begin = self._next + (self._world.rank * self._accumulation + self._turn) * share
        self._turn = (self._turn + 1) % self._accumulation
        self._next += GLOBAL_BATCH if self._turn == 0 else 0
        gone = {one.clip for one in self.exclusions if one.position <= begin + share - 1}
        clips = [p + 100_000 if p in gone else p for p in range(begin, begin + share)]
        self._handed.append(list(zip(clips, range(begin, begin + share), strict=True)))
        pairs = [sample(clip) for clip in clips]
        pairs = [(x, y * np.float32(self._poison.get(clip, 1.0))) for clip, (x, y) in zip(clips, pairs, strict=True)]
        time.sleep(self._seconds)
        inputs, targets = (torch.from_numpy(np.stack(part)).to(self._world.device) for part in zip(*pairs, strict=True))
        return inputs, targets

    def __iter__(self) -> Self:
        return self

    def recent(self, micro_batches: int) -> list[dict[str, Any]]:
        last = self._handed[-micro_batches:]
        return [{"micro_batch": i, "clip": c, "position": p, "run": f"r{c}"} for i, part in enumerate(last) for c, p in part]

    def faulty(self) -> bool:
        return False

    def faults(self) -> list[dict[str, Any]]:
        return []

    def exclude(self, exclusions: Sequence[Exclusion]) -> None:
        self.exclusions += exclusions

    def close(self) -> None:
        return


def batches(samples: int, world: World, accumulation: int, seconds: float = 0.0) -> Batches:
    """This rank's micro-batches from a position in the order on."""
    return Batches(samples, world, accumulation, seconds)
