"""Sizes of activations after a few steps of Adam: flat in the width under muP, growing in the standard form."""

from typing import Any

import pytest

from swiftv2.config.model import ModelConfig
from swiftv2.errors import UsageError
from swiftv2.recipes.coordinates import check_coordinates

WIDTHS = (36, 72, 144)


def small(**changes: Any) -> ModelConfig:
    own: dict[str, Any] = {
        "name": "small",
        "image_size": (12, 12, 12),
        "frames": 4,
        "depths": (2, 2),
        "num_heads": (6, 12),
        "patch_size": (3, 3, 3, 2),
        "window_size": (2, 2, 2, 2),
        "first_window_size": (2, 2, 2, 2),
    }
    return ModelConfig(**(own | changes))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["unified", "decoupled"])
def test_activations_keep_their_size_under_mup_and_grow_without(variant: str) -> None:
    """Over four times the width. At the start scores fall with it, as muP means them to: queries and keys are random then."""
    check = check_coordinates(small(variant=variant), WIDTHS, steps=4, lr=1e-2, seeds=1)
    grown = {name: slope["standard"] for name, slope in check["slopes"].items() if name != "patch embedding"}
    kept = {name: slope["mup"] for name, slope in check["slopes"].items()}
    assert len(grown) == 5
    assert min(slope for name, slope in grown.items() if name != "reconstruction") > 1.0, grown
    assert grown["reconstruction"] > 0.25, grown
    assert max(kept.values()) < 0.15, kept
    assert min(slope for name, slope in kept.items() if "scores" not in name) > -0.3, kept
    for name, forms in check["quantities"].items():
        assert forms["standard"][0][0] == forms["mup"][0][0], f"{name}: the base is the same in both forms"
        assert len(forms["mup"]) == 5


def test_packing_is_left_out_of_it() -> None:
    """The brain fills the box there, so that every token is computed anyway."""
    packed, whole = (check_coordinates(small(packing=kind), (36, 72), steps=1, seeds=1) for kind in ("template", "none"))
    assert packed == whole


@pytest.mark.parametrize(("lr", "says"), [(-1.0, "give a learning rate above 0"), (1e30, "training diverges")])
def test_rates_that_tell_nothing_are_refused(lr: float, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_coordinates(small(), (36, 72), steps=2, lr=lr, seeds=1)


def test_widths_that_tell_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="at least two, ascending"):
        check_coordinates(small(), [36])
    with pytest.raises(UsageError, match="not divisible by 6 heads"):
        check_coordinates(small(), [36, 70])
