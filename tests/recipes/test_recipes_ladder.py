"""What a ladder costs before it runs, and the table of what has run: real runs on real BOLD."""

import csv
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from swiftv2.config.data import GridConfig
from swiftv2.config.ladder import LadderConfig
from swiftv2.config.load import build, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes.build import build as build_store
from swiftv2.data.samples.masks import brain_cells
from swiftv2.data.store.reader import Store
from swiftv2.data.synth import generate
from swiftv2.errors import SwiftError, UsageError
from swiftv2.models.flops import forward_flops
from swiftv2.plan.model import plan_model
from swiftv2.recipes.collect import Row, collect, write_table
from swiftv2.recipes.ladder import LadderPlan, Line, Pace, plan_ladder
from swiftv2.recipes.planning import plan
from swiftv2.recipes.pretrain import pretrain
from swiftv2.records import read_metrics

CONFIG = """
run: {dir: unused}
data: {normalisation: {kind: per_voxel}, split: {fractions: [0.5, 0.5, 0.0]}}
clip: {frames: 8, stride_between: 0.5}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 8
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
mask: {patch_size: [2, 3, 2, 2]}
engine: {backend: plain, precision: fp32, device: cpu}
train: {max_steps: 1, global_batch: 2, save_every: 100, evaluate_every: 100, save_minutes: 0}
"""
CLIP_TOKENS = 5 * 6 * 5 * 4
STEP_TOKENS = 2 * CLIP_TOKENS


@pytest.fixture(scope="module")
def folder(real_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ladder")
    (made / "tiny.yaml").write_text(CONFIG + f"# {real_store}\n", encoding="utf-8")
    return made


def ladder(folder: Path, store: Path | str, **values: Any) -> LadderConfig:
    tree = {
        "config": str(folder / "tiny.yaml"),
        "folder": str(folder / "runs"),
        "common": [f"data.store={store}"],
        "sizes": [{"name": "w8", "set": ["model.embed_dim=8"]}, {"name": "w16", "set": ["model.embed_dim=16"]}],
        "budgets": {"tokens": [4 * STEP_TOKENS], "least_steps": 2},
        "learning_rate": {"rule": "fixed", "rate": 1e-3},
        "schedule": {"warmup": 0.0},
    }
    return build(LadderConfig, tree | values, "x.yaml")


def by_name(made: LadderPlan) -> dict[str, Line]:
    return {line.name: line for line in made.lines}


# Before anything runs


def test_a_plan_counts_parameters_tokens_and_flops_stage_by_stage(folder: Path, real_store: Path) -> None:
    made = ladder(folder, real_store, schedule={"kind": "trunk", "warmup": 0.0, "cooldown": 0.5})
    found = plan_ladder(made, (), Pace(flops_per_second=1e9))
    line, trunk = by_name(found)["w16-t_4800"], by_name(found)["w16-trunk"]
    config = load(PretrainConfig, folder / "tiny.yaml", ["model.embed_dim=16", f"data.store={real_store}"])
    model = plan_model(config.model)
    assert (line.parameters, line.decoder_parameters) == (model.encoder_parameters, model.decoder_parameters)
    a_clip = 3 * sum(forward_flops(config.model)[part] for part in ("patch_embed", "stage_1", "stage_2", "decoder"))
    assert (line.steps, line.flops, line.tokens) == (4, 8 * a_clip, 8 * CLIP_TOKENS)
    store = Store.open(real_store)
    places = int(brain_cells(store.voxels, (10, 18, 10), (2, 3, 2, 2)).sum())
    assert line.brain_tokens == 8 * places * 4
    # A branch costs its cooldown alone, and the trunk stops where the last branch leaves it.
    assert (trunk.own_steps, line.own_steps) == (2, 2)
    assert line.own_flops == trunk.own_flops == 4 * a_clip
    assert line.hours == pytest.approx(4 * a_clip / 1e9 / 3600)
    assert found.node_hours == pytest.approx(sum(one.own_flops for one in found.lines) / 1e9 / 3600)


@pytest.mark.slow
def test_brain_tokens_are_those_of_patches_that_the_store_keeps(folder: Path, tmp_path: Path) -> None:
    generate(SynthConfig(subjects=8, voxel_mm=6, frames=20, session_share=0.0), tmp_path / "bids")
    build_store(tmp_path / "bids", tmp_path / "cohort.zarr", GridConfig(voxel_mm=6), "a", salt="0" * 32)
    words = ["model.image_size=[32, 32, 32]", "model.patch_size=[4, 4, 4, 2]", "mask.patch_size=[4, 4, 4, 2]"]
    words += ["data.allow_mixed_tr=true"]
    counted = {"count": "brain", "tokens": [1e5], "least_steps": 2}
    line = plan_ladder(ladder(folder, tmp_path / "cohort.zarr", budgets=counted), words).lines[0]
    store = Store.open(tmp_path / "cohort.zarr")
    flat = np.zeros(32**3, dtype=bool)
    flat[store.voxels] = True
    held = sum(bool(block.any()) for block in _blocks(flat.reshape(32, 32, 32), 4))
    assert 50 < held < 8**3
    # Two clips a step, four patches of two frames in a clip.
    assert line.brain_tokens == line.steps * 2 * held * 4
    assert line.steps == round(1e5 / (2 * held * 4))
    assert line.tokens == line.steps * 2 * 8**3 * 4


def _blocks(grid: NDArray[np.bool_], size: int) -> Iterator[NDArray[np.bool_]]:
    starts = range(0, len(grid), size)
    for x, y, z in itertools.product(starts, starts, starts):
        yield grid[x : x + size, y : y + size, z : z + size]


def test_frames_that_clips_share_count_once(folder: Path, real_store: Path) -> None:
    # One training run of 40 frames: the clips of 8 frames cover all of it, overlapping by half or not at all.
    halves, whole = (
        plan_ladder(ladder(folder, real_store), [f"clip.stride_between={stride}"]).lines[0] for stride in (0.5, 1.0)
    )
    assert halves.unique_tokens == whole.unique_tokens == 5 * CLIP_TOKENS
    assert whole.epochs == pytest.approx(8 / 5)
    shorter = plan_ladder(ladder(folder, real_store), ["data.frames_per_run=16"]).lines[0]
    assert shorter.unique_tokens == 2 * CLIP_TOKENS


def test_data_that_are_gone_over_too_often_are_told(folder: Path, real_store: Path) -> None:
    assert plan_ladder(ladder(folder, real_store)).warnings == ()
    (line,) = plan_ladder(ladder(folder, real_store, budgets={"tokens": [12 * STEP_TOKENS], "least_steps": 2})).warnings
    assert line.startswith("2 elements go over their data more than 4 times (w8-t_14400 4.8")


def test_without_a_store_all_tokens_are_planned_and_brain_tokens_are_not(folder: Path) -> None:
    line = plan_ladder(ladder(folder, folder / "none.zarr")).lines[0]
    assert (line.tokens, line.brain_tokens, line.unique_tokens, line.hours) == (8 * CLIP_TOKENS, None, None, None)
    brain = {"count": "brain", "tokens": [4 * STEP_TOKENS], "least_steps": 2}
    with pytest.raises(UsageError, match="needs the store's masks"):
        plan_ladder(ladder(folder, folder / "none.zarr", budgets=brain))


@pytest.mark.slow
def test_hours_are_those_of_the_planner(folder: Path, real_store: Path) -> None:
    words = ["train.global_batch=8", "engine.precision=bf16", "engine.backend=deepspeed"]
    made = plan_ladder(ladder(folder, real_store, budgets={"tokens": [1e6]}), words, Pace(gpu="a100-80", mfu=0.2))
    line = by_name(made)["w16-t_1e6"]
    every = [*words, "model.embed_dim=16", f"data.store={real_store}", f"train.max_steps={line.steps}"]
    told = plan(load(PretrainConfig, folder / "tiny.yaml", every), nodes=1, gpu="a100-80", mfu=0.2).budget
    # The planner counts the products that are really done, padding of windows left out where there is none to do.
    assert line.node_hours == pytest.approx(told["node_hours_likely"], rel=0.15)


@pytest.mark.parametrize(
    ("words", "pace", "says"),
    [
        (["train.max_steps=9"], Pace(), "train.max_steps is made by the ladder"),
        (["mask.rato=1"], Pace(), "w8: .*unknown key mask.rato"),
        ([], Pace(flops_per_second=-1.0), "--flops-per-second -1"),
        ([], Pace(gpu="a1000"), "no gpu is named 'a1000'"),
        ([], Pace(mfu=2.0), "--mfu 2"),
    ],
)
def test_what_is_wrong_is_refused(folder: Path, real_store: Path, words: list[str], pace: Pace, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan_ladder(ladder(folder, real_store), words, pace)


# What has run


@pytest.fixture(scope="module")
def trained(folder: Path, real_store: Path) -> LadderConfig:
    """A ladder of which the runs of one size are finished: a trunk and its two branches; of the other nothing has begun."""
    budgets = {"tokens": [8 * STEP_TOKENS, 12 * STEP_TOKENS], "least_steps": 2}
    made = ladder(folder, real_store, budgets=budgets, schedule={"kind": "trunk", "warmup": 0.0, "cooldown": 0.25})
    sweep = made.sweep(plan_ladder(made).rungs)
    for index in range(3):
        result = pretrain(load(PretrainConfig, folder / "tiny.yaml", sweep.words(index)))
        assert not result.stopped_early
    return made


def test_the_table_holds_the_finished_runs_and_names_the_others(trained: LadderConfig, tmp_path: Path) -> None:
    made = collect(trained.outline(), trained.trunks())
    assert [row.name for row in made.rows] == ["w8-t_9600", "w8-t_14400"]
    assert made.left_out["w8-trunk"] == "it is the trunk of others, without a cooldown"
    assert made.left_out["w16-t_9600"] == "it was not begun"
    lines = by_name(plan_ladder(trained))
    for row in made.rows:
        line = lines[row.name]
        assert line.done
        for name in ("parameters", "decoder_parameters", "tokens", "brain_tokens", "unique_tokens", "flops", "steps"):
            assert getattr(row, name) == getattr(line, name), name
        metrics = read_metrics(trained.folder / row.name / "metrics.jsonl")
        assert row.loss == metrics[-1]["heldout/all/l1/model"] == pytest.approx(metrics[-1]["heldout/loss"], rel=1e-5)
        assert row.baseline_loss == min(v for k, v in metrics[-1].items() if "/all/l1/" in k and not k.endswith("/model"))
        last = {8: (8,), 12: (11, 12)}[row.steps]
        assert row.train_loss == pytest.approx(statistics.fmean(one["loss"] for one in metrics if one["step"] in last))
        assert (row.size, row.embed_dim, row.schedule, row.lr, row.subjects) == ("w8", 8, "cooldown", 1e-3, 1)
        assert row.seconds > 0
        assert row.node_hours == pytest.approx(row.seconds / 3600)
    paths = write_table(made, tmp_path / "out", "x.yaml")
    with paths[0].open(newline="") as file:
        read = list(csv.DictReader(file))
    content = json.loads(paths[1].read_text())
    assert [{key: str(value) for key, value in row.items()} for row in content["rows"]] == read
    assert list(read[0]) == content["columns"] == list(Row.__dataclass_fields__)


def test_costs_rest_on_finished_runs_where_there_are_some(trained: LadderConfig) -> None:
    found = plan_ladder(trained)
    line = by_name(found)["w16-t_14400"]
    assert line.basis is not None
    assert "measured on finished runs of w8" in line.basis
    assert found.node_hours == pytest.approx(sum(one.node_hours or 0.0 for one in found.lines if one.size == "w16"))
    speeds = []
    for name in ("w8-trunk", "w8-t_9600", "w8-t_14400"):
        rows = read_metrics(trained.folder / name / "metrics.jsonl")
        speeds.append(statistics.median(row["clips_per_second"] for row in rows))
    own = by_name(found)["w8-trunk"]
    assert own.hours == pytest.approx(own.own_steps * 2 / statistics.median(speeds) / 3600)
    given = plan_ladder(trained, (), Pace(flops_per_second=1e9))
    assert {one.basis for one in given.lines} == {"1e+09 FLOP/s a node, as given"}


def test_rows_are_taken_by_what_they_hold(trained: LadderConfig, tmp_path: Path) -> None:
    made = collect(trained.outline(), trained.trunks(), {"steps": "12"})
    assert [row.steps for row in made.rows] == [12]
    assert made.left_out["w8-t_9600"] == "its steps is 8"
    with pytest.raises(UsageError, match="--where widht: the table has no such column"):
        collect(trained.outline(), trained.trunks(), {"widht": "8"})
    rate = made.rows[0].lr
    assert len(collect(trained.outline(), trained.trunks(), {"lr": f"{rate:e}", "parametrisation": "standard"}).rows) == 2
    nothing = collect(trained.outline(), trained.trunks(), {"steps": "13"})
    with pytest.raises(SwiftError, match="no finished run to make a table of; w8-trunk is left out"):
        write_table(nothing, tmp_path / "out", "x.yaml")
    assert not (tmp_path / "out").exists()


def test_rows_of_different_tasks_are_told(trained: LadderConfig) -> None:
    settings = trained.folder / "w8-t_9600" / "config.yaml"
    text = settings.read_text()
    try:
        tree = yaml.safe_load(text)
        tree["mask"]["ratio"] = 0.75
        tree["schedule"]["kind"] = "cosine"
        settings.write_text(yaml.safe_dump(tree))
        warnings = collect(trained.outline(), trained.trunks()).warnings
    finally:
        settings.write_text(text)
    assert any(line.startswith("rows differ in mask.ratio: ") and "cannot be fitted together" in line for line in warnings)
    assert any(line.startswith("rows differ in schedule: cooldown, cosine; fit each by itself") for line in warnings)
    assert collect(trained.outline(), trained.trunks()).warnings == ()


def test_a_run_that_broke_off_or_has_no_finite_loss_has_no_row(trained: LadderConfig) -> None:
    run = trained.folder / "w8-t_14400"
    events, metrics = (run / "events.jsonl").read_text(), (run / "metrics.jsonl").read_text()
    try:
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"event": "start", "step": None, "attempt": 2, "time": 1.0}) + "\n")
            row = {"event": "failed", "step": 3, "attempt": 2, "time": 2.0, "error": "X", "problem": "disk full"}
            file.write(json.dumps(row) + "\n")
        assert collect(trained.outline()).left_out["w8-t_14400"] == "it failed at step 3: disk full"
        (run / "events.jsonl").write_text(events)
        rows = [json.loads(line) for line in metrics.splitlines()]
        rows[-1]["heldout/all/l1/model"] = None
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "it has no held-out loss at its last step, 12" in collect(trained.outline()).left_out["w8-t_14400"]
    finally:
        (run / "events.jsonl").write_text(events)
        (run / "metrics.jsonl").write_text(metrics)
    assert math.isfinite(collect(trained.outline(), trained.trunks()).rows[-1].loss)


def test_a_ladder_that_says_something_else_of_runs_that_began_is_refused(trained: LadderConfig) -> None:
    plan_ladder(trained)
    tree = trained.model_dump(mode="json", exclude_defaults=True)
    rate = tree["learning_rate"]["rate"]
    other = build(LadderConfig, tree | {"learning_rate": tree["learning_rate"] | {"rate": 3 * rate}}, "x.yaml")
    with pytest.raises(UsageError, match=rf"was begun with optimizer.lr={rate:g}, and the ladder now says {3 * rate:g}"):
        plan_ladder(other)
    with pytest.raises(UsageError, match=r"was begun with train.global_batch=2, and the ladder now says 4"):
        plan_ladder(trained, ["train.global_batch=4"])
