"""What evaluations leave to be drawn: the same clips and masks every time, on any number of ranks; no real subject unasked."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.grid import Grid, mni152_grid
from swiftv2.data.store.reader import Store
from swiftv2.engine.launch import World
from swiftv2.recipes import maps
from swiftv2.recipes.data import open_data
from swiftv2.recipes.evaluate import HeldOut
from swiftv2.recipes.objective import Objective
from swiftv2.report.reconstructions import FOLDER, of_clip, pictures_of, read_arrays, read_index

CONFIG = """
data: {{store: {store}, normalisation: {{kind: per_voxel}}, split: {{fractions: [0.5, 0.5, 0.0]}}}}
run: {{dir: {run}}}
clip: {{frames: 8, stride_between: 1.0}}
model: {{name: tiny, image_size: {size}, frames: 8, embed_dim: 16, depths: [2, 2], num_heads: [2, 4], patch_size: {patch}}}
mask: {{patch_size: {patch}}}
engine: {{precision: fp32, device: cpu, backend: plain}}
train: {{max_steps: 4, global_batch: 2}}
evaluate: {{max_clips: {clips}, batch: 2}}
"""


def configured(store: Path, run: Path, clips: int, *, real: bool = False) -> PretrainConfig:
    size, patch = ([10, 18, 10], [2, 3, 2, 2]) if real else ([32, 32, 32], [4, 4, 4, 2])
    run.mkdir(exist_ok=True)
    path = run / "tiny.yaml"
    path.write_text(CONFIG.format(store=store, run=run, clips=clips, size=size, patch=patch))
    return load(PretrainConfig, path, [])


def evaluate(config: PretrainConfig, world: World, steps: tuple[int, ...] = (1,), *, as_real: bool = False) -> None:
    torch.manual_seed(0)
    data = open_data(config)
    data.store.generated = data.store.generated and not as_real
    objective = Objective(config, torch.as_tensor(data.store.voxels).long(), data.store.grid.shape)
    heldout = HeldOut(config, data, objective, world, config.run.dir, print)
    for step in steps:
        heldout(step)


def drawn_of(run: Path) -> dict[str, Any]:
    index = read_index(run)
    assert index is not None
    return read_arrays(run, index["steps"][-1]["step"])


def _rank(rank: int, folder: Path, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    evaluate(configured(store, folder, 5), World(rank, 2, rank, 2, torch.device("cpu")))
    dist.destroy_process_group()


ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_draw_what_one_does_however_many_clips_are_evaluated(generated_store: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    spawn(_rank, (tmp_path / "two", generated_store), nprocs=2)  # type: ignore[no-untyped-call]
    for name, clips in (("one", 5), ("more", 8)):
        evaluate(configured(generated_store, tmp_path / name, clips), ALONE)
    one, two, more = (drawn_of(tmp_path / name) for name in ("one", "two", "more"))
    assert one.keys() == two.keys() == more.keys()
    assert {key.split("/")[0] for key in one} == {"clip_1", "clip_2"}
    for key, values in one.items():
        np.testing.assert_array_equal(values, more[key], err_msg=key)
        np.testing.assert_allclose(values, two[key], rtol=1e-5, err_msg=key)
    first, second = (
        np.asarray(nib.load(tmp_path / n / "figures/maps/fluctuation_r2_generated.nii.gz").dataobj)  # type: ignore[attr-defined]
        for n in ("one", "two")
    )
    assert np.isfinite(first).any()
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_errors_are_shown_where_hidden_and_few_evaluations_stay(generated_store: Path, tmp_path: Path) -> None:
    evaluate(configured(generated_store, tmp_path, 3), ALONE, tuple(range(1, 12)))
    index = read_index(tmp_path)
    assert index is not None
    kept = [one["step"] for one in index["steps"]]
    assert len(kept) == 8
    assert (kept[0], kept[-1]) == (1, 11)
    assert {path.name for path in (tmp_path / FOLDER).glob("*.npz")} == {one["file"] for one in index["steps"]}
    clip = of_clip(read_arrays(tmp_path, 11), "clip_1")
    shown = pictures_of(clip, "axial")
    hidden = np.isinf(shown["volume masked"])
    assert hidden.any()
    np.testing.assert_array_equal(np.isfinite(shown["volume error"]), hidden)
    error = (shown["volume reconstructed"] - shown["volume original"])[hidden]
    np.testing.assert_allclose(shown["fluctuation error"][hidden], error)


@pytest.mark.slow
def test_real_subjects_are_drawn_on_request_alone(real_store: Path, tmp_path: Path) -> None:
    evaluate(configured(real_store, tmp_path, 3, real=True), ALONE)
    assert drawn_of(tmp_path) == {}
    assert not (tmp_path / "figures" / "maps").exists()
    told = json.loads((tmp_path / FOLDER / "index.json").read_text())
    assert told["maps"] == []
    assert any("draw_subjects" in note for note in told["notes"])
    assert any("fewer than 5" in note for note in told["notes"])


@pytest.mark.slow
def test_real_cohorts_are_drawn_as_means_of_what_many_subjects_have(generated_store: Path, tmp_path: Path) -> None:
    evaluate(configured(generated_store, tmp_path, 8), ALONE, as_real=True)
    index = read_index(tmp_path)
    assert index is not None
    assert [(one["kind"], one["subjects"]) for one in index["drawn"]] == [("mean", 8)]
    store = Store.open(generated_store)
    text = (tmp_path / FOLDER / "index.json").read_text()
    assert not any(run.subject in text or run.key in text for run in store.runs)
    mean = of_clip(drawn_of(tmp_path), index["drawn"][0]["name"])
    assert not any(name.startswith(("course", "hidden", "original")) for name in mean)
    measured, made, off, moved = (mean[f"{name}_axial"] for name in ("measured", "reconstructed", "error", "fluctuation"))
    shown = np.isfinite(measured)
    assert shown.mean() > 0.3
    np.testing.assert_array_equal(np.isfinite(made), shown)
    assert (measured[shown] > 0).all()
    # A root mean square is not below the difference of the means.
    assert (off[shown] >= np.abs(made - measured)[shown] * (1 - 1e-4) - 1e-3).all()
    assert (moved[shown] > 0).all()


@pytest.mark.parametrize("orientation", ["RAS", "LAS"])
def test_a_planted_region_is_at_its_place_in_the_map(orientation: str, tmp_path: Path) -> None:
    grid: Grid = mni152_grid(6.0, orientation, "MNI152NLin2009cAsym")
    voxels = np.arange(0, grid.size, 5)
    world = grid.world(voxels)
    rng = torch.Generator().manual_seed(0)
    target = torch.randn(1, 30, len(voxels), generator=rng)
    right = torch.from_numpy(world[:, 0] > 20)
    # Perfect on the right, the wrong sign elsewhere; one voxel is hidden too rarely.
    made = torch.where(right, target, -target)
    counted = torch.ones_like(target, dtype=torch.bool)
    counted[:, 10:, 0] = False
    sums = maps.VoxelSums([0], len(voxels), ("model", "visible_mean"), torch.device("cpu"))
    predictions = {"model": made, "visible_mean": torch.zeros_like(target)}
    units = (torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), 100.0))
    sums.update(predictions, target, counted, [0], [1.0], [True], units)
    found = maps.r2_map(sums.cohort(0), 1)
    maps.write_map(tmp_path / "map.nii.gz", found.r2, grid, voxels)
    image: Any = nib.load(tmp_path / "map.nii.gz")
    assert image.get_data_dtype() == np.float32
    assert nib.aff2axcodes(image.affine) == tuple(orientation)  # type: ignore[no-untyped-call]
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 4)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    values = np.asarray(image.dataobj)
    places = np.argwhere(np.isfinite(values))
    at = places @ image.affine[:3, :3].T + image.affine[:3, 3]
    r2 = values[tuple(places.T)]
    assert len(r2) == len(voxels) - 1, "all but the one with too little data"
    np.testing.assert_allclose(r2[at[:, 0] > 20], 1.0, atol=1e-5)
    assert (r2[at[:, 0] <= 20] < 0).all()
    assert np.nanmin(np.abs(found.gain)) >= 0
    assert np.isnan(found.gain[0])


def test_a_voxel_that_one_subject_fills_is_shown_of_no_group() -> None:
    """Five subjects are evaluated, but in voxel 1 all hidden values are of the first."""
    sums = maps.VoxelSums([0], 2, ("model", "visible_mean"), torch.device("cpu"))
    target = torch.randn(5, 30, 2, generator=torch.Generator().manual_seed(1))
    counted = torch.ones_like(target, dtype=torch.bool)
    counted[1:, :, 1] = False
    units = (torch.ones(5, 1, 1), torch.zeros(5, 1, 1))
    sums.update({"model": target, "visible_mean": target}, target, counted, [0] * 5, [1.0] * 5, [True] * 5, units)
    assert maps.shown(sums.cohort(0), maps.FEWEST_SUBJECTS).tolist() == [True, False]


def test_pictures_that_cannot_be_written_cost_themselves_alone(
    generated_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(generated_store, tmp_path / "run", 4)
    (tmp_path / "run" / "figures").write_text("in the way")
    evaluate(config, ALONE)
    assert "step 1: the pictures of the evaluation are not there" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation.json").is_file(), "the scores stand"
