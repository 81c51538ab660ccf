"""Quality sheets: who is drawn, who stands out, and that left is left."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from swiftv2 import cli
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.data.grid import mni152_grid
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError, UsageError
from swiftv2.recipes.sheets import FEWEST_SUBJECTS, MEASURES, _Cohort, cut, draw_sheets, robust_z

nib: Any = nibabel
FRAMES = 12
ODD = "s3"
"""The subject that stands out."""


def bids(root: Path, subjects: int, *, generated: bool = False) -> Path:
    """Subjects whose brains have one lopsided shape; one of them moves and is noisier."""
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    affine[:3, 3] = (-102.0, -126.0, -108.0)
    for number in range(subjects):
        rng = np.random.default_rng(number)
        odd = number == int(ODD[1:])
        level = rng.uniform(900, 1100)
        data = rng.normal(level, (200.0 if odd else 20.0) + rng.uniform(0, 3), (34, 40, 36, FRAMES)).astype(np.int16)
        func = root / f"sub-s{number}" / "func"
        func.mkdir(parents=True)
        stem = f"sub-s{number}_task-rest_space-MNI152NLin6Asym"
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, code=4)
        nib.save(image, func / f"{stem}_desc-preproc_bold.nii.gz")
        (func / f"{stem}_desc-preproc_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
        displacement = rng.uniform(0.8, 0.9, FRAMES) if odd else rng.uniform(0.1, 0.2, FRAMES)
        lines = ["framewise_displacement", "n/a", *(f"{value:.4f}" for value in displacement[1:])]
        (func / f"sub-s{number}_task-rest_desc-confounds_timeseries.tsv").write_text("\n".join(lines) + "\n")
    maker = "swiftv2 synth" if generated else "fMRIPrep"
    (root / "dataset_description.json").write_text(json.dumps({"GeneratedBy": [{"Name": maker}]}))
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`generated` and `real` of six subjects, `few` of four."""
    root = tmp_path_factory.mktemp("sheets")
    grid = GridConfig(voxel_mm=6.0)
    for name, subjects in (("generated", 6), ("real", 6), ("few", 4)):
        bids(root / name, subjects, generated=name == "generated")
        build(root / name, root / f"{name}.zarr", grid, "demo", salt="0" * 32)
    return {name: root / f"{name}.zarr" for name in ("generated", "real", "few")}


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_generated_runs_get_a_page_each(stores: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    drawn = draw_sheets(stores["generated"], tmp_path / "q", progress=lambda *state: seen.append(state))
    assert (drawn.pages, drawn.individuals) == (2 + 6, True)
    assert seen[-1] == (12, 12)
    assert drawn.pdf.read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["quality.csv", "quality.pdf"]


def test_real_runs_are_drawn_only_on_request_and_then_in_private(stores: dict[str, Path], tmp_path: Path) -> None:
    groups = draw_sheets(stores["real"], tmp_path / "groups")
    assert (groups.pages, groups.individuals) == (2, False)
    private = draw_sheets(stores["real"], tmp_path / "private", individuals=True)
    assert (private.pages, private.individuals) == (8, True)
    for path in (private.pdf, private.csv):
        assert path.stat().st_mode & 0o077 == 0
    assert draw_sheets(stores["real"], tmp_path / "private").pages == 2, "an older, fuller file is replaced"


def test_a_group_of_few_real_subjects_has_no_mean_image(stores: dict[str, Path], tmp_path: Path) -> None:
    """The mean over one subject is that subject's brain."""
    large, small = (draw_sheets(stores[name], tmp_path / name) for name in ("real", "few"))
    assert len(Store.open(stores["few"]).subject_keys) < FEWEST_SUBJECTS
    pictures = [pdf.read_bytes().count(b"/Subtype /Image") for pdf in (large.pdf, small.pdf)]
    assert pictures[0] >= 6 > pictures[1]


def gathered(store: Path, people: dict[str, str], regions: dict[str, NDArray[np.bool_]], cleaned: set[str]) -> _Cohort:
    """A cohort whose runs (name: subject) have brains of our choice, as the store's reader would give them."""
    opened = Store.open(store)
    (real, *_), voxels = opened.runs, len(opened.voxels)
    opened.runs = tuple(replace(real, key=name, subject=people[name], cleaned=name in cleaned) for name in people)
    names = list(people)
    rows: dict[str, NDArray[Any]] = {
        "voxel_mean": np.full(voxels, 5.0, np.float32),
        "voxel_std": np.full(voxels, 2.0, np.float32),
    }
    rows |= {f"brain of {name}": region for name, region in regions.items()}
    replaced: Any = opened
    replaced._present = lambda index, name: rows[f"brain of {names[index]}" if name == "brain" else name]
    cohort = _Cohort("demo", voxels)
    for index in range(len(names)):
        cohort.add(opened, index)
    return cohort


def test_who_gives_nothing_to_a_map_does_not_hide_who_does(stores: dict[str, Path]) -> None:
    """Five subjects, four of whose runs have no means: the map would be the fifth one's brain."""
    store = Store.open(stores["real"])
    everywhere = np.ones(len(store.voxels), dtype=bool)
    people = {f"r{number}": f"s{number}" for number in range(5)}
    regions = dict.fromkeys(people, everywhere)
    hidden = gathered(stores["real"], people, regions, {"r1", "r2", "r3", "r4"}).sheet(store, drawn=False)
    assert (hidden.mean, hidden.tsnr) == (None, None)
    assert gathered(stores["real"], people, regions, set()).sheet(store, drawn=False).mean is not None


def test_voxels_of_few_subjects_are_no_part_of_public_maps(stores: dict[str, Path]) -> None:
    store = Store.open(stores["real"])
    everywhere = np.ones(len(store.voxels), dtype=bool)
    half = np.arange(len(everywhere)) < len(everywhere) // 2
    # Two runs of one subject reach the other half: two of one and four more are five subjects here, and six runs.
    people = {f"r{number}": f"s{number // 2}" if number < 2 else f"s{number}" for number in range(6)}
    regions = {name: everywhere if int(name[1:]) < 5 else half for name in people}
    cohort = gathered(stores["real"], people, regions, set())
    np.testing.assert_array_equal(cohort.people, np.where(half, 5, 4))
    np.testing.assert_array_equal(cohort.count, np.where(half, 6, 5))
    public, private = (cohort.sheet(store, drawn=drawn).mean for drawn in (False, True))
    assert public is not None
    assert private is not None
    shown = [sum(int(np.isfinite(picture).sum()) for picture in slices.pictures.values()) for slices in (public, private)]
    assert shown[0] < shown[1]


def test_the_table_measures_what_the_files_held(stores: dict[str, Path], tmp_path: Path) -> None:
    drawn = draw_sheets(stores["real"], tmp_path / "q")
    store = Store.open(stores["real"])
    rows = {row["key"]: row for row in rows_of(drawn.csv)}
    assert set(rows) == {run.key for run in store.runs}
    odd = store.subject_key("demo", ODD)
    for index, run in enumerate(store.runs):
        row, brain = rows[run.key], store.brain(index)
        bold = store.read_bold(index, 0, run.frames)[:, brain].astype(np.float64)
        assert float(row["tsnr_median"]) == pytest.approx(np.median(bold.mean(0) / bold.std(0)), rel=1e-3)
        assert float(row["global_mean"]) == pytest.approx(bold.mean(), rel=1e-4)
        assert float(row["spike_share"]) == (1.0 if run.subject == odd else 0.0)
        assert 0.8 < float(row["displacement_mean"]) < 0.9 or run.subject != odd
    marked = {key for key, row in rows.items() if row["outlier"]}
    assert {store.subject_key("demo", ODD)} <= {run.subject for run in store.runs if run.key in marked}
    assert {"tsnr_median", "displacement_mean", "global_std"} <= {
        measure for key, measure, _ in drawn.outliers if rows[key]["subject"] == odd
    }
    assert all(abs(z) > 4 for _, _, z in drawn.outliers)
    assert "s3" not in drawn.csv.read_text().replace(odd, ""), "no ids"


def test_the_command_draws_and_names(stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["store", "info", str(stores["real"]), "--plot", str(tmp_path / "q"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["sheets"]["pages"] == 2
    assert {one["measure"] for one in values["outliers"]} <= set(MEASURES)
    assert cli.main(["store", "info", str(stores["real"]), "--plot", str(tmp_path / "q")]) == 0
    assert "no pages of single runs" in capsys.readouterr().out
    assert cli.main(["store", "info", str(stores["real"]), "--individuals"]) == 2
    assert cli.main(["store", "info", str(stores["real"]), "--plot", str(stores["real"] / "q")]) == 2
    assert not (stores["real"] / "q").exists()


def test_damage_leaves_no_sheets(stores: dict[str, Path], tmp_path: Path) -> None:
    shard = layout.bold_shards(stores["few"], "int16", 1)[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    whole = shard.read_bytes()
    shard.write_bytes(bytes(data))
    with pytest.raises(SwiftError, match=Store.open(stores["few"]).runs[1].key):
        draw_sheets(stores["few"], tmp_path / "q", individuals=True)
    shard.write_bytes(whole)
    assert not (tmp_path / "q" / "quality.pdf").exists()
    assert not list((tmp_path / "q").glob(".*"))
    with pytest.raises(UsageError, match="lies in the store"):
        draw_sheets(stores["few"], stores["few"] / "voxels")


@pytest.mark.parametrize("orientation", ["RAS", "LAS"])
def test_left_is_drawn_left_whatever_the_order_of_the_store(orientation: str) -> None:
    """Columns run to the subject's right, rows upward; a marker on the left, low and behind is found there."""
    grid = mni152_grid(6.0, orientation, "MNI152NLin6Asym")
    voxels = np.arange(grid.size, dtype=np.int64)
    world = grid.world(voxels)
    shown: NDArray[np.bool_] = np.all(np.abs(world - (0, -18, 12)) <= (60, 72, 48), axis=1)
    values = world[:, 0]
    slices = cut(grid, voxels, values, shown)
    for plane in ("coronal", "axial"):
        assert (np.diff(slices.pictures[plane], axis=0) > 0).all(), "columns ascend in x, the subject's right"
        assert slices.pictures[plane][0].max() < 0 < slices.pictures[plane][-1].min()
    heights = cut(grid, voxels, world[:, 2], shown)
    assert (np.diff(heights.pictures["coronal"], axis=1) > 0).all(), "rows rise"
    depths = cut(grid, voxels, world[:, 1], shown)
    assert (np.diff(depths.pictures["sagittal"], axis=0) > 0).all(), "sagittal columns run forward"
    assert (np.diff(depths.pictures["axial"], axis=1) > 0).all(), "axial rows run forward"
    assert np.unique(cut(grid, voxels, world[:, 0], shown).pictures["sagittal"]) == pytest.approx(slices.places["sagittal"])


def test_what_is_not_shown_is_not_in_the_picture() -> None:
    grid = mni152_grid(6.0, "RAS", "MNI152NLin6Asym")
    voxels = np.arange(grid.size, dtype=np.int64)
    shown = np.abs(grid.world(voxels)).max(axis=1) < 40
    shown &= ~(np.abs(grid.world(voxels) - (20, 0, 0)).max(axis=1) < 9)
    pictures = cut(grid, voxels, np.ones(len(voxels)), shown).pictures
    assert np.isnan(pictures["axial"]).any()
    assert set(np.unique(pictures["axial"][np.isfinite(pictures["axial"])])) == {1.0}


@given(st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=40), st.floats(0.1, 10), st.floats(-1e3, 1e3))
def test_robust_z_does_not_depend_on_units(values: list[float], scale: float, shift: float) -> None:
    data: NDArray[np.float64] = np.round(np.array(values), 3)
    first, second = robust_z(data), robust_z(data * scale + shift)
    if np.isfinite(first).all() and np.median(np.abs(data - np.median(data))) > 1e-2:
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)


def test_robust_z_leaves_the_unknown_and_the_equal_alone() -> None:
    assert np.isnan(robust_z(np.array([1.0, 2.0, np.nan, 3.0, np.nan, 900.0]))).all(), "four are too few"
    z = robust_z(np.array([1.0, 2.0, 3.0, np.nan, 4.0, 5.0, 90.0]))
    assert np.isnan(z[3])
    assert np.abs(z[[0, 1, 2, 4, 5]]).max() < 4 < z[6]
    assert np.isnan(robust_z(np.ones(9))).all()
