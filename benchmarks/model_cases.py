"""The formulations that the model benchmark compares, each timed in turn with the others and weighed in its own process."""

import gc
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from machine import child, environment, memory
from published import PublishedSwin4D
from torch import Tensor, nn

from swiftv2.config.model import ModelConfig
from swiftv2.data.grid import CUBE_MM, mni152_grid, template_voxels
from swiftv2.errors import SwiftError
from swiftv2.models import Swin4D
from swiftv2.models.blocks import compile_blocks
from swiftv2.models.geometry import patches_with_brain

Formulation = Literal["published", "dense", "packed"]
FORMULATIONS: tuple[Formulation, ...] = ("published", "dense", "packed")
Brain = npt.NDArray[np.bool_]
TINY: dict[str, Any] = {
    "name": "tiny",
    "image_size": (32, 32, 32),
    "frames": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "patch_size": (4, 4, 4, 1),
}
"""A model that brings libraries and threads to life before memory is watched."""


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    """A configuration with other values, checked anew."""
    return ModelConfig.model_validate(config.model_dump() | changes)


def template_brain(size: Sequence[int]) -> Brain:
    """(H, W, D) bool: nilearn's MNI152 brain mask on the cube of 192 mm that stores use, cut into so many voxels.

    Raises:
        SwiftError: the box is no cube, or the template does not fit so coarse a one.
    """
    if len(set(size)) != 1:
        raise SwiftError(f"a box of {tuple(size)} voxels: the template brain needs as many voxels along every axis")
    grid = mni152_grid(CUBE_MM / size[0], "RAS", "MNI152NLin2009cAsym")
    brain = np.zeros(grid.size, dtype=np.bool_)
    brain[template_voxels(grid)] = True
    return brain.reshape(grid.shape)


def template_tokens(config: ModelConfig) -> Brain:
    """(h, w, d) bool: the first stage's tokens that hold any of the template brain."""
    brain = torch.from_numpy(template_brain(config.image_size))
    tokens: Brain = patches_with_brain(brain[None], config.patch_size)[0].numpy()
    return tokens


def kept_shares(config: ModelConfig) -> list[float]:
    """Share of the voxels, and then of each stage's tokens, that hold any of the template brain."""
    held = torch.from_numpy(template_brain(config.image_size))[None]
    shares = [held.float().mean().item()]
    for factors in [config.patch_size, *[(2, 2, 2)] * (len(config.depths) - 1)]:
        held = patches_with_brain(held, factors)
        shares.append(held.float().mean().item())
    return shares


@dataclass(frozen=True)
class Case:
    """One formulation of one model on clips of its grid and length."""

    formulation: Formulation
    config: ModelConfig
    batch: int = 1
    compiled: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.formulation}, compiled" if self.compiled else self.formulation

    def build(self, seed: int = 0) -> nn.Module:
        """The encoder with the weights of that seed, the same in every formulation, float32 on the CPU."""
        packing = "template" if self.formulation == "packed" else "none"
        ours = Swin4D(changed(self.config, packing=packing), seed)
        if self.formulation == "published":
            published = PublishedSwin4D(self.config)
            published.load_state_dict(ours.state_dict())
            return published
        if self.formulation == "packed":
            ours.use_template(torch.from_numpy(template_brain(self.config.image_size)))
        if self.compiled:
            compile_blocks(ours)
        return ours

    def clips(self) -> Tensor:
        """(batch, C, H, W, D, T) of noise, the same each time."""
        shape = (self.batch, self.config.in_channels, *self.config.image_size, self.config.frames)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def to_json(self) -> str:
        """The case as one word of a command line."""
        words = {"formulation": self.formulation, "batch": self.batch, "compiled": self.compiled}
        return json.dumps(words | {"config": self.config.model_dump(mode="json")})

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """The inverse of `to_json`."""
        tree = json.loads(text)
        config = ModelConfig.model_validate(tree["config"])
        return cls(cast("Formulation", tree["formulation"]), config, int(tree["batch"]), bool(tree["compiled"]))


@dataclass
class Times:
    """Seconds of forward and backward passes, round by round."""

    batch: int
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def steps(self) -> npt.NDArray[np.float64]:
        """Seconds of both together, (rounds,)."""
        total: npt.NDArray[np.float64] = np.array(self.forward) + np.array(self.backward)
        return total

    @property
    def rate(self) -> float:
        """Clips a second, median over the rounds."""
        return float(np.median(self.batch / self.steps))

    def times(self, other: "Times") -> tuple[float, float, float]:
        """How many times another formulation's clips a second: median, least and most over the rounds."""
        ratios = (self.batch / self.steps) / (other.batch / other.steps)
        return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def step(model: nn.Module, clips: Tensor) -> tuple[float, float]:
    """Seconds of one forward pass and of the backward pass of the output's mean square; gradients are dropped after."""
    begun = time.perf_counter()
    loss = model(clips).square().mean()
    between = time.perf_counter()
    loss.backward()
    ended = time.perf_counter()
    model.zero_grad(set_to_none=True)
    return between - begun, ended - between


def time_in_turn(cases: Mapping[str, Case], rounds: int) -> dict[str, Times]:
    """Time cases in turn (A B C, A B C...) in this process, after a round that is not counted."""
    models = {name: (case.build(), case.clips()) for name, case in cases.items()}
    times = {name: Times(case.batch) for name, case in cases.items()}
    for number in range(-1, rounds):
        for name, (model, clips) in models.items():
            forward, backward = step(model, clips)
            if number >= 0:
                times[name].forward.append(forward)
                times[name].backward.append(backward)
    return times


@dataclass(frozen=True)
class Peak:
    """Bytes of resident memory: at most, and by how much that exceeds what model and clips alone held."""

    absolute: int
    growth: int


def peak(case: Case, threads: int, steps: int = 3) -> Peak:
    """Weigh a case in a fresh process with the allocator's default settings.

    Raises:
        SwiftError: the process failed.
    """
    words = child("model.py", "--peak", case.to_json(), "--threads", str(threads), "--rounds", str(steps))
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise SwiftError(f"weighing {case.name} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    found = json.loads(done.stdout)
    return Peak(int(found["absolute"]), int(found["growth"]))


def weigh(case: Case, steps: int) -> Peak:
    """What `peak` does in its process: memory over that of the model, the clips and a first tiny step."""
    model, clips = case.build(), case.clips()
    tiny = Case(case.formulation, changed(ModelConfig.model_validate(TINY), variant=case.config.variant))
    step(tiny.build(), tiny.clips())
    gc.collect()
    before = memory("VmRSS")
    # Linux then counts the highest mark from here on: building the model may have left a higher one.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(steps):
        step(model, clips)
    highest = memory("VmHWM")
    return Peak(highest, highest - before)


def paired(value: tuple[float, float, float]) -> str:
    """A ratio with its spread over the rounds."""
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"
