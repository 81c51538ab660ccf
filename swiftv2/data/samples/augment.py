"""Random changes of training clips on the device: movement, deformation, noise, amplitude, time.

All draws of a clip come from (seed, pass, clip) alone, so that any division among ranks gives the same clips. Movement and
deformation are one interpolation, alike in all frames; what is interpolated is the brain alone, so that its edge is not dimmed
by the background (normalised convolution, Knutsson & Westin 1993).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from swiftv2.config.finetune import AugmentConfig
from swiftv2.data import keyed

CONTROL_MM = 30.0
"""Distance of the control points of a deformation."""


class Augment:
    """Changes clips at random.

    Args:
        config: what is done, how often and how much.
        voxel_mm: edges of a voxel along (H, W, D).
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, voxel_mm: tuple[float, float, float], seed: int) -> None:
        self.config, self.voxel_mm, self.seed = config, voxel_mm, seed

    def __call__(self, volume: Tensor, brain: Tensor, fill: Tensor, epoch: Tensor, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            volume: (B, 1, H, W, D, T) floating, normalised.
            brain: (B, H, W, D) bool.
            fill: (B,) value of the background.
            epoch: (B,) pass over the data.
            clip: (B,) number of the clip.

        Returns:
            Volume and brain, of the same shapes and formats.
        """
        changed = [
            self._one(volume[i, 0], brain[i], fill[i], keyed.generator(self.seed, "augment", turn, number))
            for i, (turn, number) in enumerate(zip(epoch.tolist(), clip.tolist(), strict=True))
        ]
        return torch.stack([one for one, _ in changed])[:, None], torch.stack([one for _, one in changed])

    def _one(self, clip: Tensor, brain: Tensor, fill: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """One clip (H, W, D, T), from the background's value on."""
        config = self.config
        # All are drawn, whatever comes of them: an option turned on does not change the others' draws.
        chance, amplitude, speed, noise_seed = rng.random(5), rng.uniform(-1, 1), rng.uniform(-1, 1), int(rng.integers(2**62))
        pose, kept = rng.uniform(-1, 1, size=7), rng.random(clip.shape[-1])
        points = rng.uniform(-1, 1, size=(3, *self._points(clip.shape[:3])))
        signal = clip - fill
        moved, bent = chance[0] < config.affine, chance[1] < config.elastic
        if moved or bent:
            signal, brain = self._resample(signal, brain, pose if moved else None, points if bent else None)
        signal = self._in_time(signal, config.speed * speed, kept, reverse=config.reverse and chance[2] < 0.5)
        signal = signal * (1 + config.scale * amplitude)
        if chance[3] < config.noise:
            generator = torch.Generator(signal.device).manual_seed(noise_seed)
            noise = torch.randn(signal.shape, generator=generator, device=signal.device, dtype=signal.dtype)
            signal = signal + config.noise_std * noise * brain[..., None]
        if config.flip and chance[4] < 0.5:
            signal, brain = signal.flip(0), brain.flip(0)
        return signal + fill, brain

    def _points(self, shape: torch.Size) -> tuple[int, int, int]:
        """Control points along each axis."""
        h, w, d = (max(math.ceil(n * edge / CONTROL_MM), 1) + 1 for n, edge in zip(shape, self.voxel_mm, strict=True))
        return h, w, d

    def _resample(
        self, signal: Tensor, brain: Tensor, pose: NDArray[np.float64] | None, points: NDArray[np.float64] | None
    ) -> tuple[Tensor, Tensor]:
        """Move and bend (H, W, D, T) and its brain in one interpolation."""
        shape, device = brain.shape, signal.device
        edges = torch.tensor(self.voxel_mm, device=device)
        axes = [torch.arange(n, device=device, dtype=torch.float32) for n in shape]
        middle = (torch.tensor(shape, device=device) - 1) / 2
        # From each voxel, where its value comes from, in mm about the middle.
        place = (torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) - middle) * edges
        if pose is not None:
            place = place @ torch.tensor(self._turn(pose[:4]), dtype=torch.float32, device=device).T
            place = place + torch.tensor(self.config.translate_mm * pose[4:], dtype=torch.float32, device=device)
        if points is not None:
            coarse = torch.tensor(self.config.elastic_mm * points, dtype=torch.float32, device=device)
            fine = functional.interpolate(coarse[None], size=tuple(shape), mode="trilinear", align_corners=True)[0]
            place = place + fine.permute(1, 2, 3, 0)
        index = place / edges + middle
        # An axis of one voxel has no neighbours to move to.
        wide = torch.tensor([max(n - 1, 1) for n in shape], device=device)
        where = (2 * index / wide - 1) if min(shape) > 1 else torch.where(wide > 1, 2 * index / wide - 1, 0)
        grid = where.flip(-1)[None]
        held = brain.float()[None, None]
        frames = (signal.float() * brain[..., None]).permute(3, 0, 1, 2)[None]
        weight = functional.grid_sample(held, grid, align_corners=True)[0, 0]
        values = functional.grid_sample(frames, grid, align_corners=True)[0].permute(1, 2, 3, 0)
        inside = weight > 0.5
        moved = torch.where(inside[..., None], values / weight.clamp(min=0.5)[..., None], 0).to(signal.dtype)
        return moved, inside

    def _turn(self, pose: NDArray[np.float64]) -> NDArray[np.float64]:
        """(3, 3): turns about the three axes, then a change of size."""
        turn: NDArray[np.float64] = np.eye(3)
        for axis, angle in enumerate(np.deg2rad(self.config.rotate_degrees) * pose[:3]):
            one, two = (other for other in range(3) if other != axis)
            about = np.eye(3)
            about[[one, one, two, two], [one, two, one, two]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            turn = turn @ about
        turn *= 1 + self.config.zoom * float(pose[3])
        return turn

    def _in_time(self, signal: Tensor, speed: float, kept: NDArray[np.float64], *, reverse: bool) -> Tensor:
        """Change the order and the pace of frames (..., T)."""
        frames = signal.shape[-1]
        if speed:
            middle = (frames - 1) / 2
            times = np.clip(middle + (np.arange(frames) - middle) * (1 + speed), 0, frames - 1)
            below = np.minimum(times.astype(np.int64), max(frames - 2, 0))
            share = torch.tensor(times - below, device=signal.device, dtype=signal.dtype)
            above = np.minimum(below + 1, frames - 1)
            signal = signal[..., torch.from_numpy(below)] * (1 - share) + signal[..., torch.from_numpy(above)] * share
        if self.config.frame_dropout:
            there = kept >= self.config.frame_dropout
            there[0] = True
            last = np.maximum.accumulate(np.where(there, np.arange(frames), 0))
            signal = signal[..., torch.from_numpy(last)]
        return signal.flip(-1) if reverse else signal
