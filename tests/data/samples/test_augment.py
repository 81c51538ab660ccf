"""Augmentation: the brain moves as said, the background stays, and draws depend on seed, pass and clip alone."""

from typing import Any

import numpy as np
import pytest
import torch

from swiftv2.config.finetune import AugmentConfig
from swiftv2.data.samples.augment import Augment

EDGES = (6.0, 6.0, 6.0)
EVERYTHING: dict[str, Any] = {
    "affine": 1.0, "elastic": 1.0, "noise": 1.0, "scale": 0.2, "speed": 0.1, "frame_dropout": 0.3, "reverse": True, "flip": True
}  # fmt: skip


def clips(count: int = 4, fill: float = -3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*[torch.arange(16) - 7.5] * 3, indexing="ij")
    brain = (torch.stack(axes).square().sum(0) < 36)[None].repeat(count, 1, 1, 1)
    smooth = torch.stack([torch.sin(axes[0] / 3 + t / 2) + axes[1] / 8 for t in range(6)], dim=-1)
    volume = smooth[None, None] + 0.01 * torch.randn(count, 1, 16, 16, 16, 6, generator=generator)
    volume = torch.where(brain[:, None, ..., None], volume, fill)
    return volume, brain, torch.full((count,), fill), torch.zeros(count, dtype=torch.int64), torch.arange(count)


def augment(**options: Any) -> Augment:
    return Augment(AugmentConfig.model_validate(options), EDGES, seed=7)


def test_nothing_asked_for_changes_nothing() -> None:
    volume, brain, *rest = clips()
    out, held = augment()(volume, brain, *rest)
    assert torch.allclose(out, volume, atol=1e-6)
    assert torch.equal(held, brain)


def test_clips_come_out_the_same_however_they_are_divided_and_differ_between_passes() -> None:
    volume, brain, fill, epoch, clip = clips()
    whole, held = augment(**EVERYTHING)(volume, brain, fill, epoch, clip)
    for i in range(4):
        part = slice(i, i + 1)
        one, own = augment(**EVERYTHING)(volume[part], brain[part], fill[part], epoch[part], clip[part])
        assert torch.equal(one, whole[part])
        assert torch.equal(own, held[part])
    again, _ = augment(**EVERYTHING)(volume, brain, fill, epoch + 1, clip)
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(whole, again, strict=True))


def test_the_background_keeps_its_value_and_the_brain_its_range() -> None:
    volume, brain, fill, epoch, clip = clips()
    out, held = augment(affine=1.0, elastic=1.0)(volume, brain, fill, epoch, clip)
    outside = ~held[:, None, ..., None].expand_as(out)
    assert (out[outside] == -3.0).all()
    inside = volume[brain[:, None, ..., None].expand_as(volume)]
    # An edge that had been mixed with the background would be far below.
    assert out[~outside].min() >= inside.min() - 0.05
    assert held.sum(dim=(1, 2, 3)).float().mean() == pytest.approx(float(brain[0].sum()), rel=0.1)


def test_a_shift_moves_the_middle_of_the_brain_by_at_most_what_was_said() -> None:
    volume, brain, fill, epoch, clip = clips(16)
    _, held = augment(affine=1.0, translate_mm=12.0, rotate_degrees=0.0, zoom=0.0)(volume, brain, fill, epoch, clip)
    middles = torch.stack([one.nonzero().float().mean(0) - 7.5 for one in held]) * 6.0
    assert middles.abs().max() <= 12.0 + 1.0
    assert middles.abs().max() > 6.0
    assert middles.mean(0).abs().max() < 6.0


@pytest.mark.parametrize("option", ["speed", "frame_dropout", "reverse"])
def test_changes_of_time_leave_space_alone(option: str) -> None:
    volume, brain, fill, epoch, clip = clips(8)
    out, held = augment(**{option: {"speed": 0.3, "frame_dropout": 0.5, "reverse": True}[option]})(
        volume, brain, fill, epoch, clip
    )
    assert torch.equal(held, brain)
    for before, after in zip(volume[:, 0], out[:, 0], strict=True):
        # Each frame is a frame of the clip, or lies between two neighbours.
        wanted = before[..., 1:] if option == "speed" else before
        low, high = torch.minimum(before[..., :-1], before[..., 1:]), torch.maximum(before[..., :-1], before[..., 1:])
        for frame in range(6):
            now = after[..., frame]
            if option == "speed":
                assert any(((now >= low[..., t] - 1e-5) & (now <= high[..., t] + 1e-5)).all() for t in range(5))
            else:
                assert any(torch.allclose(now, wanted[..., t], atol=1e-5) for t in range(6))
    assert not torch.allclose(out, volume)


def test_a_flip_mirrors_the_first_axis_of_about_half_of_the_clips() -> None:
    volume, brain, fill, epoch, clip = clips(64)
    out, _ = augment(flip=True)(volume, brain, fill, epoch, clip)
    flipped = np.array([torch.allclose(a, b.flip(1), atol=1e-5) for a, b in zip(out, volume, strict=True)])
    kept = np.array([torch.allclose(a, b, atol=1e-5) for a, b in zip(out, volume, strict=True)])
    assert (flipped ^ kept).all()
    assert 18 <= flipped.sum() <= 46


def test_noise_has_the_deviation_that_was_said_and_lies_in_the_brain() -> None:
    volume, brain, fill, epoch, clip = clips()
    out, _ = augment(noise=1.0, noise_std=0.5)(volume, brain, fill, epoch, clip)
    change = (out - volume)[:, 0]
    assert change[brain].std() == pytest.approx(0.5, rel=0.03)
    assert (change[~brain] == 0).all()


def test_a_slice_can_be_augmented() -> None:
    volume, brain, fill, epoch, clip = clips()
    out, held = augment(affine=1.0, elastic=1.0)(volume[..., 7:8, :], brain[..., 7:8], fill, epoch, clip)
    assert torch.isfinite(out).all()
    assert held.any()
