"""SimMIM: nothing hidden leaks, the loss is the one stated, and it is the same for every split of the batch."""

import math
from typing import Any

import pytest
import torch

from swiftv2.config.model import DecoderConfig, LossConfig, MaskConfig, ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models import SimMIM, decay_names
from swiftv2.models.decoders import expansion, make_decoder, pixel_shuffle
from swiftv2.models.simmim import clip_loss, enlarge

GRID = (11, 8, 7)
FRAMES = 6
MASK = MaskConfig(patch_size=(4, 4, 4, 2))
CELLS = (3, 2, 2, 3)


def config(**changes: Any) -> ModelConfig:
    tree: dict[str, Any] = {
        "name": "small",
        "image_size": GRID,
        "frames": FRAMES,
        "embed_dim": 12,
        "depths": (1, 2),
        "num_heads": (2, 2),
        "patch_size": (2, 2, 2, 2),
        "window_size": (2, 2, 2, 2),
        "first_window_size": (2, 2, 2, 2),
    }
    return ModelConfig.model_validate(tree | changes)


def model(loss: LossConfig | None = None, **changes: Any) -> SimMIM:
    # 11 x 8 x 7 voxels are 6 x 4 x 4 patches of 2, which cells of 2 x 2 x 2 patches divide.
    simmim = SimMIM(config(**changes), MASK, loss or LossConfig(), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in simmim.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return simmim


def batch(size: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(size, 1, *GRID, FRAMES, generator=generator)
    mask = torch.rand(size, *CELLS, generator=generator) < 0.5
    brain = torch.rand(size, *GRID, generator=generator) < 0.4
    return volume, mask, brain


def hidden_voxels(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W, D, T) bool, voxel by voxel from the cell it lies in."""
    out = torch.zeros(mask.shape[0], *GRID, FRAMES, dtype=torch.bool)
    for h in range(GRID[0]):
        for w in range(GRID[1]):
            for d in range(GRID[2]):
                for t in range(FRAMES):
                    out[:, h, w, d, t] = mask[:, h // 4, w // 4, d // 4, t // 2]
    return out


@pytest.mark.parametrize("variant", ["unified", "decoupled"])
def test_nothing_hidden_leaks(variant: str) -> None:
    simmim = model(variant=variant).eval()
    volume, mask, brain = batch()
    hidden = hidden_voxels(mask)[:, None]
    with torch.no_grad():
        before = simmim(volume, mask, brain)
        after = simmim(torch.where(hidden, 1e3 * torch.randn(volume.shape), volume), mask, brain)
        seen = simmim(torch.where(hidden, volume, volume + 1.0), mask, brain)
    assert torch.equal(before.reconstruction, after.reconstruction)
    assert not torch.equal(before.clip_loss, after.clip_loss)
    assert not torch.allclose(before.reconstruction, seen.reconstruction)


def distance(kind: str, error: float, delta: float) -> float:
    size = abs(error)
    if kind == "l1":
        return size
    if kind == "l2":
        return size**2
    huber = 0.5 * size**2 if size <= delta else delta * (size - 0.5 * delta)
    return huber if kind == "huber" else huber / delta


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "huber", "l2"])
def test_the_loss_is_the_mean_over_masked_brain_voxels_of_a_clip(kind: str) -> None:
    loss = LossConfig.model_validate({"kind": kind, "delta": 0.7})
    volume, mask, brain = batch()
    with torch.no_grad():
        out = model(loss)(volume, mask, brain)
    counted = hidden_voxels(mask) & brain[..., None]
    for i in range(3):
        errors = (out.reconstruction[i, 0] - volume[i, 0])[counted[i]].tolist()
        expected = math.fsum(distance(kind, error, 0.7) for error in errors) / len(errors)
        assert float(out.clip_loss[i]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("over", ["brain_voxels", "brain_tokens", "everywhere"])
def test_where_the_loss_counts(over: str) -> None:
    simmim = model(LossConfig.model_validate({"over": over}))
    _, mask, brain = batch()
    brain &= torch.rand(brain.shape) < 0.05
    counted = simmim.counted(mask, brain, FRAMES)
    inside = brain.clone()
    if over == "everywhere":
        inside[:] = True
    if over == "brain_tokens":
        for h in range(0, GRID[0], 2):
            for w in range(0, GRID[1], 2):
                for d in range(0, GRID[2], 2):
                    cell = inside[:, h : h + 2, w : w + 2, d : d + 2]
                    cell[:] = cell.flatten(1).any(1)[:, None, None, None]
    assert torch.equal(counted, hidden_voxels(mask) & inside[..., None])


def test_a_clip_without_masked_brain_counts_as_zero() -> None:
    volume, mask, brain = batch()
    mask[1] = False
    brain[2] = False
    out = model()(volume, mask, brain)
    assert out.clip_loss[0] > 0
    assert out.clip_loss[1:].tolist() == [0.0, 0.0]
    out.clip_loss.mean().backward()


def test_the_loss_is_equal_for_every_split_of_the_batch() -> None:
    simmim = model()
    volume, mask, brain = batch(4)
    brain[0] &= torch.rand(brain[0].shape) < 0.1
    whole = simmim(volume, mask, brain).clip_loss
    parts = [simmim(volume[i : i + 1], mask[i : i + 1], brain[i : i + 1]).clip_loss for i in range(4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack([p.mean() for p in parts]).mean(), whole.mean())


@pytest.mark.parametrize("kind", ["linear", "mlp", "factorized"])
@pytest.mark.parametrize("patch_frames", [1, 2])
def test_decoders_reach_every_voxel(kind: str, patch_frames: int) -> None:
    decoder = DecoderConfig.model_validate({"kind": kind, "hidden_ratio": 1.5})
    simmim = model(decoder=decoder, patch_size=(2, 2, 2, patch_frames), in_channels=1)
    volume, mask, brain = batch()
    out = simmim(volume, mask, brain)
    assert out.reconstruction.shape == volume.shape
    assert out.reconstruction.dtype == out.clip_loss.dtype == torch.float32
    out.clip_loss.mean().backward()
    assert all(p.grad is not None for p in simmim.parameters())


def test_more_channels() -> None:
    simmim = model(in_channels=2)
    volume, mask, brain = batch()
    volume = volume.repeat(1, 2, 1, 1, 1, 1)
    out = simmim(volume, mask, brain)
    assert out.reconstruction.shape == volume.shape
    expected = (out.reconstruction - volume).abs().mean(1)[hidden_voxels(mask) & brain[..., None]]
    counts = (hidden_voxels(mask) & brain[..., None]).flatten(1).sum(1)
    torch.testing.assert_close((out.clip_loss * counts).sum(), expected.sum(), rtol=1e-4, atol=1e-4)


def test_each_feature_lands_in_its_own_block_of_voxels() -> None:
    linear = make_decoder(config(), 24)
    assert expansion(config()) == (4, 4, 4, 2)
    features = torch.zeros(1, 24, 3, 2, 2, 3)
    base = linear(features)
    features[0, :, 1, 0, 1, 2] = 1.0
    changed = (linear(features) != base)[0, 0]
    assert bool(changed[4:8, 0:4, 4:8, 4:6].all())
    assert int(changed.sum()) == 4**3 * 2


def test_pixel_shuffle_order() -> None:
    factors = (2, 3, 4, 5)
    x = torch.arange(2 * 120 * 2).reshape(1, 2, 1, 1, 1, 240)
    out = pixel_shuffle(x, factors)
    assert out.shape == (1, 2, 4, 3, 4, 5)
    assert int(out[0, 1, 3, 2, 1, 4]) == 240 + (((1 * 3 + 2) * 4 + 1) * 5 + 4) * 2 + 1


def test_enlarge_repeats_each_cell() -> None:
    cells = torch.arange(24).reshape(1, 2, 3, 2, 2)
    large = enlarge(cells, (2, 1, 3, 2))
    assert large.shape == (1, 4, 3, 6, 4)
    assert int(large[0, 3, 2, 5, 1]) == int(cells[0, 1, 2, 1, 0])


def test_the_loss_of_bf16_is_summed_in_fp32() -> None:
    shape = (1, 1, 40, 40, 40, 20)
    reconstruction = torch.full(shape, 0.5, dtype=torch.bfloat16)
    counted = torch.ones(1, *shape[2:], dtype=torch.bool)
    loss = clip_loss(reconstruction, torch.zeros(shape), counted, LossConfig())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(0.5, rel=1e-6)
    simmim = model().to(torch.bfloat16)
    out = simmim(*batch())
    assert out.reconstruction.dtype == out.clip_loss.dtype == torch.float32
    exact = model()(*batch()).clip_loss
    torch.testing.assert_close(out.clip_loss, exact, rtol=0.03, atol=0)


def test_first_values_cover_every_parameter() -> None:
    torch.manual_seed(1)
    first = SimMIM(config(), MASK, LossConfig(), seed=3).state_dict()
    torch.manual_seed(2)
    again = SimMIM(config(), MASK, LossConfig(), seed=3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert 0 < float(first["mask_token"].abs().max()) < 0.1
    assert "mask_token" not in decay_names(SimMIM(config(), MASK, LossConfig()))


@pytest.mark.parametrize(
    ("cells", "brain", "message"),
    [((3, 2, 2, 2), GRID, "mask of shape"), (CELLS, (11, 8, 8), "brain of shape")],
)
def test_shapes_that_do_not_fit_are_refused(cells: tuple[int, ...], brain: tuple[int, ...], message: str) -> None:
    with pytest.raises(SwiftError, match=message):
        model()(batch(1)[0], torch.zeros(1, *cells, dtype=torch.bool), torch.zeros(1, *brain, dtype=torch.bool))


def test_cells_must_be_whole_patches_and_divide_the_clip() -> None:
    with pytest.raises(SwiftError, match="multiple of"):
        SimMIM(config(), MaskConfig(patch_size=(3, 4, 4, 2)), LossConfig())
    volume, mask, brain = batch(1)
    with pytest.raises(SwiftError, match="must divide the padded clip"):
        SimMIM(config(), MaskConfig(patch_size=(8, 4, 4, 2)), LossConfig())(volume, mask, brain)
