"""The downstream benchmarks compare what they say: the same subjects, splits and settings, features that are what they are."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from downstream import Stages, difference
from downstream_attentive import Tokens, learn
from downstream_cohort import ATTENTIVE, METHODS, PROBES, REGIMES, STAGE, Bench, Size, pool_tokens
from downstream_haxby import FOLDS, build_store, events_of, task_tree, write_tree
from sklearn.metrics import roc_auc_score

from swiftv2.config.load import build
from swiftv2.config.task import TaskConfig
from swiftv2.errors import SwiftError
from swiftv2.recipes.feature_sets import clip_embeddings
from swiftv2.recipes.task import open_task

WITHIN_A_RUN = [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0]


def test_regimes_differ_in_what_learns_and_how_fast_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Size())
    for index in (0, 9):
        configs = {regime: bench.config(regime, index) for regime in REGIMES}
        same = [config.model_dump(include={"task", "head", "train", "augment", "evaluate"}) for config in configs.values()]
        assert all(one == same[0] for one in same)
        assert {config.encoder.regime for config in configs.values()} == set(REGIMES)
        assert all(config.task.split.index == index for config in configs.values())
        assert len({config.run.dir for config in configs.values()}) == len(REGIMES)
    assert {*REGIMES, *PROBES, *ATTENTIVE} <= METHODS.keys()


def test_pooled_tokens_are_means_and_deviations_over_the_tokens_that_count(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 2, 1, 1, 4, 5)).astype(np.float32)
    counted = np.array([[[[True]], [[True]]], [[[True]], [[False]]], [[[False]], [[True]]]])
    source = tmp_path / "tokens"
    source.mkdir()
    group = zarr.open_group(source / "tokens-00000.zarr", mode="w")
    group.create_array(f"stage{STAGE}", data=tokens)
    group.create_array(f"counted{STAGE}", data=counted)
    clips = {"subject": ["x", "x", "y"], "run": ["a", "a", "b"], "cohort": ["c"] * 3, "start": [0, 40, 0], "tr": [2.0] * 3}
    pd.DataFrame(clips).to_parquet(source / "clips-00000.parquet")
    card = {"stages": [{"stage": STAGE, "width": 5}], "format": "parquet", "pooling": "mean"}
    (source / "embeddings.json").write_text(json.dumps(card))
    pool_tokens(source, tmp_path / "pooled")
    found = clip_embeddings(tmp_path / "pooled")
    assert found.runs == ["a", "a", "b"]
    assert found.starts == [0, 40, 0]
    for clip in range(3):
        held = tokens[clip][counted[clip]].reshape(-1, 5)
        np.testing.assert_allclose(found.values[clip], np.concatenate([held.mean(0), held.std(0)]), atol=2e-6)
    with pytest.raises(ValueError, match="without brain"):
        Tokens.read(source, STAGE)


def test_an_attentive_readout_finds_what_no_mean_or_deviation_of_channels_holds() -> None:
    """Two channels vary together or against one another: their means and deviations are the same in both classes."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 600)
    tokens = rng.normal(size=(600, 20, 6)).astype(np.float32)
    tokens[:, :, 1] = np.where(truth[:, None] > 0, 1, -1) * tokens[:, :, 0] + 0.5 * tokens[:, :, 1]
    nothing = rng.integers(0, 2, 600)
    rows = {"train": np.arange(400), "val": np.arange(400, 500), "test": np.arange(500, 600)}
    both = torch.tensor(np.stack([truth, nothing], axis=1), dtype=torch.float32)
    said = learn(
        torch.from_numpy(tokens), rows, {part: both[own] for part, own in rows.items()}, torch.tensor([False, False]), 0
    )
    assert roc_auc_score(truth[500:], said["test"][:, 0]) > 0.95
    assert 0.35 < roc_auc_score(nothing[500:], said["test"][:, 1]) < 0.65


def test_stages_add_up_over_attempts_and_keep_what_failed(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    with pytest.raises(SwiftError), stages.timed("pretraining"):
        raise SwiftError("disk full")
    first = stages.seconds["pretraining"]
    again = Stages(tmp_path)
    with again.timed("pretraining"):
        pass
    assert again.seconds["pretraining"] >= first > 0
    assert any("pretraining" in line for line in again.lines())


def test_differences_are_bold_where_nothing_lies_outside_and_turn_round() -> None:
    found = {"mean": -0.2, "corrected_t": {"low": -0.3, "high": -0.1}}
    assert difference(found) == "**-0.200 (-0.300 to -0.100)**"
    assert difference(found, turned=True) == "**+0.200 (+0.100 to +0.300)**"
    assert difference({"mean": 0.1, "corrected_t": {"low": -0.1, "high": 0.3}}) == "+0.100 (-0.100 to +0.300)"
    assert difference(None) == "-"


def test_a_slice_becomes_runs_whose_clips_have_the_states_that_were_written_down(tmp_path: Path) -> None:
    runs = 12
    source = tmp_path / "slice"
    source.mkdir()
    state = np.tile(WITHIN_A_RUN, runs)
    run = np.repeat(np.arange(runs), len(WITHIN_A_RUN))
    rng = np.random.default_rng(0)
    bold = (1000 + rng.normal(size=(40, 20, 1, len(state))) * 20).astype(np.int16)
    affine = np.diag([-3.1, 3.75, 3.75, 1.0])
    image = nib.Nifti1Image(bold, affine)  # type: ignore[no-untyped-call]
    nib.save(image, source / "bold.nii.gz")
    mask = np.ones((40, 20, 1), dtype=np.uint8)
    nib.save(nib.Nifti1Image(mask, affine), source / "mask.nii.gz")  # type: ignore[no-untyped-call]
    np.savetxt(source / "attributes.txt", np.stack([state, run], axis=1), fmt="%d")
    assert list(events_of(np.array(WITHIN_A_RUN))) == [(5.0, 15.0, "category1"), (25.0, 15.0, "category2")]
    write_tree(source, tmp_path / "bids")
    build_store(tmp_path / "bids", tmp_path / "all.zarr")
    tested: list[str] = []
    for fold in range(FOLDS):
        data = open_task(build(TaskConfig, task_tree(tmp_path, fold), "task"))
        tested += data.splits.test
        assert not {*data.splits.train, *data.splits.val} & {*data.splits.test}
    assert sorted(tested) == sorted(run.key for run in data.store.runs)
    clips = data.cut("train")
    names = data.classes(data.config.targets[0])
    assert names == ("category1", "category2", "rest")
    # Two volumes later, and four of a kind: category 1 is seen from volume 4 on, so clips begin at 4, 5 and 6.
    starts: dict[str, set[int]] = {names[int(truth)]: set() for truth in clips.truth[:, 0]}
    for truth, start in zip(clips.truth[:, 0], clips.clips.start, strict=True):
        starts[names[int(truth)]].add(int(start))
    assert starts["category1"] == {4, 5, 6}
    assert starts["category2"] == {12, 13, 14}
    with pytest.raises(SwiftError, match=r"holds no attributes\.txt"):
        write_tree(tmp_path, tmp_path / "other")
