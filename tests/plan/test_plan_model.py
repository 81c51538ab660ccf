"""Sizes and costs of the family: the published counts to the last digit, FLOPs by PyTorch's own counter."""

import json

import pytest
import torch
from published import PublishedSwin4D
from torch.utils.flop_counter import FlopCounterMode

from swiftv2.config.load import load_model
from swiftv2.models import Swin4D
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


@pytest.mark.parametrize("name", ["5M", "51M"])
def test_the_published_count_is_that_of_the_published_formulation(name: str) -> None:
    """By PyTorch's own counter; what this package computes is less, and is counted by `computed_flops`."""
    config = load_model(name)
    with torch.device("meta"):
        model = PublishedSwin4D(config)
        volume = torch.zeros(1, 1, *config.image_size, config.frames)
    with FlopCounterMode(display=False) as counter:
        model(volume)
    assert counter.get_total_flops() == pytest.approx(plan_model(config).forward_flops_per_clip["encoder"], rel=0.01)


def test_the_plan_as_json() -> None:
    plan = json.loads(plan_model(load_model("demo")).to_json())
    assert set(plan) == {"model", "encoder_parameters", "decoder_parameters", "forward_flops_per_clip"}
    flops = plan["forward_flops_per_clip"]
    stages = sum(value for name, value in flops.items() if name.startswith(("patch", "stage")))
    assert stages == flops["encoder"]
    assert flops["encoder"] + flops["decoder"] == flops["total"]
