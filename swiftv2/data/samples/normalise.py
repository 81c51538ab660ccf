"""Scaling of BOLD on the device, and the way between packed voxels and volumes.

`x` is the source number times the run's slope plus its intercept; statistics are those of the brain voxels of the run
(kept in the store, over all its frames) or, with scope clip, of the clip:

| kind | brain voxels | everything else |
|---|---|---|
| none | x | 0 |
| minmax | (x - min) / (max - min) | 0 |
| znorm_zeroback | (x - mean) / std | 0 |
| znorm_minback | (x - mean) / std | the smallest value that the brain takes: (min - mean) / std |
| robust | (x - median) / interquartile range | 0 |
| per_voxel | (x - voxel's mean) / voxel's std | 0 |

"Everything else" is both what lies outside the run's own brain among the kept voxels and what the store does not keep.
Standard deviations divide by the number of values. Whatever has no spread (a constant run, clip or voxel) becomes 0.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from swiftv2.config.data import NormalisationConfig
from swiftv2.data.samples.masks import Shape3


class PackedClips(Protocol):
    """What scaling needs of a batch (`swiftv2.data.samples.batches.Batch` has it)."""

    @property
    def bold(self) -> Tensor:
        """(B, T, V) source numbers."""
        ...

    @property
    def slope(self) -> Tensor:
        """(B,) float32."""
        ...

    @property
    def intercept(self) -> Tensor:
        """(B,) float32."""
        ...

    @property
    def statistics(self) -> Tensor:
        """(B, 6) float32: mean, std, min, max, median, interquartile range of the run's brain voxels."""
        ...

    @property
    def voxel_mean(self) -> Tensor | None:
        """(B, V) float32 or None."""
        ...

    @property
    def voxel_std(self) -> Tensor | None:
        """(B, V) float32 or None."""
        ...

    @property
    def brain(self) -> Tensor:
        """(B, V) bool."""
        ...


@dataclass(frozen=True, eq=False)
class Scaling:
    """How brain voxels were scaled: (x - centre) / spread."""

    centre: Tensor
    """(B, 1, 1), or (B, 1, V) for per_voxel, float32 in source units."""
    spread: Tensor
    """Like centre; not above 0 where there is no spread."""
    fill: Tensor
    """(B,) float32: scaled value of everything outside the brain."""

    def to_source(self, scaled: Tensor) -> Tensor:
        """Scaled values (B, T, V) of brain voxels in source units; the centre where there was no spread."""
        return scaled * torch.where(_usable(self.spread), self.spread, 0.0) + self.centre


def normalise(batch: PackedClips, config: NormalisationConfig) -> tuple[Tensor, Tensor]:
    """Scaled signal and the value of the background; see the table at the module's head.

    Args:
        batch: packed clips, on any device.
        config: kind and scope.

    Returns:
        (signal float32 (B, T, V), fill float32 (B,)): the fill already stands in voxels outside the run's brain, and
        is what `scatter` puts where nothing is kept.

    Raises:
        ValueError: per_voxel with scope run, and the batch carries no per-voxel statistics.
    """
    # One fresh copy, scaled in place: signals are the largest tensors beside the model's.
    signal = _source_units(batch)
    found = _scaling(signal, batch, config)
    if config.kind != "none":
        signal.sub_(found.centre).mul_(_inverse(found.spread))
    return torch.where(batch.brain[:, None, :], signal, found.fill.view(-1, 1, 1)), found.fill


def scaling(batch: PackedClips, config: NormalisationConfig) -> Scaling:
    """What `normalise` does to each clip of a batch, to bring scaled values back to source units."""
    return _scaling(_source_units(batch), batch, config)


def scatter(packed: Tensor, voxels: Tensor, grid_shape: Shape3, fill: Tensor | float | None = None) -> Tensor:
    """Put packed voxels into volumes.

    Args:
        packed: (B, T, V).
        voxels: int64 (V,) flat C-order indices of the kept voxels in the grid, on the same device.
        grid_shape: (H, W, D).
        fill: value of all other voxels, one number or (B,); 0 when None.

    Returns:
        (B, 1, H, W, D, T) of the packed dtype, contiguous.
    """
    clips, frames, _ = packed.shape
    height, width, depth = grid_shape
    volume = packed.new_empty((clips, height * width * depth, frames))
    value = torch.as_tensor(0 if fill is None else fill, dtype=packed.dtype, device=packed.device)
    volume.copy_(value.reshape(-1, 1, 1).expand_as(volume))
    # Copied from a contiguous source, rows of frames go 2.5 times faster on a CPU.
    volume.index_copy_(1, voxels, packed.transpose(1, 2).contiguous())
    return volume.view(clips, 1, height, width, depth, frames)


def gather(volume: Tensor, voxels: Tensor) -> Tensor:
    """Take the kept voxels out of volumes: (B, 1, H, W, D, T) to (B, T, V), the inverse of `scatter`."""
    clips, channels, *_, frames = volume.shape
    if channels != 1:
        raise ValueError(f"packed voxels have one channel, the volume has {channels}")
    return volume.reshape(clips, -1, frames).index_select(1, voxels).transpose(1, 2)


def _source_units(batch: PackedClips) -> Tensor:
    signal = batch.bold.to(torch.float32, copy=True)
    return signal.mul_(batch.slope.view(-1, 1, 1)).add_(batch.intercept.view(-1, 1, 1))


def _usable(spread: Tensor) -> Tensor:
    return torch.isfinite(spread) & (spread > 0)


def _inverse(spread: Tensor) -> Tensor:
    """1 / spread, and 0 where there is none, so that what is constant becomes 0 and never NaN."""
    usable = _usable(spread)
    return torch.where(usable, 1.0 / torch.where(usable, spread, 1.0), 0.0)


def _scaling(signal: Tensor, batch: PackedClips, config: NormalisationConfig) -> Scaling:
    zero = torch.zeros(len(signal), device=signal.device)
    if config.kind == "none":
        return Scaling(zero.view(-1, 1, 1), torch.ones_like(zero).view(-1, 1, 1), zero)
    if config.kind == "per_voxel":
        return Scaling(*_voxel_scale(signal, batch, config), zero)
    centre, spread, lowest = _global_scale(signal, batch, config)
    fill = (lowest - centre) * _inverse(spread) if config.kind == "znorm_minback" else zero
    return Scaling(centre.view(-1, 1, 1), spread.view(-1, 1, 1), fill)


def _voxel_scale(signal: Tensor, batch: PackedClips, config: NormalisationConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each voxel, (B, 1, V) each."""
    if config.scope == "clip":
        mean = signal.mean(1, keepdim=True)
        spread = signal.std(1, keepdim=True, correction=0)
        # A constant voxel's float32 mean may miss it by a rounding, whose z-score would be noise of size one.
        return mean, spread.masked_fill((signal == signal[:, :1]).all(1, keepdim=True), 0.0)
    if batch.voxel_mean is None or batch.voxel_std is None:
        raise ValueError("per_voxel normalisation needs voxel_mean and voxel_std in the batch")
    return batch.voxel_mean[:, None, :], batch.voxel_std[:, None, :]


def _global_scale(signal: Tensor, batch: PackedClips, config: NormalisationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, spread and smallest value of each clip or its run over the brain, (B,) each."""
    if config.scope == "clip":
        mean, std, low, high = clip_moments(signal, batch.brain)
        if config.kind == "robust":
            median, spread = clip_quartiles(signal, batch.brain)
            return median, spread, low
    else:
        mean, std, low, high, median, spread = batch.statistics.to(torch.float32).unbind(1)
        if config.kind == "robust":
            return median, spread, low
    return (low, high - low, low) if config.kind == "minmax" else (mean, std, low)


def clip_moments(signal: Tensor, brain: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, minimum and maximum over each clip's brain voxels.

    Args:
        signal: float32 (B, T, V).
        brain: bool (B, V).

    Returns:
        Four float32 (B,); zeros for a clip without brain voxels.
    """
    inside = brain[:, None, :]
    values = brain.sum(1) * signal.shape[1]
    count = values.clamp(min=1).to(torch.float64)
    mean = torch.where(inside, signal, 0.0).sum((1, 2), dtype=torch.float64) / count
    deviation = torch.where(inside, signal - mean.to(signal.dtype).view(-1, 1, 1), 0.0)
    std = (deviation.square_().sum((1, 2), dtype=torch.float64) / count).sqrt()
    low = torch.where(inside, signal, torch.inf).amin((1, 2))
    high = torch.where(inside, signal, -torch.inf).amax((1, 2))
    std = torch.where(low == high, 0.0, std)  # a constant clip's rounding is no spread
    some = values > 0
    found = (torch.where(some, value, 0.0).to(torch.float32) for value in (mean, std, low, high))
    mean, std, low, high = found
    return mean, std, low, high


def clip_quartiles(signal: Tensor, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Median and interquartile range over each clip's brain voxels, linear between neighbouring values.

    Args:
        signal: float32 (B, T, V).
        brain: bool (B, V).

    Returns:
        Two float32 (B,); zeros for a clip without brain voxels.
    """
    values = brain.sum(1) * signal.shape[1]
    ordered = torch.where(brain[:, None, :], signal, torch.inf).flatten(1).sort(1).values
    quarter, median, three_quarters = (_quantile(ordered, values, share) for share in (0.25, 0.5, 0.75))
    return median.to(torch.float32), (three_quarters - quarter).to(torch.float32)


def _quantile(ordered: Tensor, values: Tensor, share: float) -> Tensor:
    """Quantile of the first `values` entries of each sorted row, float64 (B,); 0 where there are none."""
    last = (values - 1).clamp(min=0)
    place = last.to(torch.float64) * share
    below = place.floor().long()
    above = torch.minimum(below + 1, last)
    low, high = (ordered.gather(1, i[:, None])[:, 0].to(torch.float64) for i in (below, above))
    return torch.where(values > 0, low + (high - low) * (place - below), 0.0)
