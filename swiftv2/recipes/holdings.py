"""What a run holds, costs and reads: parameters, FLOPs, tokens of a clip, and how many different tokens its data have."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.tempo import clip_duration
from swiftv2.models.flops import computed_flops, forward_flops
from swiftv2.models.geometry import patches_with_brain, token_grid
from swiftv2.plan.model import plan_model
from swiftv2.plan.run import BACKWARD
from swiftv2.recipes.data import Data, open_data
from swiftv2.recipes.planning import Window, counted_flops, find_window, layout
from swiftv2.records import EVENTS, read_lines


@dataclass(frozen=True)
class Holdings:
    """What a configuration holds and costs, steps and rate left out."""

    parameters: int
    """Of the encoder."""
    decoder_parameters: int
    tokens_per_clip: int
    """Of all patches."""
    brain_tokens_per_clip: int | None
    """Of patches that hold any voxel that the store keeps; None without a store."""
    forward_flops: Mapping[str, int]
    """Of one clip by part of the model: the keys of `swiftv2.models.flops.forward_flops`."""
    window: str
    """Where the voxels of a clip come from, in words."""

    @property
    def training_flops(self) -> int:
        """Of one clip, forward and backward, encoder and decoder."""
        return (1 + BACKWARD) * self.forward_flops["total"]


@dataclass(frozen=True)
class Reading:
    """What a run's training split holds."""

    unique_tokens: int
    """Of all patches; what clips share counts once."""
    subjects: int


class Counter:
    """Holdings and readings, each counted once however many runs share it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, Path], Holdings] = {}
        self._read: dict[tuple[str, str], Reading] = {}

    def hold(self, config: PretrainConfig) -> Holdings:
        """Parameters, tokens and FLOPs of a configuration; nothing is allocated."""
        unnamed = config.model_copy(update={"model": config.model.model_copy(update={"name": ""})})
        key = (unnamed.model_dump_json(include={"model", "clip", "objective", "mask"}), config.data.store)
        if key not in self._held:
            self._held[key] = _hold(config)
        return self._held[key]

    def read(self, config: PretrainConfig, run_dir: Path | None = None) -> Reading:
        """What its training split holds.

        Args:
            config: of a run.
            run_dir: where it lives; one that was begun has the subjects that it began with.

        Raises:
            SwiftError: the store cannot be opened, or is another one than the run was begun on.
        """
        key = (config.model_dump_json(include={"data", "clip", "evaluate"}) + str(config.model.patch_size), str(run_dir))
        if key not in self._read:
            data = open_data(config, run_dir)
            tokens = _unique_clips(data) * self.hold(config).tokens_per_clip
            self._read[key] = Reading(round(tokens), len(data.splits.train))
        return self._read[key]


def unfinished(run_dir: Path) -> str | None:
    """Why a run directory holds no finished run; None where it does.

    Raises:
        SwiftError: its events cannot be read.
    """
    why: str | None = "it was not begun"
    for row in read_lines(run_dir / EVENTS):
        if row["event"] == "start":
            why = "it is not finished"
        elif row["event"] == "finished":
            why = None
        elif row["event"] in {"failed", "stopped"} and why is not None:
            step = f" at step {row['step']}" if row.get("step") else ""
            told = row.get("problem") or row.get("signal") or row.get("error")
            why = f"it {row['event']}{step}{f': {told}' if told else ''}"
    return why


def _hold(config: PretrainConfig) -> Holdings:
    window = find_window(config)
    model = config.model.model_copy(update={"frames": config.clip.frames})
    template = patches_with_brain(window.brain[None], model.patch_size)[0].numpy()
    counted = plan_model(config.model)
    decoder = counted.decoder_parameters
    if config.objective == "visible_only":
        # Its decoder is another one than the model's own.
        decoder = layout(config).total - counted.encoder_parameters
    grid = token_grid(model, (*model.image_size, model.frames))
    return Holdings(
        parameters=counted.encoder_parameters,
        decoder_parameters=decoder,
        tokens_per_clip=math.prod(grid),
        brain_tokens_per_clip=int(template.sum()) * grid[3] if config.data.store.is_dir() else None,
        forward_flops=_flops(config, window, template),
        window=window.source,
    )


def _flops(config: PretrainConfig, window: Window, template: NDArray[np.bool_]) -> Mapping[str, int]:
    """Forward FLOPs of a clip: the published count, or what is really done where tokens are left out."""
    model = config.model.model_copy(update={"frames": config.clip.frames})
    if config.objective == "visible_only":
        return counted_flops(config, window)
    return forward_flops(model) if model.packing == "none" else computed_flops(model, template)


def _unique_clips(data: Data) -> float:
    """Training clips as they would be if none shared frames with another."""
    clips, covered = data.train, 0.0
    runs, first = np.unique(clips.run, return_index=True)
    for run, starts in zip(runs, np.split(clips.start, first[1:]), strict=True):
        if data.store.runs[run].withdrawn:
            continue
        duration = clip_duration(clips.config, data.store.runs[run].tr)
        covered += 1.0 + float(np.minimum(np.diff(np.sort(starts)), duration).sum()) / duration
    return covered
