"""muP: which parameters scale how, that the base is the standard form, and that sizes and optima stay put as widths grow."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.models import MaskedModel, learning_rates
from swiftv2.models.mup import Readout, attention_scale, factors, matrix_like
from swiftv2.models.visible import make_masked

MASK = MaskConfig(patch_size=(3, 3, 3, 2))
BASE = 12


def config(width: int, **changes: Any) -> ModelConfig:
    own: dict[str, Any] = {
        "name": "small",
        "image_size": (12, 12, 12),
        "frames": 4,
        "embed_dim": width,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "patch_size": (3, 3, 3, 2),
        "window_size": (2, 2, 2, 2),
        "first_window_size": (2, 2, 2, 2),
        "parametrisation": "mup",
        "base_embed_dim": BASE,
    }
    return ModelConfig(**(own | changes))


def made(model: ModelConfig, objective: Any = "simmim", seed: int = 0) -> MaskedModel:
    return make_masked(objective, model, MASK, LossConfig(), seed)


FORMS = [
    {"variant": variant, "decoder": {"kind": kind}}
    for variant in ("unified", "decoupled")
    for kind in ("linear", "mlp", "factorized")
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['variant']}-{form['decoder']['kind']}")
@pytest.mark.parametrize("objective", ["simmim", "visible_only"])
def test_what_is_matrix_like_is_what_grows_on_both_sides(form: dict[str, Any], objective: str) -> None:
    """Told by shapes alone: those of the model at one width and at twice the width."""
    with torch.device("meta"):
        narrow, wide = (made(config(width, **form), objective) for width in (BASE, 2 * BASE))
    sizes = dict(narrow.named_parameters())
    linear = {f"{name}.weight" for name, child in narrow.named_modules() if isinstance(child, nn.Linear)}
    both, inner = set(), set()
    for name, parameter in wide.named_parameters():
        grown = [big / small for big, small in zip(parameter.shape, sizes[name].shape, strict=True)]
        if name in linear and grown == [2.0, 2.0]:
            both.add(name)
        if name in linear and grown == [1.0, 2.0]:
            inner.add(name)
    assert matrix_like(wide) == both
    assert len(both) >= 8
    readouts = {name for name, child in wide.named_modules() if getattr(child, "multiplier", None) == 2.0}
    assert {f"{name}.weight" for name in readouts} == inner, "what maps the width to a fixed size is divided by the multiplier"


@pytest.mark.parametrize("form", FORMS[::2], ids=lambda form: f"{form['variant']}-{form['decoder']['kind']}")
def test_at_the_base_width_it_is_the_standard_form(form: dict[str, Any]) -> None:
    mup = made(config(BASE, **form))
    standard = made(config(BASE, **form, parametrisation="standard", base_embed_dim=36))
    for (name, ours), theirs in zip(mup.state_dict().items(), standard.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert learning_rates(mup, mup.config) == {}
    torch.manual_seed(0)
    clips, mask = torch.randn(1, 1, 12, 12, 12, 4), torch.rand(1, 4, 4, 4, 2) < 0.5
    brain = torch.ones(1, 12, 12, 12, dtype=torch.bool)
    assert torch.equal(mup(clips, mask, brain).reconstruction, standard(clips, mask, brain).reconstruction)


def test_first_values_rates_and_scores_scale_as_table_8_of_tensor_programs_v_says() -> None:
    wide, standard = made(config(4 * BASE)), made(config(4 * BASE, parametrisation="standard", base_embed_dim=36))
    rates = learning_rates(wide, wide.config)
    assert set(rates.values()) == {0.25}
    values = dict(standard.named_parameters())
    for name, parameter in wide.named_parameters():
        scaled = values[name] * (0.5 if name in rates else 1.0)  # 1 / sqrt(4) of the spread
        assert torch.equal(parameter, scaled), name
    for stage, (heads, width) in enumerate(zip((2, 4), (4 * BASE, 8 * BASE), strict=True)):
        head, base_head = width // heads, width // heads // 4
        assert attention_scale(wide.config, stage) == pytest.approx(math.sqrt(base_head) / head)
        attention = wide.get_submodule(f"encoder.layers.{stage}.blocks.0.attn")
        assert attention.scale == attention_scale(wide.config, stage)
        assert attention_scale(standard.config, stage) == pytest.approx(head**-0.5)
    assert factors(standard.config) is None
    told = factors(wide.config)
    assert told is not None
    assert (told["base_embed_dim"], told["readout_multiplier"], told["learning_rate_multiplier"]) == (BASE, 0.25, 0.25)


def test_the_reconstruction_is_that_of_a_readout_whose_weights_were_divided() -> None:
    """The multiplier is applied to what goes in, biases are not."""
    wide = made(config(4 * BASE))
    readout = wide.get_submodule("decoder.expand")
    assert isinstance(readout, Readout)
    nn.init.normal_(readout.bias)
    clips, mask = torch.randn(1, 1, 12, 12, 12, 4), torch.rand(1, 4, 4, 4, 2) < 0.5
    brain = torch.ones(1, 12, 12, 12, dtype=torch.bool)
    multiplied = wide(clips, mask, brain).reconstruction
    readout.multiplier = 1.0
    with torch.no_grad():
        readout.weight /= 4
    assert torch.allclose(multiplied, wide(clips, mask, brain).reconstruction, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parametrisation": "standard"}, "needs parametrisation=mup"),
        ({"variant": "swift_v1", "patch_size": (3, 3, 3, 1)}, "swift_v1 is the published model"),
        ({"base_embed_dim": 13}, "is not divisible by 2 heads"),
    ],
)
def test_a_base_that_means_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(24, **changes)
