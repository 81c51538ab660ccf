"""What brings brainmarks' samples to exported swiftv2 weights, and their encoder: what of the plug-in needs no brainmarks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from swiftv2 import weights as exported
from swiftv2.config.data import ClipConfig
from swiftv2.data.grid import kept_voxels, mni152_grid, place
from swiftv2.data.samples.normalise import normalise, scatter
from swiftv2.data.samples.tempo import clip_duration, time_weights
from swiftv2.errors import SwiftError, UsageError
from swiftv2.models.geometry import patches_with_brain
from swiftv2.models.heads import Pool, pooled_tokens

SPACE = "MNI152NLin6Asym"
"""Template of brainmarks' space `mni`."""
MOST_CLIPS = 8
"""Clips of a scan at most, as brainmarks' wrapper of SwiFT takes."""
AFFINE = ((2.0, 0.0, 0.0, -90.0), (0.0, 2.0, 0.0, -126.0), (0.0, 0.0, 2.0, -72.0), (0.0, 0.0, 0.0, 1.0))
"""World coordinates in mm of brainmarks' 2 mm grid of 91 x 109 x 91 voxels, RAS."""


@dataclass(frozen=True, eq=False)
class _Packed:
    """Clips of one run with its statistics: what swiftv2's scaling asks for."""

    bold: Tensor
    slope: Tensor
    intercept: Tensor
    statistics: Tensor
    voxel_mean: Tensor
    voxel_std: Tensor
    brain: Tensor


class Transform:
    """From a sample on the 2 mm MNI grid to clips on the grid of the weights, timed and scaled as they want.

    Args:
        card: of the weights.
        mask: (Z, Y, X) of the voxels that samples hold.

    Raises:
        UsageError: the weights' grid is not the one that swiftv2 makes of MNI152.
    """

    def __init__(self, card: exported.Card, mask: NDArray[np.bool_]) -> None:
        wanted = card.input
        grid = mni152_grid(wanted.voxel_mm[0], wanted.orientation, wanted.space or SPACE)
        if grid.shape != wanted.grid:
            raise UsageError(
                f"the weights take a grid of {list(wanted.grid)}, which is not swiftv2's of MNI152: no plug-in for it"
            )
        self.normalisation = wanted.normalisation
        self.clip = ClipConfig(frames=wanted.frames, stride_within=wanted.stride_within, target_tr=wanted.tr_seconds)
        self.mask = mask
        self.voxels = kept_voxels(grid, wanted.mask or "template").astype(np.int64)
        # The samples' file axes are (X, Y, Z), RAS.
        shape = (mask.shape[2], mask.shape[1], mask.shape[0])
        self.placement = place(grid, self.voxels, shape, np.asarray(AFFINE))
        self.brain = (self._interpolated(mask.transpose(2, 1, 0).astype(np.float64)) >= 0.5) & self.placement.inside
        self.shape = grid.shape

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Replaces `bold` (frames, voxels), z-scored, by scaled clips (clips, T, V); adds `fill` (clips,)."""
        bold = (sample["bold"] * sample["std"] + sample["mean"]).double().numpy()
        run = self._on_grid(bold)
        tr = float(sample["tr"])
        clips = torch.from_numpy(self._clips(run, tr))
        signal, fill = normalise(self._packed(clips, run), self.normalisation)
        sample["bold"], sample["fill"] = signal, fill
        return sample

    def _interpolated(self, volume: NDArray[np.float64]) -> NDArray[np.float64]:
        """(X, Y, Z) at the weights' voxels, (V,), by the rule of swiftv2's stores."""
        if any(self.placement.sigma):
            volume = ndimage.gaussian_filter(volume, self.placement.sigma, mode="nearest")
        there: NDArray[np.float64] = ndimage.map_coordinates(volume, self.placement.coordinates.T, order=1, mode="nearest")
        return there

    def _on_grid(self, bold: NDArray[np.float64]) -> NDArray[np.float32]:
        """(frames, samples' voxels) -> (frames, V); 0 outside the brain."""
        run = np.zeros((len(bold), len(self.voxels)), dtype=np.float32)
        volume = np.zeros(self.mask.shape)
        for number, values in enumerate(bold):
            volume[self.mask] = values
            run[number] = self._interpolated(volume.transpose(2, 1, 0))
        run[:, ~self.brain] = 0.0
        return run

    def _clips(self, run: NDArray[np.float32], tr: float) -> NDArray[np.float32]:
        """(clips, T, V), evenly over the scan at the weights' repetition time; too short a scan goes on with its mean."""
        duration = clip_duration(self.clip, tr)
        if len(run) < duration:
            run = np.concatenate([run, np.repeat(run.mean(0, keepdims=True), duration - len(run), axis=0)])
        count = min(len(run) // duration, MOST_CLIPS)
        starts = np.linspace(0, len(run) - duration, count).round().astype(int)
        mixed = time_weights(self.clip, tr)
        step = self.clip.stride_within
        cut = [run[start : start + duration] for start in starts]
        return np.stack([one[::step] if mixed is None else mixed @ one for one in cut]).astype(np.float32)

    def _packed(self, clips: Tensor, run: NDArray[np.float32]) -> _Packed:
        brain, count = torch.from_numpy(self.brain), len(clips)
        inside = run[:, self.brain]
        low, quarter, median, three_quarters, high = np.percentile(inside, [0, 25, 50, 75, 100])
        values = [inside.mean(dtype=np.float64), inside.std(dtype=np.float64), low, high, median, three_quarters - quarter]
        return _Packed(
            clips,
            torch.ones(count),
            torch.zeros(count),
            torch.tensor(values, dtype=torch.float32).expand(count, 6),
            torch.from_numpy(run.mean(0)).expand(count, -1),
            torch.from_numpy(run.std(0)).expand(count, -1),
            brain.expand(count, -1),
        )


class Encoder(nn.Module):
    """The encoder of exported weights.

    Args:
        folder: of the weights.
        transform: that samples have gone through.

    Raises:
        SwiftError: the weights are damaged, or leave out other places than their grid does.
    """

    __space__: str = "mni"

    def __init__(self, folder: Path, transform: Transform) -> None:
        super().__init__()
        self.encoder = exported.load_encoder(folder).float().eval().requires_grad_(requires_grad=False)
        self.pool = Pool("mean", self.encoder.width)
        self.shape = transform.shape
        self.register_buffer("voxels", torch.from_numpy(transform.voxels), persistent=False)
        self.register_buffer("inside", torch.from_numpy(transform.brain), persistent=False)
        self.voxels: Tensor
        self.inside: Tensor
        config = self.encoder.config
        kept = scatter(torch.ones(1, 1, len(self.voxels), dtype=torch.bool), self.voxels, self.shape)[:, 0, ..., 0]
        if config.packing == "template" and not torch.equal(
            patches_with_brain(kept, config.patch_size)[0], self.encoder.template
        ):
            raise SwiftError(f"{folder}: its template mask is not that of swiftv2's MNI152 grid: no plug-in for it")

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None, Tensor]:
        """Embeddings of scans.

        Args:
            batch: `bold` (B, clips, T, V) and `fill` (B, clips), of the transform.

        Returns:
            (B, 1, C), the mean over clips of the means over tokens with brain, which is swiftv2's own embedding of a run; None,
            as there are no registers; (B, clips x tokens with brain, C).
        """
        bold, fill = batch["bold"], batch["fill"]
        scans, clips = bold.shape[:2]
        volume = scatter(bold.flatten(0, 1).float(), self.voxels, self.shape, fill.flatten().float())
        brain = scatter(self.inside.expand(scans * clips, 1, -1), self.voxels, self.shape)[:, 0, ..., 0]
        features = self.encoder(volume, brain=brain)
        counted = pooled_tokens(self.encoder.config, brain, features.shape[2:])
        pooled = self.pool(features, counted)
        # Every scan has the same voxels here, and so the same tokens.
        tokens = features.permute(0, 2, 3, 4, 5, 1)[:, counted[0]].flatten(1, 2)
        found = pooled.view(scans, clips, -1).mean(dim=1, keepdim=True)
        return found, None, tokens.reshape(scans, -1, tokens.shape[-1])


def prepare(folder: str | None, *, other_space: bool, mask: Callable[[], NDArray[np.bool_]]) -> tuple[Transform, Path]:
    """What brings samples to exported weights, and the weights' folder.

    Args:
        folder: of the weights; SWIFTV2_WEIGHTS of the environment when None.
        other_space: whether weights that were made for another template than MNI152NLin6Asym take its scans as they are;
            SWIFTV2_OTHER_SPACE=1 in the environment says so, too.
        mask: gives the (Z, Y, X) voxels that samples hold.

    Raises:
        UsageError: no weights are named, or they were made for another template or grid.
        SwiftError: the weights cannot be read.
    """
    named = folder or os.environ.get("SWIFTV2_WEIGHTS")
    if not named:
        raise UsageError("name exported weights: `weights=FOLDER`, or the environment variable SWIFTV2_WEIGHTS")
    card = exported.read_card(Path(named))
    anyway = other_space or os.environ.get("SWIFTV2_OTHER_SPACE") == "1"
    if card.input.space not in (None, SPACE) and not anyway:
        raise UsageError(
            f"{named}: made for {card.input.space}, and brainmarks' scans are in {SPACE}: the templates lie some mm apart; say "
            "other_space=true (or SWIFTV2_OTHER_SPACE=1) to take them as they are"
        )
    return Transform(card, mask()), Path(named)
