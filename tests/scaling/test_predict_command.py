"""`swiftv2 sweep predict` from a fitted table to a configuration that loads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_laws import noisy

from swiftv2.cli import main
from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.plan import plan_model
from swiftv2.recipes.sizing import Family

WORDS = ("data.store=none.zarr", "model.image_size=[24,24,24]", "model.depths=[1,1]", "model.num_heads=[6,12]")
MUP = ("model.parametrisation=mup", "model.base_embed_dim=12")


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fits of tables of a known law: of the family by tokens and by FLOPs, and of sizes that it has not."""
    folder = tmp_path_factory.mktemp("laws")
    family = Family(load(PretrainConfig, find_preset("pretrain", "demo"), WORDS))
    widths, tokens = np.repeat([12, 24, 36, 48], 3), np.tile([1e7, 4e7, 1.6e8], 4)
    parameters = np.array([family.holdings(int(width)).parameters for width in widths])
    for name, sizes in (("family", parameters), ("foreign", 17 * parameters)):
        losses = noisy(0.18 + 8 * sizes**-0.28 + 600 * tokens**-0.4, 0.003)
        flops = tokens * family.clip_flops(widths) / family.clip_tokens
        rows = [f"{n},{d},{c},{x}" for n, d, c, x in zip(sizes, tokens, flops, losses, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["parameters,tokens,flops,loss", *rows]), encoding="utf-8")
    for name, table, columns in (
        ("family", "family", ("--tokens", "tokens", "--compute", "flops")),
        ("derived", "family", ("--flops", "flops")),
        ("foreign", "foreign", ("--tokens", "tokens")),
    ):
        words = ["--bootstraps", "200", "--out", str(folder / name)]
        assert main(["sweep", "fit", str(folder / f"{table}.csv"), *columns, *words]) == 0
    return folder


def predicted(capsys: pytest.CaptureFixture[str], fit: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["sweep", "predict", str(fit / "fit.json"), "--base", "demo", "--json", *words, *WORDS]) == 0

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    tree: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    return tree


def test_the_next_run_of_a_family(capsys: pytest.CaptureFixture[str], laws: Path, tmp_path: Path) -> None:
    out = tmp_path / "next"
    tree = predicted(capsys, laws / "family", "--budget", "1e15", "--out", str(out), "--lr", "2e-3", *MUP)
    assert json.loads((out / "prediction.json").read_text(encoding="utf-8")) == tree
    config = load(PretrainConfig, Path(tree["config"]))
    plan, run = plan_model(config.model), tree["run"]
    assert plan.encoder_parameters == run["parameters"] == pytest.approx(tree["parameters"], rel=0.06)
    assert (plan.model, config.model.embed_dim, config.optimizer.lr) == (tree["size"], tree["embed_dim"], 2e-3)
    assert config.model.parametrisation == "mup"
    step = config.train.global_batch * 4 * 4 * 4 * 10
    assert run["tokens"] == run["patches"] == config.train.max_steps * step
    exact = 1e15 / (3 * plan.forward_flops_per_clip["total"]) * 640
    assert abs(run["tokens"] - exact) <= step
    assert tree["flops_by_stage"]["total"] == run["flops"] == pytest.approx(1e15, rel=0.01)
    parts = ("patch_embed", "stage_1", "stage_2", "decoder")
    assert sum(tree["flops_by_stage"][part] for part in parts) == tree["flops_by_stage"]["total"]
    assert tree["budget"] == {"flops": 1e15, "node_hours": None}
    for name in ("parameters", "tokens", "loss"):
        assert tree[f"{name}_interval"][0] <= tree[name] <= tree[f"{name}_interval"][1]
    assert 0 <= run["loss_given_up"] < 1e-3
    assert tree["extrapolation"]["verdict"] == "near"
    assert (tree["nodes"], tree["hours"], tree["machine"]) == (None, None, None)
    assert main(["plan", tree["config"]]) == 0


def test_flops_by_stages_and_by_k_n_d_advise_different_runs(capsys: pytest.CaptureFixture[str], laws: Path) -> None:
    stages = predicted(capsys, laws / "family", "--budget", "1e15")
    plain = predicted(capsys, laws / "family", "--budget", "1e15", "--cost", "knd")
    assert stages["cost"] == "stages of demo"
    assert not any("does not hold for hierarchical models" in text for text in stages["warnings"])
    assert any("does not hold for hierarchical models" in text for text in plain["warnings"])
    k = json.loads((laws / "family" / "fit.json").read_text(encoding="utf-8"))["flops_per_parameter_token"]["value"]
    assert plain["parameters"] * plain["tokens"] * k == pytest.approx(1e15)


def test_tokens_that_were_derived_from_flops_keep_the_budget(capsys: pytest.CaptureFixture[str], laws: Path) -> None:
    tree = predicted(capsys, laws / "derived", "--budget", "1e15", "--beyond")
    assert tree["cost"] == "6 N D"
    assert 6 * tree["parameters"] * tree["tokens"] == pytest.approx(1e15)
    assert tree["run"]["flops"] == pytest.approx(1e15, rel=0.01)
    assert tree["run"]["tokens"] == pytest.approx(1e15 / 6 / tree["run"]["parameters"], rel=0.01)


def test_a_law_of_other_sizes_says_so(capsys: pytest.CaptureFixture[str], laws: Path) -> None:
    tree = predicted(capsys, laws / "foreign", "--budget", "1e15")
    assert tree["cost"] == "6 N D"
    assert any("none of the family of --base demo" in text for text in tree["warnings"])
    assert any("by stages the run takes" in text for text in tree["warnings"])


def test_the_loss_of_a_run_that_is_named(capsys: pytest.CaptureFixture[str], laws: Path) -> None:
    words = ("--parameters", "4e5", "--tokens", "3e8", "--unique", "2e7")
    tree = predicted(capsys, laws / "family", *words)
    truth = 0.18 + 8 * 4e5**-0.28 + 600 * 3e8**-0.4
    assert (tree["parameters"], tree["tokens"]) == (4e5, 3e8)
    assert tree["loss"] == pytest.approx(truth, rel=0.02)
    assert tree["loss_interval"][0] <= truth <= tree["loss_interval"][1]
    assert (tree["parameters_interval"], tree["tokens_interval"]) == (None, None)
    assert tree["run"]["epochs"] == pytest.approx(15, rel=0.01)
    assert any("15.0 passes over 2e+07 unique tokens" in text for text in tree["warnings"])


@pytest.mark.slow
def test_nodes_and_hours_are_a_budget(capsys: pytest.CaptureFixture[str], laws: Path, tmp_path: Path) -> None:
    where = ("--machine", "a100-40", "--nodes", "2", "--hours", "0.002", "--mfu", "0.01")
    words = ("train.global_batch=32", "train.micro_batch=4", "engine.precision=bf16", "--out", str(tmp_path))
    tree = predicted(capsys, laws / "family", *where, *words, "--beyond")
    assert (tree["machine"], tree["nodes"], tree["mfu_assumed"]) == ("perlmutter-a100-40", 2, 0.01)
    assert tree["hours"] == pytest.approx(0.002, rel=0.02)
    assert tree["hours"] <= 0.002
    assert tree["hours_interval"][0] <= tree["hours"] <= tree["hours_interval"][1]
    assert tree["budget"]["node_hours"] == pytest.approx(2 * tree["hours"])
    assert tree["run"]["flops"] == pytest.approx(tree["budget"]["flops"], rel=0.02)
    assert tree["embed_dim"] % 6 == 0
    assert load(PretrainConfig, Path(tree["config"])).train.micro_batch == 4


def test_what_is_printed_says_what_it_rests_on(capsys: pytest.CaptureFixture[str], laws: Path) -> None:
    assert main(["sweep", "predict", str(laws / "family" / "fit.json"), "--base", "demo", "--budget", "1e15", *WORDS]) == 0
    text = capsys.readouterr().out
    for said in ("1e+15 FLOPs (stages of demo)", "near", "intervals of 90%", "embed_dim", "given up", "warning: lr 0.003"):
        assert said in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no budget"),
        (("--budget", "0"), "--budget 0: give a positive number"),
        (("--budget", "nan"), "--budget nan"),
        (("--budget", "much"), "--budget"),
        (("--budget", "1e19"), "--beyond tells it all the same"),
        (("--budget", "1e15", "--nodes", "4"), "give --machine NAME"),
        (("--budget", "1e15", "--machine", "laptop"), "no machine is named 'laptop'; there are perlmutter-a100-40"),
        (("--budget", "1e15", "--nodes", "2", "--hours", "3", "--machine", "h200"), "a budget of their own"),
        (("--nodes", "2", "--hours", "-3", "--machine", "h200"), "--hours -3: give a positive number"),
        (("--parameters", "1e6"), "give both --parameters N and --tokens D"),
        (("--parameters", "1e6", "--tokens", "1e6", "--budget", "1e15"), "not both"),
        (("--budget", "1e15", "--mfu", "3"), "no share of the peak"),
        (("--budget", "1e15", "--base", "9M"), "preset named '9M'"),
        (("--budget", "1e15", "model.embed_dimm=3"), "embed_dimm"),
        (("--budget", "1e15", "--machine", "h200", "--nodes", "3", "--beyond"), "cannot be split over 24 ranks"),
        (("--budget", "5e8"), "fewer than 10"),
    ],
)
def test_one_line_and_nothing_written(
    capsys: pytest.CaptureFixture[str], laws: Path, tmp_path: Path, words: Sequence[str], said: str
) -> None:
    out = tmp_path / "out"
    base = [] if "--base" in words else ["--base", "demo"]
    assert main(["sweep", "predict", str(laws / "family" / "fit.json"), "--out", str(out), *base, *words, *WORDS]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not out.exists()


def test_stages_are_not_counted_for_tokens_that_were_not(capsys: pytest.CaptureFixture[str], laws: Path) -> None:
    words = ["--budget", "1e15", "--cost", "stages", "--base", "demo"]
    assert main(["sweep", "predict", str(laws / "derived" / "fit.json"), *words, *WORDS]) == 2
    assert "fit with --tokens" in capsys.readouterr().err
