"""What a study may say, and what it is refused for."""

from typing import Any

import pytest

from swiftv2.config.load import build, presets_root
from swiftv2.config.tune import TuneConfig, load_study
from swiftv2.errors import UsageError
from swiftv2.tuning.folder import finetune_config, read_base
from swiftv2.tuning.space import words

LR = {"kind": "float", "low": 1e-5, "high": 1e-2, "log": True}
TREE: dict[str, Any] = {"name": "study", "folder": "studies/one", "finetune": "full", "space": {"optimizer.lr": LR}}


def study(**values: Any) -> TuneConfig:
    return build(TuneConfig, {**TREE, **values}, "study.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in (presets_root() / "tune").glob("*.yaml")))
def test_presets_change_settings_that_there_are(name: str) -> None:
    config = load_study(name, ("set=[encoder.weights=weights]",))
    base = read_base(config)
    assert base["evaluate"]["test"] is False
    for key, parameter in config.space.items():
        ends = parameter.choices or (parameter.low, parameter.high)
        for value in (ends[0], ends[-1]):
            finetune_config(base, words({key: value}), "trial")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"storage": "sqlite:///study.db"}, "damaged on parallel file systems"),
        ({"storage": "study.log"}, "is no URL"),
        ({"set": ["run.dir=elsewhere"]}, "is the search's to say"),
        ({"set": ["evaluate.test=true"]}, "is the search's to say"),
        ({"space": {"evaluate.test": {"kind": "categorical", "choices": [True]}}}, "is the search's to say"),
        ({"space": {"task.split.index": {"kind": "int", "low": 0, "high": 9}}}, "cannot be compared"),
        ({"space": {"task": {"kind": "categorical", "choices": ["hcp_sex", "ukb_sex"]}}}, "cannot be compared"),
        ({"space": {"run.seed": {"kind": "int", "low": 0, "high": 9}}}, "cannot be compared"),
        ({"space": {"optimizer.lr": {"kind": "float", "low": 1.0, "high": 0.1}}}, "low must be below high"),
        ({"space": {"optimizer.lr": {"kind": "float", "low": 0.0, "high": 0.1, "log": True}}}, "low above 0"),
        ({"space": {"head.kind": {"kind": "categorical", "choices": ["mlp", "mlp"]}}}, "each once"),
        ({"space": {"head.hidden": {"kind": "int", "low": 8, "high": 64, "when": {"head.kind": "mlp"}}}}, "above head.hidden"),
        (
            {
                "space": {
                    "head.kind": {"kind": "categorical", "choices": ["linear", "mlp"]},
                    "head.hidden": {"kind": "int", "low": 8, "high": 64, "when": {"head.kind": "deep"}},
                }
            },
            "head.kind is never deep",
        ),
        ({"sampler": {"kind": "grid"}}, "takes choices, or a range with a step"),
        (
            {"sampler": {"kind": "grid"}, "space": {"head.dropout": {"kind": "float", "low": 0, "high": 0.5, "step": 0.25}}},
            "more than the 3 combinations",
        ),
    ],
)
def test_what_would_harm_a_study_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        study(**values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_is_drawn_where_those_above_have_its_values() -> None:
    config = study(
        space={
            "encoder.regime": {"kind": "categorical", "choices": ["full", "last_blocks", "lora"]},
            "encoder.fraction": {"kind": "float", "low": 0.1, "high": 0.9, "when": {"encoder.regime": "last_blocks"}},
            "encoder.layer_decay": {
                "kind": "float",
                "low": 0.5,
                "high": 1,
                "when": {"encoder.regime": ["full", "last_blocks"]},
            },
        }
    )
    drawn = {
        regime: [key for key in config.space if config.applies(key, {"encoder.regime": regime})]
        for regime in ("full", "last_blocks", "lora")
    }
    assert [len(keys) for keys in drawn.values()] == [2, 3, 1]
    assert "encoder.fraction" not in drawn["full"]
