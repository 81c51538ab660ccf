"""How much of an encoder learns, and at which rates."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.finetune import EncoderConfig, HeadConfig
from swiftv2.config.model import ModelConfig
from swiftv2.errors import UsageError
from swiftv2.models.heads import Predictor
from swiftv2.models.regimes import learned_share, merge, prepare, rates
from swiftv2.models.swin4d import Swin4D

MODEL = ModelConfig(
    name="small",
    image_size=(8, 8, 8),
    frames=4,
    embed_dim=12,
    depths=(2, 1, 3),
    num_heads=(2, 2, 4),
    patch_size=(2, 2, 2, 2),
    window_size=(2, 2, 2, 2),
    first_window_size=(2, 2, 2, 2),
)
VOLUME = torch.randn(3, 1, 8, 8, 8, 4, generator=torch.Generator().manual_seed(1))
BRAIN = torch.rand(3, 8, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.4


def _predictor(variant: str = "unified", **mup: object) -> Predictor:
    model = ModelConfig.model_validate(MODEL.model_dump() | {"variant": variant} | mup)
    return Predictor(Swin4D(model, seed=3), HeadConfig(), outputs=2, seed=4)


def _encoder(regime: str, **given: object) -> EncoderConfig:
    return EncoderConfig.model_validate({"regime": regime, "weights": "somewhere", **given})


def _step(predictor: Predictor) -> dict[str, bool]:
    """Which parameters one step of plain descent moves."""
    before = {name: p.detach().clone() for name, p in predictor.named_parameters()}
    predictor(VOLUME, BRAIN).square().sum().backward()
    with torch.no_grad():
        for parameter in predictor.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    return {name: not torch.equal(before[name], p) for name, p in predictor.named_parameters()}


@pytest.mark.parametrize("variant", ["unified", "decoupled"])
@pytest.mark.parametrize(
    ("regime", "moved", "still"),
    [
        ("frozen", ("head.out.weight",), ("encoder.norm.weight", "encoder.layers.2.blocks.2.norm1.weight")),
        (
            "last_blocks",
            ("head.out.weight", "encoder.norm.weight", "encoder.layers.2.blocks.2.norm1.weight"),
            ("encoder.layers.2.blocks.0.norm1.weight",),
        ),
        ("full", ("head.out.weight", "encoder.patch_embed.fc.weight", "encoder.pos_embeds.0.pos_embed"), ()),
    ],
)
def test_a_step_moves_what_the_regime_lets_learn_and_nothing_else(
    variant: str, regime: str, moved: tuple[str, ...], still: tuple[str, ...]
) -> None:
    predictor = _predictor(variant)
    prepare(predictor, _encoder(regime, fraction=0.3), seed=0)
    changed = _step(predictor)
    assert all(changed[name] for name in moved if name in changed)
    assert not any(changed[name] for name in still if name in changed)
    for name, parameter in predictor.named_parameters():
        assert changed[name] <= parameter.requires_grad


@settings(max_examples=20, deadline=None)
@given(fraction=st.floats(0.01, 1.0))
def test_larger_fractions_hold_what_smaller_ones_hold(fraction: float) -> None:
    def learned(share: float) -> set[str]:
        predictor = _predictor()
        prepare(predictor, _encoder("last_blocks", fraction=share), seed=0)
        return {name for name, p in predictor.named_parameters() if p.requires_grad}

    assert learned(fraction / 2) <= learned(fraction) <= learned(1.0) == {name for name, _ in _predictor().named_parameters()}


def test_low_rank_additions_change_nothing_at_first_and_are_merged_without_a_trace() -> None:
    predictor = _predictor()
    names = set(predictor.state_dict())
    before = predictor(VOLUME, BRAIN)
    prepare(predictor, _encoder("lora", rank=2), seed=0)
    assert torch.allclose(predictor(VOLUME, BRAIN), before, atol=1e-6)
    changed = _step(predictor)
    assert {name for name in changed if changed[name] and name.startswith("encoder.")} == {
        name for name in changed if name.endswith((".up",))
    }
    learned = predictor(VOLUME, BRAIN)
    assert not torch.allclose(learned, before, atol=1e-3)
    merge(predictor)
    assert set(predictor.state_dict()) == names
    assert torch.allclose(predictor(VOLUME, BRAIN), learned, atol=1e-5)


def test_an_addition_of_a_rank_that_is_not_low_is_refused() -> None:
    with pytest.raises(UsageError, match=r"encoder.rank=40 is no low rank"):
        prepare(_predictor(), _encoder("lora", rank=40), seed=0)


def test_rates_fall_by_one_factor_a_block_from_the_last_to_the_embedding() -> None:
    predictor = _predictor()
    config = _encoder("full", layer_decay=0.5)
    prepare(predictor, config, seed=0)
    found = rates(predictor, config, head_rate=3.0)
    assert found["head.out.weight"] == 3.0
    assert "encoder.norm.weight" not in found
    assert "encoder.layers.2.blocks.2.norm1.weight" not in found
    assert found["encoder.layers.2.blocks.0.norm1.weight"] == 0.25
    assert found["encoder.layers.1.blocks.0.norm1.weight"] == found["encoder.layers.1.downsample.norm.weight"] == 0.125
    assert found["encoder.patch_embed.fc.weight"] == 0.5**6
    assert found.keys() <= {name for name, _ in predictor.named_parameters()}


def test_rates_of_additions_are_those_of_the_weights_under_mup() -> None:
    wide = _predictor(parametrisation="mup", base_embed_dim=6)
    config = _encoder("lora", rank=2)
    prepare(wide, config, seed=0)
    found = rates(wide, config, head_rate=1.0)
    assert {value for name, value in found.items() if name.endswith((".up", ".down"))} == {0.5}


def test_the_learned_share_counts_the_encoder_alone() -> None:
    predictor = _predictor()
    assert learned_share(predictor) == 1.0
    frozen = copy.deepcopy(predictor)
    prepare(frozen, _encoder("frozen"), seed=0)
    assert learned_share(frozen) == 0.0
