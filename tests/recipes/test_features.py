"""Features of baselines against what is computed by hand from the same stored numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import fetch_coords_power_2011
from scipy.signal import detrend

from swiftv2.config.data import ClipConfig, GridConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes.build import build
from swiftv2.data.changes.drop import drop, read_withdrawals
from swiftv2.data.samples.clips import index_clips
from swiftv2.data.store.reader import Store
from swiftv2.data.synth import generate
from swiftv2.errors import SwiftError, UsageError
from swiftv2.recipes.features import (
    ClipFeatures,
    Connectivity,
    Regions,
    Singles,
    features_of_runs,
    features_of_units,
    named_regions,
    run_connectivity,
    run_mask,
    run_mean_image,
    run_motion,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    generate(SynthConfig(subjects=8, voxel_mm=6, frames=30, withdrawn_share=0.0), folder / "bids")
    build(folder / "bids", folder / "store", GridConfig(voxel_mm=6), "a", salt="0" * 32)
    return folder


@pytest.fixture
def store(folder: Path) -> Store:
    return Store.open(folder / "store")


def _signal(store: Store, run: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    info = store.runs[run]
    return store.read_bold(run, 0, info.frames).astype(np.float64) * info.slope + info.intercept


def test_connectivity_is_fishers_z_of_the_correlations_of_detrended_regions(store: Store) -> None:
    regions = named_regions("power_2011", store)
    run = next(i for i, info in enumerate(store.runs) if info.steady_from > 0)
    found = run_connectivity(store, run, Connectivity(regions))
    brain, signal = store.brain(run), _signal(store, run)[store.runs[run].steady_from :]
    series = np.full((len(signal), len(regions.members)), np.nan)
    for number, member in enumerate(regions.members):
        if brain[member].any():
            series[:, number] = signal[:, member[brain[member]]].mean(axis=1)
    lines = np.tril_indices(len(regions.members), -1)
    wanted = np.arctanh(np.clip(np.corrcoef(detrend(series, axis=0).T)[lines], -0.999999, 0.999999))
    assert found.shape == wanted.shape == (len(regions.members) * (len(regions.members) - 1) // 2,)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    np.testing.assert_allclose(found, wanted, atol=2e-3, equal_nan=True)


def test_spheres_hold_the_voxels_within_their_radius(store: Store) -> None:
    regions = named_regions("power_2011", store, 12.0)
    world = store.grid.world(store.voxels)
    table = fetch_coords_power_2011()["rois"]
    sizes = []
    for row in table.itertuples():
        distance = np.linalg.norm(world - np.array([row.x, row.y, row.z]), axis=1)
        sizes.append(int((distance <= 12.0).sum()))
    assert [len(member) for member in regions.members] == [size for size in sizes if size]
    assert regions.left_out == sizes.count(0)
    assert len(named_regions("seitzman_2018", store).members) == 300


def test_a_file_of_labels_gives_each_voxel_the_label_that_lies_there(store: Store, tmp_path: Path) -> None:
    """The atlas has other voxels and another orientation than the store: left is left by world coordinates."""
    affine = np.diag([-3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = (96.0, -120.0, -90.0)
    right_first = np.ones((66, 80, 70), dtype=np.int16)
    right_first[33:] = 7
    image: Any = nib.Nifti1Image(right_first, affine)  # type: ignore[no-untyped-call]
    nib.save(image, tmp_path / "halves.nii.gz")
    regions = named_regions(str(tmp_path / "halves.nii.gz"), store)
    x = store.grid.world(store.voxels)[:, 0]
    assert len(regions.members) == 2
    assert (x[regions.members[0]] > -4).all()
    assert (x[regions.members[1]] < 4).all()
    assert len(regions.members[0]) + len(regions.members[1]) == len(store.voxels)


def test_atlases_that_do_not_fit_are_refused(store: Store, real_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"its coordinates are of MNI152.*--atlas none"):
        named_regions("seitzman_2018", Store.open(real_store))
    with pytest.raises(UsageError, match="no file and none of seitzman_2018"):
        named_regions("aal", store)
    (tmp_path / "text.nii.gz").write_text("no image")
    with pytest.raises(UsageError, match="no NIfTI file of labels"):
        named_regions(str(tmp_path / "text.nii.gz"), store)


def test_regions_without_brain_or_change_are_unknown_and_the_others_are_not() -> None:
    rng = np.random.default_rng(0)
    signal = rng.normal(100, 1, (40, 8)).astype(np.float32)
    signal[:, 4:6] = 100.0
    regions = Regions("four", tuple(np.array([k, k + 1]) for k in (0, 2, 4, 6)), 0)
    brain = np.array([1, 1, 1, 0, 1, 1, 0, 0], dtype=np.bool_)
    found = Connectivity(regions).of_frames(signal, brain, 2.0)
    assert np.isnan(found).tolist() == [False, True, True, True, True, True]
    with pytest.raises(SwiftError, match="9 frames are too few"):
        Connectivity(regions).of_frames(signal[:9], brain, 2.0)


def test_a_band_keeps_its_frequencies() -> None:
    """Two regions share 0.05 Hz and go against each other at 0.2 Hz: within the band they are alike."""
    time = np.arange(200) * 1.0
    slow = np.sin(2 * np.pi * 0.05 * time)[:, None]
    fast = np.sin(2 * np.pi * 0.2 * time)[:, None] * np.array([1.0, -1.0])
    signal = (slow + fast + 50).astype(np.float32)
    regions = Regions("two", (np.array([0]), np.array([1])), 0)
    brain = np.ones(2, dtype=np.bool_)
    assert abs(np.tanh(Connectivity(regions).of_frames(signal, brain, 1.0)[0])) < 0.1
    assert np.tanh(Connectivity(regions, (0.01, 0.1)).of_frames(signal, brain, 1.0)[0]) > 0.8


def test_small_features_tell_image_mask_and_motion(store: Store) -> None:
    brain = store.brain(0)
    image, mask, motion = run_mean_image(store, 0), run_mask(store, 0), run_motion(store, 0)
    assert abs(image[brain].mean()) < 1e-5
    assert image[brain].std() == pytest.approx(1.0, abs=1e-5)
    assert not image[~brain].any()
    steady = _signal(store, 0)[store.runs[0].steady_from :]
    assert np.corrcoef(image[brain], steady.mean(axis=0)[brain])[0, 1] > 0.99999
    np.testing.assert_array_equal(mask[:-1] == 1, brain)
    moved = store.frame_values("framewise_displacement", 0)
    assert moved is not None
    moved = moved[store.runs[0].steady_from :]
    np.testing.assert_allclose(motion, [np.nanmean(moved), np.nanmax(moved), np.nanmean(moved > 0.5)], rtol=1e-5)


def test_units_are_means_over_what_is_known_of_their_runs() -> None:
    rows = np.array([[1.0, np.nan], [3.0, np.nan], [5.0, 7.0]], dtype=np.float32)
    found = features_of_units(rows, [0, 0, 1], 3)
    np.testing.assert_array_equal(found, [[2.0, np.nan], [5.0, 7.0], [np.nan, np.nan]])


@pytest.fixture
def counted() -> tuple[Callable[[int], Singles], list[int]]:
    asked: list[int] = []

    def measure(run: int) -> Singles:
        asked.append(run)
        return np.array([run, np.nan], dtype=np.float32)

    return measure, asked


def test_features_are_measured_once_and_withdrawn_ones_leave_the_file(
    folder: Path, tmp_path: Path, counted: tuple[Callable[[int], Singles], list[int]]
) -> None:
    build(folder / "bids", tmp_path / "store", GridConfig(voxel_mm=6), "a", salt="0" * 32)
    store, cache = Store.open(tmp_path / "store"), tmp_path / "cache"
    measure, asked = counted
    features_of_runs(store, [0, 1, 2], "kind", measure, cache)
    found = features_of_runs(store, [3, 2, 1, 0], "kind", measure, cache)
    assert asked == [0, 1, 2, 3]
    np.testing.assert_array_equal(found, [[3, np.nan], [2, np.nan], [1, np.nan], [0, np.nan]])
    path = next(cache.iterdir())
    assert path.stat().st_mode & 0o077 == 0

    gone = store.runs[1]
    (tmp_path / "withdrawn.txt").write_text(next(name for name, key in store.subject_ids().items() if key == gone.subject))
    drop(tmp_path / "store", read_withdrawals(tmp_path / "store", tmp_path / "withdrawn.txt"))
    after = Store.open(tmp_path / "store")
    left = [i for i in range(4) if after.runs[i].present]
    features_of_runs(after, left, "kind", measure, cache)
    assert asked == [0, 1, 2, 3]
    with np.load(path) as content:
        assert gone.key not in content["run"].tolist()
        assert len(content["features"]) == len(left)
    path.write_bytes(b"damage")
    with pytest.raises(SwiftError, match="remove it"):
        features_of_runs(after, left, "kind", measure, cache)


def test_clips_are_told_by_their_own_volumes_alone(store: Store) -> None:
    clips = index_clips(store.runs, ClipConfig(frames=5, stride_within=2), [2])
    features = ClipFeatures(store, clips)
    signal, brain = _signal(store, 2), store.brain(2)
    start = int(clips.start[1])
    own = signal[start : start + 10 : 2]
    np.testing.assert_allclose(features.read(1)[0], own, rtol=1e-6)
    mean = own.mean(axis=0)
    wanted = np.where(brain, (mean - mean[brain].mean()) / mean[brain].std(), 0.0)
    np.testing.assert_allclose(features.mean_image(1), wanted, atol=1e-4)
    pattern = features.pattern(1).reshape(5, -1)
    assert abs(pattern[:, brain].mean()) < 1e-4
    assert not pattern[:, ~brain].any()
    assert features.all(features.mean_image).shape == (len(clips), len(store.voxels))


def test_clips_on_another_time_grid_are_interpolated(store: Store) -> None:
    clips = index_clips(store.runs, ClipConfig(frames=4, target_tr=1.0), [2])
    features = ClipFeatures(store, clips)
    start = int(clips.start[0])
    signal = _signal(store, 2)[start:]
    assert store.runs[2].tr == 2.0
    np.testing.assert_allclose(features.read(0)[0][:3], [signal[0], (signal[0] + signal[1]) / 2, signal[1]], rtol=1e-5)
