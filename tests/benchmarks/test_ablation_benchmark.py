"""The ablation compares what it says: the same clips and masks for all cases, costs that fall where work is left out."""

from pathlib import Path

import pytest
import torch
from ablation import interval
from ablation_cases import CASES, COARSE, SIZES, WORDS, Setup, configured, ratios, run_folder, time_in_turn, training_words
from ablation_scores import PAIRS

from swiftv2.recipes.baselines import Estimate


def test_every_case_is_a_run_that_can_be_configured(tmp_path: Path) -> None:
    words = {case: training_words(tmp_path, case, 1, 7) for case in CASES}
    configs = {case: configured(case, words[case]) for case in CASES}
    assert {config.run.seed for config in configs.values()} == {1}
    assert len({str(config.run.dir) for config in configs.values()}) == len(CASES)
    assert configs["visible"].objective == "visible_only"
    assert not configs["decoupled"].model.absolute_position
    same = [config.model_dump(include={"data", "clip", "mask", "loss", "train", "optimizer"}) for config in configs.values()]
    assert all(one == same[0] for one in same)
    assert run_folder(tmp_path, "visible, skip", 0).name == "visible-skip-0"
    assert CASES.keys() == WORDS.keys()
    assert {name for pair in PAIRS for name in pair} <= CASES.keys()


def test_all_cases_see_the_same_and_cost_what_they_compute() -> None:
    setups = {case: Setup.make(case, "demo") for case in ("dense", "packed", "visible")}
    first = setups["dense"]
    assert all(torch.equal(one.mask, first.mask) and torch.equal(one.volume, first.volume) for one in setups.values())
    encoders = [setup.flops()["encoder"] for setup in setups.values()]
    assert encoders[0] > encoders[1] > encoders[2]
    assert setups["visible"].parameters()[0] == first.parameters()[0]
    seconds = time_in_turn({"visible": setups["visible"]}, 1)
    assert len(seconds["visible"]) == 1
    assert seconds["visible"][0] > 0


def test_larger_mask_cells_leave_deeper_stages_fewer_tokens() -> None:
    small, large = (Setup.make(case, "demo").flops()["stage_2"] for case in ("visible", "visible, cells of 12"))
    assert small > 1.5 * large
    assert set(COARSE) < set(SIZES["51M"][1])


def test_how_numbers_are_told() -> None:
    assert ratios([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == (3.0, 2.0, 4.0)
    assert interval(Estimate(0.5, 0.25, 0.75)) == "0.5000 (0.2500 to 0.7500)"
    assert interval(Estimate(0.5, None, None)) == interval(None) == ""


@pytest.mark.parametrize("case", list(CASES))
def test_light_decoders_are_the_demos_alone(case: str) -> None:
    larger = configured(case, ("data.store=none", "run.dir=none"), "51M")
    assert larger.model.decoder.visible.width == 64
