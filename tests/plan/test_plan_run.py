"""`swiftv2 plan` for a run on a machine: text, JSON, what does not fit, errors."""

import json
from typing import Any

import pytest

from swiftv2.cli import main
from swiftv2.config.engine import EngineConfig
from swiftv2.config.load import presets_root
from swiftv2.plan.run import at_stage

DEMO = str(presets_root() / "pretrain" / "demo.yaml")
SMALL = ["data.store=none.zarr", "model.depths=[1,1]", "train.global_batch=16", "train.micro_batch=2", "engine.precision=bf16"]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", DEMO, "--nodes", "1", "--gpu", "a100-40", "--json", *SMALL, *words]) == 0
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    return tree


@pytest.mark.slow
def test_a_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "--tokens", "1e9")
    assert plan["fits"] is True
    assert plan["remedies"] == []
    assert (plan["ranks"], plan["micro_batch"], plan["accumulation"]) == (4, 2, 2)
    assert set(plan["stages"]) == {"0", "1", "2"}
    kinds = ("weights", "gradients", "optimizer", "activations", "buckets", "other", "reserve")
    for memory in [plan["memory"], *(stage["memory"] for stage in plan["stages"].values())]:
        assert memory["total"] == sum(memory[kind] for kind in kinds)
        assert all(memory["most"][kind] >= memory[kind] for kind in kinds[:-1])
    assert plan["memory"]["total"] == plan["stages"]["2"]["memory"]["total"]
    parameters = plan["encoder_parameters"] + plan["decoder_parameters"]
    sent = {name: stage["sent_bytes"] for name, stage in plan["stages"].items()}
    assert plan["stages"]["2"]["gradient_bytes"] == 2 * plan["stages"]["1"]["gradient_bytes"]
    assert plan["stages"]["1"]["gradient_bytes"] == pytest.approx(4 * parameters, rel=0.01)
    assert sent["0"] < sent["1"] < sent["2"]
    flops = plan["computed_flops_per_clip"]
    assert flops["total"] == flops["encoder"] + flops["decoder"] <= plan["forward_flops_per_clip"]["total"]
    likely, slow, fast = (plan["points"][name] for name in ("likely", "slow", "fast"))
    assert slow["clips_per_second"] <= likely["clips_per_second"] <= fast["clips_per_second"]
    assert 0 < likely["mfu"] <= plan["assumed_mfu"] == 0.35
    budget = plan["budget"]
    assert budget["tokens"] == pytest.approx(1e9, rel=0.01)
    assert budget["clips"] == budget["steps"] * 16
    assert budget["node_hours_likely"] == pytest.approx(24 * budget["days_likely"])
    assert budget["days_likely"] == pytest.approx(budget["clips"] / likely["clips_per_second"] / 86400)
    assert plan["weak"][0]["efficiency"] == pytest.approx(1)
    assert all(point["global_batch"] == 16 for point in plan["strong"])


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.global_batch=8192", "train.micro_batch=2048"]
    plan = planned(capsys, *words)
    assert plan["fits"] is False
    assert plan["memory"]["short_by_bytes"] > 0
    assert any(word.startswith("train.micro_batch=") for word in plan["remedies"])
    smaller = next(word for word in plan["remedies"] if word.startswith("train.micro_batch="))
    assert planned(capsys, "train.global_batch=8192", smaller)["fits"] is True
    assert main(["plan", DEMO, "--nodes", "1", "--gpu", "a100-40", *SMALL, *words]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert smaller in text


def test_a_run_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEMO, "--nodes", "2", "--gpu", "a100-80", "--mfu", "0.2", *SMALL]) == 0
    text = capsys.readouterr().out
    for said in (
        "FITS",
        "assumed 20%",
        "ZeRO 1",
        "nothing partitioned (plain)",
        "Weak scaling",
        "Strong scaling",
        "node-hours",
    ):
        assert said in text, said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "1", "--gpu", "b300"], "a100-40"),
        (["--nodes", "3", "--gpu", "a100-40"], "cannot be split over 12 ranks"),
        (["--nodes", "0", "--gpu", "a100-40"], "1 to 1536 nodes"),
        (["--nodes", "2000", "--gpu", "a100-40"], "1 to 1536 nodes"),
        (["--nodes", "1", "--gpu", "h200", "--mfu", "35"], "no share of the peak"),
        (["--nodes", "1", "--gpu", "h200", "--tokens", "-1"], "positive"),
        (["--nodes", "1"], "both --nodes N and --gpu NAME"),
        (["--gpu", "h200"], "both --nodes N and --gpu NAME"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", DEMO, *words, *SMALL]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert told.out == ""


def test_a_model_alone_is_planned_without_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--nodes", "1", "--gpu", "h200"]) == 2
    assert "instead of --model" in capsys.readouterr().err


def test_stage_0_is_the_plain_backend_where_deepspeed_cannot_sum() -> None:
    mixed, full = EngineConfig(), EngineConfig(precision="fp32")
    assert at_stage(mixed, 0).backend == "plain"
    assert at_stage(full, 0).backend == "deepspeed"
    assert at_stage(EngineConfig(backend="plain"), 2).backend == "deepspeed"
