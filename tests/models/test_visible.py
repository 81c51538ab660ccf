"""Visible-only encoding: exact against attention written out over visible tokens, blind to what is hidden, trainable."""

from typing import Any

import numpy as np
import pytest
import torch
from dense_reference import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import clip, config, lively, masks, shapes, tokens_of
from torch import Tensor

from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models import Swin4D, VisibleOnly, decay_names

VARIANTS = ["unified", "decoupled"]
PACKINGS = ["none", "template", "subject"]
CELL = (2, 2, 2, 1)
SIZE, FRAMES = (9, 6, 5), 6


def visible_only(variant: str, cell: tuple[int, int, int, int] = CELL, **changes: Any) -> VisibleOnly:
    """With the skip, so that visible patches come in by two ways."""
    settled = config(variant, **({"decoder": {"visible": {"skip": True}}} | changes))
    return VisibleOnly(settled, MaskConfig(patch_size=cell), LossConfig(kind="l2"))


def brains(batch: int, share: float = 0.6, seed: int = 0) -> Tensor:
    """(B, H, W, D): some voxels, and one in every case."""
    found = torch.rand(batch, *SIZE, generator=torch.Generator().manual_seed(seed)) < share
    found[:, 4, 3, 2] = True
    return found


def ready(model: VisibleOnly, brain: Tensor) -> VisibleOnly:
    """With a template, where one is wanted: all voxels that any of the brains holds."""
    if model.config.packing == "template":
        model.encoder.use_template(brain.any(0))
    return model


def hidden_cells(batch: int, seed: int = 5, share: float = 0.6, grid: tuple[int, ...] = (5, 3, 3, 6)) -> Tensor:
    return torch.rand(batch, *grid, generator=torch.Generator().manual_seed(seed)) < share


def exists(model: VisibleOnly, brain: Tensor, frames: int = FRAMES) -> Tensor:
    """(B, h, w, d, t): tokens that are there at all."""
    found = {"none": torch.ones_like(brain), "template": brain.any(0).expand_as(brain), "subject": brain}
    return tokens_of(found[model.config.packing], model.encoder, frames)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
@given(shape=shapes, seed=masks, share=st.sampled_from([0.1, 0.5, 0.9]), batch=st.integers(1, 3))
@settings(max_examples=6, deadline=None)
def test_the_encoder_equals_dense_attention_over_visible_tokens(
    variant: str, packing: str, shape: tuple[int, int, int, int], seed: int, share: float, batch: int
) -> None:
    *size, frames = shape
    model = lively(Swin4D(config(variant, packing=packing, image_size=tuple(size), frames=frames)), seed % 7)
    rng = np.random.default_rng(seed)
    brain = torch.from_numpy(rng.random(size) < 0.7)
    brain[tuple(rng.integers(size))] = True
    if packing == "template":
        model.use_template(brain)
    own = brain.expand(batch, *size)
    there = tokens_of(torch.ones_like(own) if packing == "none" else own, model, frames)
    visible = torch.from_numpy(rng.random(there.shape) < share)
    for one, kept in zip(visible, there, strict=True):
        one.view(-1)[kept.reshape(-1).nonzero()[0]] = True
    volume = clip((batch, 1, *shape), seed)
    features, embedded, rows = model.encode_visible(volume, visible, brain=own)
    # Rotary tables are float32; everything else is float64.
    close = 1e-6 if variant == "decoupled" else 1e-10
    torch.testing.assert_close(features, reference(model, volume, there & visible), rtol=10 * close, atol=close)
    assert len(embedded) == int((there & visible).sum())
    assert torch.equal(rows % batch, (there & visible).nonzero()[:, 0])


@pytest.mark.parametrize("cell", [CELL, (4, 2, 6, 2)])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_voxels_change_nothing(variant: str, packing: str, cell: tuple[int, int, int, int]) -> None:
    """Mask cells of one token and of several; the values would be seen through the sum if a single one came in."""
    size = (8, 6, 6) if cell != CELL else SIZE
    model = visible_only(variant, cell, packing=packing, image_size=size).double()
    lively(model.encoder)
    brain = brains(2) if size == SIZE else torch.ones(2, *size, dtype=torch.bool)
    ready(model, brain)
    grid = tuple(-(-n // c) for n, c in zip((*size, FRAMES), cell, strict=True))
    mask = hidden_cells(2, grid=grid)
    volume = clip((2, 1, *size, FRAMES), 1)
    voxels = mask
    for axis, factor in enumerate(cell):
        voxels = voxels.repeat_interleave(factor, axis + 1)
    voxels = voxels[:, None, : size[0], : size[1], : size[2], :FRAMES]
    assert 0 < voxels.double().mean() < 1
    changed = torch.where(voxels, 1e3 * clip(tuple(volume.shape), 2), volume)
    first, second = (model(v, mask, brain).reconstruction for v in (volume, changed))
    assert torch.equal(first, second)
    seen = torch.where(voxels, volume, volume + 1.0)
    assert not torch.allclose(first, model(seen, mask, brain).reconstruction)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str, packing: str) -> None:
    """The engine refuses a parameter without a gradient; with drop path, and every sample by itself as in a batch."""
    model = visible_only(variant, packing=packing, drop_path=0.3).train()
    brain = brains(2)
    ready(model, brain)
    volume, mask = clip((2, 1, *SIZE, FRAMES), 3).float(), hidden_cells(2)
    draws = torch.rand(2, model.encoder.branches, generator=torch.Generator().manual_seed(3))
    output = model(volume, mask, brain, draws)
    assert output.reconstruction.shape == volume.shape
    output.clip_loss.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    alone = [model(volume[i : i + 1], mask[i : i + 1], brain[i : i + 1], draws[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat([one.reconstruction for one in alone]), output.reconstruction, rtol=1e-4, atol=1e-5)
    assert "decoder.mask_token" not in decay_names(model)
    assert "decoder.expand.weight" in decay_names(model)


@pytest.mark.parametrize("packing", PACKINGS)
def test_reconstructions_are_where_tokens_are(packing: str) -> None:
    model = visible_only("unified", packing=packing)
    brain = brains(2, share=0.02)
    ready(model, brain)
    output = model(clip((2, 1, *SIZE, FRAMES), 3).float(), hidden_cells(2, share=0.2), brain)
    there = exists(model, brain)
    for axis, factor in enumerate(model.config.patch_size):
        there = there.repeat_interleave(factor, axis + 1)
    there = there[:, None, : SIZE[0], : SIZE[1], : SIZE[2], :FRAMES]
    assert torch.equal(output.reconstruction != 0, there)


def test_frames_that_are_hidden_whole_are_filled_in_from_others() -> None:
    """A temporal mask leaves no token of those frames: the decoder's window over time reaches the visible ones."""
    for variant in VARIANTS:
        model = visible_only(variant).eval()
        mask = torch.zeros(1, 5, 3, 3, 6, dtype=torch.bool)
        mask[..., 3:] = True
        volume = clip((1, 1, *SIZE, FRAMES), 3).float()
        first = model(volume, mask, brains(1)).reconstruction[..., 3:]
        again = model(volume + 1.0, mask, brains(1)).reconstruction[..., 3:]
        assert not torch.allclose(first, again)


def test_longer_clips_work_where_nothing_is_made_for_a_length() -> None:
    model = visible_only("decoupled", absolute_position=False)
    volume = torch.randn(1, 1, *SIZE, 2 * FRAMES)
    output = model(volume, hidden_cells(1, grid=(5, 3, 3, 12)), brains(1))
    assert output.reconstruction.shape == volume.shape


def test_it_learns() -> None:
    """A few steps on one batch bring its loss down to well below that of a constant."""
    model = visible_only("unified", packing="subject")
    volume, mask, brain = torch.randn(2, 1, *SIZE, 1).expand(-1, -1, -1, -1, -1, FRAMES), hidden_cells(2), brains(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(volume, mask, brain).clip_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7


@pytest.mark.parametrize("packing", PACKINGS)
def test_bf16(packing: str) -> None:
    model = visible_only("unified", packing=packing)
    brain = brains(2)
    ready(model, brain)
    volume, mask = clip((2, 1, *SIZE, FRAMES), 3).float(), hidden_cells(2)
    exact = model(volume, mask, brain).reconstruction
    rounded = model.to(torch.bfloat16)(volume, mask, brain)
    assert rounded.reconstruction.dtype == torch.float32
    torch.testing.assert_close(rounded.reconstruction, exact, rtol=0.05, atol=0.02)
    rounded.clip_loss.mean().backward()


@pytest.mark.parametrize("skip", [True, False])
def test_without_the_skip_features_alone_reach_the_decoder(skip: bool) -> None:
    model = visible_only("unified", decoder={"visible": {"width": 16, "depth": 2, "num_heads": 2, "skip": skip}})
    assert any("skip" in name for name, _ in model.named_parameters()) == skip
    with torch.no_grad():
        model.decoder.expand.weight.zero_()
    volume, mask = torch.randn(1, 1, *SIZE, FRAMES), hidden_cells(1)
    first, second = (model(v, mask, brains(1)).reconstruction for v in (volume, volume.flip(0, -1)))
    assert torch.equal(first, second) != skip


def test_a_clip_without_a_visible_token_is_refused() -> None:
    model = visible_only("unified", packing="subject")
    brain, mask = brains(2), hidden_cells(2)
    mask[1] = tokens_of(brain, model.encoder, FRAMES)[1]
    with pytest.raises(SwiftError, match=r"1 of 2 clips have no visible token to encode: lower mask\.ratio"):
        model(torch.zeros(2, 1, *SIZE, FRAMES), mask, brain)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="not divisible by num_heads=3"):
        config("unified", decoder={"visible": {"num_heads": 3}})
    with pytest.raises(ValueError, match="even head dimension of at least 6, got 4"):
        config("decoupled", decoder={"visible": {"width": 16, "num_heads": 4}})
    published = Swin4D(
        ModelConfig(name="v1", variant="swift_v1", image_size=(48,) * 3, patch_size=(6, 6, 6, 1), depths=(2,), num_heads=(3,))
    )
    with pytest.raises(SwiftError, match="needs another variant"):
        published.encode_visible(torch.zeros(1, 1, 48, 48, 48, 20), torch.ones(1, 8, 8, 8, 20, dtype=torch.bool))
