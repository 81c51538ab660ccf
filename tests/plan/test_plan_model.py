"""Sizes and costs of the family: the published counts to the last digit, FLOPs by PyTorch's own counter."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swiftv2.config.load import load_model
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.models import SimMIM, Swin4D
from swiftv2.plan import plan_model

ENCODERS = {
    "5M": 4_315_212,
    "51M": 50_916_576,
    "202M": 202_250_688,
    "806M": 806_171_520,
    "3.2B": 3_219_023_616,
}
TERAFLOPS = {"5M": "0.0228", "7M": "0.019", "51M": "0.0985", "202M": "0.352", "806M": "1.32", "3.2B": "5.13"}


@pytest.mark.parametrize(("name", "count"), ENCODERS.items())
def test_encoders_have_the_published_size(name: str, count: int) -> None:
    assert plan_model(load_model(name)).encoder_parameters == count


@pytest.mark.parametrize(("width", "count"), [(24, 1_971_336), (48, 7_564_560)])
def test_swift_v1_has_the_published_size_at_other_widths(width: int, count: int) -> None:
    with torch.device("meta"):
        model = Swin4D(load_model("5M").model_copy(update={"embed_dim": width}))
    assert sum(p.numel() for p in model.parameters()) == count


def test_sizes_that_were_published_rounded() -> None:
    assert plan_model(load_model("7M")).encoder_parameters == pytest.approx(7.33e6, abs=5e3)
    config = load_model("837M_new")
    assert plan_model(config).encoder_parameters == pytest.approx(837e6, rel=0.02)
    assert all(config.embed_dim * 2**s // heads % 8 == 0 for s, heads in enumerate(config.num_heads))


@pytest.mark.parametrize(("width", "millions"), [(36, 9), (96, 66), (192, 264)])
def test_decoupled_sizes_of_the_reports(width: int, millions: int) -> None:
    change = {"embed_dim": width, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
    config = load_model("837M_new").model_copy(update=change)
    assert plan_model(config).encoder_parameters == pytest.approx(millions * 1e6, rel=0.06)


@pytest.mark.parametrize(("name", "printed"), TERAFLOPS.items())
def test_flops_agree_with_the_published_digits(name: str, printed: str) -> None:
    flops = plan_model(load_model(name)).forward_flops_per_clip
    digits = len(printed.partition(".")[2])
    assert f"{flops['encoder'] / 1e12:.{digits}f}" == printed


def counted(config: ModelConfig) -> dict[str, int]:
    """What PyTorch counts on the meta device, where attention is written out as two products."""
    frames = config.frames
    with torch.device("meta"):
        model = SimMIM(config, MaskConfig(patch_size=config.patch_size), LossConfig())
        volume = torch.zeros(1, 1, *config.image_size, frames)
        brain = torch.ones(1, *config.image_size, dtype=torch.bool)
        sizes = [-(-n // p) for n, p in zip((*config.image_size, frames), config.patch_size, strict=True)]
        mask = torch.zeros(1, *sizes, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        model(volume, mask, brain)
    modules = counter.get_flop_counts()
    parts = {"patch_embed": "encoder.patch_embed", "decoder": "decoder", "encoder": "encoder"}
    parts |= {f"stage_{i + 1}": f"encoder.layers.{i}" for i in range(len(config.depths))}
    found = {part: sum(modules[f"SimMIM.{path}"].values()) for part, path in parts.items()}
    return found | {"total": counter.get_total_flops()}


@pytest.mark.parametrize("name", ["5M", "51M", "837M_new", "demo"])
def test_flops_are_those_of_pytorchs_counter(name: str) -> None:
    config = load_model(name)
    assert counted(config) == pytest.approx(plan_model(config).forward_flops_per_clip, rel=0.01)


@pytest.mark.parametrize("kind", ["linear", "mlp", "factorized"])
@pytest.mark.parametrize("variant", ["unified", "decoupled"])
def test_flops_of_odd_shapes(kind: str, variant: str) -> None:
    tree = {
        "name": "odd",
        "variant": variant,
        "image_size": (17, 21, 3),
        "frames": 7,
        "embed_dim": 12,
        "depths": (2, 1, 2),
        "num_heads": (2, 2, 2),
        "patch_size": (2, 3, 1, 2),
        "window_size": (3, 3, 3, 2),
        "first_window_size": (2, 4, 2, 3),
        "decoder": {"kind": kind, "hidden_ratio": 0.7},
    }
    config = ModelConfig.model_validate(tree)
    assert counted(config) == pytest.approx(plan_model(config).forward_flops_per_clip, rel=1e-9)


def test_the_plan_as_json() -> None:
    plan = json.loads(plan_model(load_model("demo")).to_json())
    assert set(plan) == {"model", "encoder_parameters", "decoder_parameters", "forward_flops_per_clip"}
    flops = plan["forward_flops_per_clip"]
    stages = sum(value for name, value in flops.items() if name.startswith(("patch", "stage")))
    assert stages == flops["encoder"]
    assert flops["encoder"] + flops["decoder"] == flops["total"]
