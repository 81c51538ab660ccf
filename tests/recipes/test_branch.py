"""muP, trunks and branches on real BOLD, by real processes."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import swiftv2_run

from swiftv2 import weights
from swiftv2.cli import main
from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine.checkpoint import read_weights
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import SwiftError
from swiftv2.recipes.data import open_data
from swiftv2.recipes.exclusions import write_exclusions
from swiftv2.records import EVENTS, read_lines, read_metrics

CONFIG = """
data:
  normalisation: {kind: per_voxel}
  split: {fractions: [0.5, 0.5, 0.0]}
clip: {frames: 8, stride_between: 0.5}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 16
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
  parametrisation: mup
  base_embed_dim: 4
mask: {patch_size: [2, 3, 2, 2]}
optimizer: {lr: 4e-3}
schedule: {kind: constant, warmup_steps: 2}
engine: {precision: fp32, device: cpu}
train: {max_steps: 8, global_batch: 4, save_every: 100, keep_last: 1, save_minutes: 0, evaluate_every: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def words(config: Path, store: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", str(config), f"data.store={store}", f"run.dir={run}", *more]


def pretrain(config: Path, store: Path, run: Path, *more: str, ranks: int = 1) -> list[float]:
    """The losses of its steps."""
    done = swiftv2_run(words(config, store, run, *more), ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["unified", "decoupled"])
def test_mup_trains_the_same_under_zero_and_travels_with_the_weights(
    config: Path, real_store: Path, tmp_path: Path, family: str
) -> None:
    more: Sequence[str] = ()
    if family == "decoupled":
        more = ("model.variant=decoupled", "model.embed_dim=32", "model.base_embed_dim=16", "model.decoder.kind=factorized")
    plain = pretrain(config, real_store, tmp_path / "plain", "engine.backend=plain", *more)
    zero = pretrain(config, real_store, tmp_path / "zero", "train.micro_batch=1", *more, ranks=2)
    np.testing.assert_allclose(zero, plain, rtol=1e-5)
    standard = [word for word in more if "base_embed_dim" not in word]
    other = pretrain(
        config, real_store, tmp_path / "standard", "model.parametrisation=standard", "model.base_embed_dim=36", *standard
    )
    assert np.abs(np.array(other) / plain - 1).max() > 1e-3, "the multipliers change nothing"

    exported = tmp_path / "weights"
    assert main(["checkpoint", "export", str(tmp_path / "zero"), str(exported)]) == 0
    card = weights.read_card(exported)
    assert card.mup is not None
    assert card.mup["readout_multiplier"] == (0.5 if family == "decoupled" else 0.25)
    model = weights.load_simmim(exported).eval()
    state = {name.removeprefix("simmim."): value for name, value in read_weights(tmp_path / "zero/checkpoints/step_8").items()}
    batch = torch.randn(1, 1, 10, 18, 10, 8), torch.rand(1, 5, 6, 5, 4) < 0.5, torch.ones(1, 10, 18, 10) > 0
    with torch.no_grad():
        loaded = model(*batch).reconstruction
        model.load_state_dict(state)
        assert torch.equal(loaded, model(*batch).reconstruction)

    path = exported / weights.CARD
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"mup": None}))
    with pytest.raises(SwiftError, match="muP multipliers are not those of its model"):
        weights.load_encoder(exported)


@pytest.mark.slow
def test_a_branch_is_what_the_trunk_would_have_been(config: Path, real_store: Path, tmp_path: Path) -> None:
    """Bit for bit: the same steps where the schedule is the same, on another number of steps, a cooldown at its end."""
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    whole = pretrain(config, real_store, trunk, "train.keep_steps=[3]", "train.max_steps=12")
    kept = {int(path.name.removeprefix("step_")) for path in (trunk / "checkpoints").glob("step_*")}
    assert 3 in kept
    origin = (f"run.branch_from={trunk}", "run.branch_step=3")
    followed = pretrain(config, real_store, branch, *origin, "schedule.cooldown_steps=3", "train.max_steps=8")
    rows = read_metrics(branch / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 5, 6, 7, 8]
    assert followed[:2] == whole[3:5], "until the cooldown begins it is the trunk"
    assert followed[4] != whole[7]
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, [4e-3, 4e-3, 4e-3 * 2 / 3, 4e-3 / 3, 0.0], atol=1e-12)
    (event,) = (row for row in read_lines(branch / EVENTS) if row["event"] == "branched")
    assert event["step"] == 3
    assert (
        json.loads((branch / "contract.json").read_text())["splits"]
        == (json.loads((trunk / "contract.json").read_text())["splits"])
    )

    # Once begun it is a run like any other: the trunk may go.
    trunk.rename(tmp_path / "gone")
    assert pretrain(config, real_store, branch, *origin, "schedule.cooldown_steps=3", "train.max_steps=9")[:5] == followed


@pytest.mark.slow
def test_branches_that_cannot_be_are_one_line(
    config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = tmp_path / "trunk"
    pretrain(config, real_store, trunk, "train.max_steps=2", "train.evaluate_every=2")
    begin = (f"run.branch_from={trunk}", "run.branch_step=2")
    cases = {
        "is no run directory that has begun": (f"run.branch_from={tmp_path / 'nothing'}", "run.branch_step=2"),
        "has no whole checkpoint of this step (it has": (f"run.branch_from={trunk}", "run.branch_step=1"),
        "was made with model.embed_dim=16, not 8": (*begin, "model.embed_dim=8"),
        "was made with train.global_batch=4, not 2": (*begin, "train.global_batch=2"),
        "was made with run.seed=0, not 1": (*begin, "run.seed=1"),
        "go together": (f"run.branch_from={trunk}",),
        "leaves nothing to do": (f"run.branch_from={trunk}", "run.branch_step=8"),
        "was made with data.exclude=None, not": (*begin, f"data.exclude={trunk / 'exclusions.json'}"),
    }
    for said, more in cases.items():
        run = tmp_path / "refused"
        assert main(words(config, real_store, run, *more)) == 2, said
        error = capsys.readouterr().err
        assert said in error
        assert len(error.strip().splitlines()) == 1
        assert not run.exists()


@pytest.mark.slow
def test_a_trunk_may_be_asked_to_keep_more_and_a_branch_leaves_out_what_it_left_out(
    config: Path, real_store: Path, tmp_path: Path
) -> None:
    trunk, branch, asked = tmp_path / "trunk", tmp_path / "branch", tmp_path / "asked.json"
    plain = "engine.backend=plain"
    data = open_data(load(PretrainConfig, config, words(config, real_store, trunk)[2:]))
    write_exclusions(asked, data, [Exclusion(clip, 0, "rewound") for clip in range(4)])
    pretrain(config, real_store, trunk, plain, f"data.exclude={asked}", "train.max_steps=2", "train.keep_steps=[1]")
    more = ("train.max_steps=6", "train.keep_steps=[1,4]")
    whole = pretrain(config, real_store, trunk, plain, f"data.exclude={asked}", *more)
    assert (trunk / "checkpoints/step_4").is_dir()
    asked.unlink()
    origin = (f"run.branch_from={trunk}", "run.branch_step=4", f"data.exclude={asked}")
    assert pretrain(config, real_store, branch, plain, *origin, "train.max_steps=6") == whole[4:]
    kept = json.loads((branch / "exclusions.json").read_text())["exclusions"]
    assert [(one["clip"], one["cause"]) for one in kept] == [(clip, "asked") for clip in range(4)]


def test_a_step_that_is_never_reached_cannot_be_kept(
    config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(config, real_store, tmp_path / "run", "train.keep_steps=[9]")) == 2
    assert "step 9 is never reached with train.max_steps=8" in capsys.readouterr().err
