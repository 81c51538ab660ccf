"""The cases of the ablation: how each is configured, what a step of it takes, what it holds in memory."""

import gc
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import ROOT, child, environment, memory
from model_cases import template_brain
from torch import Tensor

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data import keyed
from swiftv2.data.samples.masks import draw_mask
from swiftv2.errors import SwiftError
from swiftv2.models import MaskedModel
from swiftv2.models.flops import computed_flops, visible_flops
from swiftv2.models.geometry import as_grid, patches_with_brain, token_grid
from swiftv2.models.simmim import enlarge
from swiftv2.models.visible import make_masked

TEMPLATE = "model.packing=template"
IN_TIME = ("model.variant=decoupled", "model.first_window_size=[4,4,4,5]", "model.window_size=[4,4,4,5]")
"""Windows in time of half a clip: 5 of 10 tokens."""
VISIBLE = (TEMPLATE, "objective=visible_only")
LIGHT = ("model.decoder.visible.width=32", "model.decoder.visible.num_heads=2")
"""A decoder narrower than the demo's first stage of 48 channels; larger models take the default."""
CASES: dict[str, tuple[str, ...]] = {
    "dense": (),
    "packed": (TEMPLATE,),
    "visible": (*VISIBLE, *LIGHT),
    "visible, skip": (*VISIBLE, *LIGHT, "model.decoder.visible.skip=true"),
    "decoupled": (*IN_TIME, "model.absolute_position=false"),
    "decoupled, places": (*IN_TIME, "model.absolute_position=true"),
}
"""What each case changes of the demo's configuration."""
WORDS = {
    "dense": "SimMIM, unified attention, all tokens",
    "packed": "SimMIM, unified, packing=template",
    "visible": "visible_only, unified, packing=template",
    "visible, skip": "the same, decoder.visible.skip=true",
    "decoupled": "SimMIM, decoupled, all tokens, no absolute positions",
    "decoupled, places": "the same, absolute positions in space",
}
BATCH = 2
"""Clips of a training step."""
COARSE = {f"visible, cells of {n}": (*VISIBLE, f"mask.patch_size=[{n},{n},{n},2]") for n in (12, 24)}
"""Hidden in larger pieces, so that the deeper stages have fewer tokens too; timed, not trained."""
SIZES: dict[str, tuple[int, tuple[str, ...]]] = {
    "demo": (4, tuple(CASES)),
    "51M": (1, ("dense", "packed", "visible", *COARSE)),
}
"""Clips of a timed batch, and the cases that are timed, by preset."""


def configured(case: str, words: Sequence[str] = (), size: str = "demo") -> PretrainConfig:
    """The configuration of a case; the store is not needed."""
    own = [word for word in (CASES | COARSE)[case] if size == "demo" or word not in LIGHT]
    changes = (*own, "engine.backend=plain", "engine.precision=fp32", "loss.kind=l2", *words)
    return load(PretrainConfig, ROOT / "configs" / "pretrain" / f"{size}.yaml", changes)


@dataclass(frozen=True, eq=False)
class Setup:
    """A case at a size, with noise in the template brain and masks as in training."""

    config: PretrainConfig
    model: MaskedModel
    volume: Tensor
    mask: Tensor
    brain: Tensor

    @classmethod
    def make(cls, case: str, size: str) -> "Setup":
        """Float32, in training mode; volume, masks and brain are the same for all cases."""
        batch, config = SIZES[size][0], configured(case, ("data.store=none", "run.dir=none"), size)
        architecture, mask = config.model, config.mask
        brain = torch.from_numpy(template_brain(architecture.image_size)).expand(batch, -1, -1, -1)
        model = make_masked(config.objective, architecture, mask, config.loss)
        if architecture.packing == "template":
            model.encoder.use_template(brain[0])
        cells = patches_with_brain(brain, mask.patch_size)[0].numpy()
        shape = (*architecture.image_size, architecture.frames)
        grid = token_grid(architecture.model_copy(update={"patch_size": mask.patch_size}), shape)
        masks = [draw_mask(mask, grid, cells, keyed.generator(0, "ablation", clip)) for clip in range(batch)]
        volume = torch.randn((batch, architecture.in_channels, *shape), generator=torch.Generator().manual_seed(0))
        return cls(config, model.train(), volume, torch.from_numpy(np.stack(masks)), brain)

    def step(self) -> float:
        """Seconds of a forward and a backward pass; gradients are dropped after."""
        begun = time.perf_counter()
        self.model(self.volume, self.mask, self.brain).clip_loss.mean().backward()
        seconds = time.perf_counter() - begun
        self.model.zero_grad(set_to_none=True)
        return seconds

    def flops(self) -> dict[str, int]:
        """Of a forward pass, a clip."""
        config, encoder = self.config.model, self.model.encoder
        there = encoder.tokens(self.volume, self.brain)
        if self.config.objective == "visible_only":
            pairs = zip(self.config.mask.patch_size, config.patch_size, strict=True)
            hidden = enlarge(self.mask, as_grid([cell // patch for cell, patch in pairs]))
            return visible_flops(config, (there & ~hidden).numpy(), there.numpy())
        return computed_flops(config, there[0, ..., 0].numpy() if config.packing == "template" else None)

    def parameters(self) -> tuple[int, int]:
        """Of the encoder, and of what is thrown away after pretraining."""
        encoder = sum(p.numel() for p in self.model.encoder.parameters())
        return encoder, sum(p.numel() for p in self.model.parameters()) - encoder


def time_in_turn(setups: Mapping[str, Setup], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each case, round by round, in turn (A B C, A B C...), after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in setups}
    for number in range(-1, rounds):
        for name, setup in setups.items():
            spent = setup.step()
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def ratios(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Time as a multiple of another case's: median, least and most over the rounds."""
    found = np.array(own) / np.array(other)
    return float(np.median(found)), float(found.min()), float(found.max())


def weigh(case: str, size: str, steps: int = 2) -> int:
    """Bytes by which steps exceed what model, batch and a first tiny step hold; asked of a fresh process."""
    setup, tiny = Setup.make(case, size), Setup.make(case, "demo")
    tiny.step()
    del tiny
    gc.collect()
    before = memory("VmRSS")
    # Linux then counts the highest mark from here on: building the model may have left a higher one.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(steps):
        setup.step()
    return memory("VmHWM") - before


def peak(case: str, size: str, threads: int) -> int:
    """`weigh` in a fresh process.

    Raises:
        SwiftError: the process failed.
    """
    words = child("ablation.py", "--folder", "none", "--weigh", case, size, "--threads", str(threads))
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise SwiftError(f"weighing {case} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return int(done.stdout)


def training_words(folder: Path, case: str, seed: int, steps: int) -> list[Any]:
    """Overrides of a training run."""
    return [
        *CASES[case],
        f"data.store={folder / 'cohort.zarr'}",
        f"run.dir={run_folder(folder, case, seed)}",
        f"run.seed={seed}",
        "engine.backend=plain",
        f"train.max_steps={steps}",
        f"train.global_batch={BATCH}",
        f"train.save_every={steps}",
        f"train.evaluate_every={steps}",
        "evaluate.max_clips=15",
    ]


def run_folder(folder: Path, case: str, seed: int) -> Path:
    """Where a run is kept."""
    return folder / f"{case.replace(', ', '-').replace(' ', '-')}-{seed}"
