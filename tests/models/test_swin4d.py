"""The encoder: what it lets through, what it refuses, and that nothing depends on a running random state."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swiftv2.config.model import ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.models import Swin4D, decay_names
from swiftv2.models.attention import rotate
from swiftv2.models.blocks import DecoupledBlock
from swiftv2.models.routes import rotary_tables

SMALL: dict[str, Any] = {
    "name": "small",
    "image_size": (10, 8, 6),
    "frames": 6,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "patch_size": (2, 2, 2, 1),
    "window_size": (2, 2, 2, 4),
    "first_window_size": (3, 3, 3, 4),
}
VARIANTS = ["unified", "decoupled"]


def small(variant: str = "unified", **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(SMALL | {"variant": variant} | changes)


def lively(model: Swin4D, seed: int = 0) -> Swin4D:
    """Parameters large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def clip(batch: int = 2, frames: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, 10, 8, 6, frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_shape_and_dtype(variant: str) -> None:
    output = Swin4D(small(variant))(clip())
    assert output.shape == (2, 24, 3, 2, 2, 6)
    assert output.dtype == torch.float32


def test_image_padding_is_zero_on_the_right() -> None:
    config = small(image_size=(9, 7, 5), frames=5, patch_size=(2, 2, 2, 2))
    model = lively(Swin4D(config)).eval()
    volume = torch.randn(1, 1, 9, 7, 5, 5)
    padded = torch.zeros(1, 1, 10, 8, 6, 6)
    padded[:, :, :9, :7, :5, :5] = volume
    wide = Swin4D(small(patch_size=(2, 2, 2, 2))).eval()
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(volume), wide(padded))


def test_only_swift_v1_leaves_its_last_norm_out() -> None:
    settings: dict[str, Any] = {
        "image_size": (8, 8, 8),
        "frames": 4,
        "first_window_size": (2, 2, 2, 2),
    }  # nothing is padded
    v1, unified = Swin4D(small("swift_v1", **settings)), Swin4D(small(**settings))
    unified.load_state_dict(v1.state_dict())
    volume = torch.randn(1, 1, 8, 8, 8, 4)
    raw = v1(volume)
    torch.testing.assert_close(unified(volume), v1.norm(raw.movedim(1, -1)).movedim(-1, 1))
    raw.sum().backward()
    assert v1.norm.weight.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_path_depends_on_its_draws_alone(variant: str) -> None:
    model = lively(Swin4D(small(variant, drop_path=0.5))).train()
    draws = torch.rand(2, model.branches, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    first = model(clip(), draws)
    torch.manual_seed(2)
    assert torch.equal(first, model(clip(), draws))
    torch.testing.assert_close(model(clip()[1:], draws[1:]), first[1:])
    assert not torch.allclose(first, model(clip(), draws.flip(0)))
    keep_all = torch.full_like(draws, 0.999)
    with torch.no_grad():
        scaled = model(clip(), keep_all)
    assert not torch.allclose(scaled, model.eval()(clip()))


def test_drop_path_leaves_out_exactly_the_drawn_branch() -> None:
    """With every branch but the first block's dropped, the model is that block alone."""
    config = small(drop_path=0.9, depths=(2,), num_heads=(2,), last_layer_full_msa=False)
    model = lively(Swin4D(config)).train()
    one = Swin4D(config.model_copy(update={"depths": (1,), "drop_path": 0.0})).eval()
    one.load_state_dict({k: v for k, v in model.state_dict().items() if ".blocks.1." not in k})
    draws = torch.tensor([[0.0, 0.0, 0.1, 0.1]]).expand(2, -1)
    torch.testing.assert_close(model(clip(), draws), one(clip()))


def test_training_with_drop_path_needs_draws() -> None:
    model = Swin4D(small(drop_path=0.1))
    with pytest.raises(SwiftError, match=r"\(2, 8\), got none"):
        model(clip())
    model.eval()(clip())


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_gradient(variant: str) -> None:
    gradients = []
    for stages, keep in (((), "nothing"), ((0, 1), "nothing"), ((0, 1), "attention"), ((1,), "products")):
        model = lively(Swin4D(small(variant, drop_path=0.3, checkpoint_stages=stages, checkpoint_keep=keep)))
        draws = torch.rand(2, model.branches, generator=torch.Generator().manual_seed(3))
        model(clip(), draws).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        for others in gradients[1:]:
            torch.testing.assert_close(others[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize(("keep", "attentions", "products"), [("nothing", 4, 24), ("attention", 0, 24), ("products", 0, 0)])
def test_checkpointing_computes_again_only_what_it_does_not_keep(keep: str, attentions: int, products: int) -> None:
    """Four blocks of one attention and six linear layers each: queries, keys, values, projection and the MLP's two."""

    class Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Operators that nothing kept answers for."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.names: list[str] = []

    def seen(model: Swin4D) -> tuple[int, int]:
        loss = model(torch.ones(1, 1, 8, 8, 8, 6)).square().sum()
        with Computed() as backward:
            loss.backward()
        attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
        return backward.names.count(attention), backward.names.count("aten.addmm.default")

    settings: dict[str, Any] = {"first_window_size": (2, 2, 2, 6), "window_size": (2, 2, 2, 6), "last_layer_full_msa": False}
    settings |= {"image_size": (8, 8, 8), "attention_buckets": 1}
    plain = seen(Swin4D(small(**settings)))
    again = seen(Swin4D(small(checkpoint_stages=(0, 1), checkpoint_keep=keep, **settings)))
    assert (again[0] - plain[0], again[1] - plain[1]) == (attentions, products)


def test_inference_first_and_training_afterwards() -> None:
    """What is kept between passes must not have been made as an inference tensor."""
    for changes in ({"window_size": (2, 2, 2, 3)}, {"variant": "decoupled"}):
        model = Swin4D(small(image_size=(10, 8, 6), frames=5, attention_buckets=1, **changes))
        with torch.inference_mode():
            model(clip(1, 5))
        model(clip(1, 5)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_token_without_hidden_patches_is_refused() -> None:
    model = Swin4D(small())
    with pytest.raises(SwiftError, match="give both"):
        model(clip(), hidden=torch.zeros(2, 5, 4, 3, 6, dtype=torch.bool))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_stays_near_fp32(variant: str) -> None:
    """Features leave a layer norm at unit scale; bf16 carries 8 bits: 0.4 % a rounding, a few roundings deep."""
    model = Swin4D(small(variant), seed=5).eval()
    with torch.no_grad():
        exact = model(clip())
        rounded = model.to(torch.bfloat16)(clip())
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.03


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_values_come_from_the_seed_alone(variant: str) -> None:
    torch.manual_seed(1)
    first = Swin4D(small(variant), seed=7).state_dict()
    torch.manual_seed(2)
    again, other = Swin4D(small(variant), seed=7).state_dict(), Swin4D(small(variant), seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = first["layers.0.blocks.0.mlp.linear1.weight"]
    assert not torch.equal(weight, other["layers.0.blocks.0.mlp.linear1.weight"])
    assert float(weight.std()) == pytest.approx(0.02, rel=0.15)
    assert not first["patch_embed.fc.bias"].any()
    assert bool((first["norm.weight"] == 1).all())


def test_decoupled_scales_start_where_configured() -> None:
    state = Swin4D(small("decoupled", layer_scale_temporal=0.5)).state_dict()
    assert bool((state["layers.0.blocks.0.temporal_scale.scale"] == 0.5).all())
    assert bool((state["layers.1.blocks.1.spatial_scale.scale"] == 0.9).all())


@pytest.mark.parametrize("window", [(6,), (3, 2, 4)])
def test_rotary_scores_depend_on_differences_alone(window: tuple[int, ...]) -> None:
    head_dim = 16
    places = [torch.tensor(p) for p in itertools.product(*map(range, window))]
    cosine, sine = (t[:, 0] for t in rotary_tables(torch.stack(places) + 5, head_dim, 1e4))
    length = cosine.shape[0]
    query, key = torch.randn(head_dim), torch.randn(head_dim)
    scores = rotate(query.expand(length, -1), cosine, sine) @ rotate(key.expand(length, -1), cosine, sine).T
    seen: dict[tuple[int, ...], float] = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            difference = tuple((a - b).tolist())
            assert float(scores[i, j]) == pytest.approx(seen.setdefault(difference, float(scores[i, j])), abs=1e-4)
    assert len({round(value, 3) for value in seen.values()}) > len(seen) // 2
    unrotated = head_dim % 6 if len(window) == 3 else 0
    rotated = rotate(torch.ones(length, head_dim), cosine, sine)
    assert bool((rotated[:, head_dim - unrotated :] == 1).all())
    assert not torch.allclose(rotated[-1, : head_dim - unrotated], torch.ones(head_dim - unrotated))


@pytest.mark.parametrize("absolute", [False, True])
def test_decoupled_takes_longer_clips(absolute: bool) -> None:
    model = Swin4D(small("decoupled", absolute_position=absolute)).eval()
    assert model(clip(1, frames=17)).shape == (1, 24, 3, 2, 2, 17)
    assert any("pos_embed" in name for name in model.state_dict()) == absolute
    assert not any("time_embed" in name for name in model.state_dict())


def test_decoupled_blocks_hold_sixteen_square_widths() -> None:
    block = DecoupledBlock(small("decoupled", embed_dim=24), stage=0)
    assert sum(p.numel() for p in block.parameters() if p.ndim == 2) == 16 * 24**2


def test_shorter_clips_use_the_first_times() -> None:
    model = Swin4D(small()).eval()
    assert model(clip(1, frames=3)).shape[-1] == 3


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 10, 8, 6, 7), "7 frames are longer"),
        ((1, 1, 10, 8, 8, 6), "position tables"),
        ((1, 2, 10, 8, 6, 6), "it takes"),
        ((10, 8, 6, 6), "it takes"),
    ],
)
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SwiftError, match=message):
        Swin4D(small())(torch.zeros(shape))


@pytest.mark.parametrize("variant", VARIANTS)
def test_decay_touches_matrices_of_linear_layers_only(variant: str) -> None:
    model = Swin4D(small(variant))
    names = decay_names(model)
    parameters = dict(model.named_parameters())
    assert names <= parameters.keys()
    assert all(parameters[name].ndim == 2 for name in names)
    spared = parameters.keys() - names
    assert all(any(word in name for word in ("bias", "norm", "embed", "scale")) for name in spared)
    assert "patch_embed.fc.weight" in names
    assert "layers.0.downsample.reduction.weight" in names


def test_head_dimensions_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ValueError, match="even head dimension"):
        small("decoupled", num_heads=(4, 4))
