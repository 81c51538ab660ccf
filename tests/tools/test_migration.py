"""What SwiFT v1 and v2 left behind comes into a store with every value where it was in the brain."""

import json
from pathlib import Path
from typing import Any

import convert_swift_v1
import convert_swift_v2_hdf5
import h5py
import migration
import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from swiftv2.data.grid import orientations
from swiftv2.data.store.contents import info
from swiftv2.data.store.reader import Store
from swiftv2.data.store.verify import verify

nifti: Any = nib
SPACE = "MNI152NLin6Asym"
SHAPE = (12, 14, 11)
FRAMES = 6
CORNER = ("-20", "-30", "10")
MARKER_MM = (-6.0, -12.0, 20.0)
"""World position of the bright voxel: left, behind, above; nothing about it is symmetric."""
PLACE = ["--orientation", "LAS", "--space", SPACE, "--voxel-mm", "2", "--tr", "0.8"]
SOURCE_GRID = ["--grid", "kind=source", "mask=box"]


def affine_of(codes: str, corner: tuple[float, ...]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        world = next(n for n, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[world, axis] = 2.0 if code in "RAS" else -2.0
    affine[:3, 3] = corner
    return affine


def raw(seed: int, shape: tuple[int, int, int] = SHAPE, marker: tuple[int, int, int] | None = None) -> NDArray[np.float32]:
    """A run (H, W, D, T) as v2 keeps it: 0 outside a lopsided brain, half-precision numbers inside, one bright voxel."""
    rng = np.random.default_rng(seed)
    run = np.zeros((*shape, FRAMES))
    brain = (slice(2, shape[0] - 1), slice(3, shape[1] - 2), slice(2, shape[2] - 4))
    run[brain] = rng.uniform(500, 1500, run[brain].shape)
    if marker is not None:
        run[marker] = 3000.0 + 8 * np.arange(FRAMES)
    return run.astype(np.float16).astype(np.float32)


def v1_values(run: NDArray[np.float32], *, zeroback: bool = False) -> NDArray[np.float16]:
    """z-normalised over the non-zero voxels of the whole run, the background at the smallest value or at 0."""
    inside = run != 0
    scaled = (run - run[inside].mean()) / run[inside].std()
    return np.where(inside, scaled, 0.0 if zeroback else scaled[inside].min()).astype(np.float16)


def save_v1(folder: Path, values: NDArray[Any], *, flat: bool = False) -> Path:
    folder.mkdir(parents=True)
    for number in range(values.shape[3]):
        frame = torch.from_numpy(values[..., number].copy())
        torch.save(frame if flat else frame[..., None], folder / f"frame_{number}.pt")
    return folder


def save_v2(path: Path, values: NDArray[Any], name: str = "data", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=values.astype(np.float16), compression="gzip", **options)
    return path


def v1(*words: object) -> int:
    return convert_swift_v1.main([str(word) for word in words])


def v2(*words: object) -> int:
    return convert_swift_v2_hdf5.main([str(word) for word in words])


def bold_of(out: Path, subject: str) -> Any:
    return nifti.load(out / f"sub-{subject}" / "func" / f"sub-{subject}_task-rest_space-{SPACE}_desc-preproc_bold.nii.gz")


def at_world(store: Store, index: int, mm: tuple[float, ...]) -> NDArray[np.float64]:
    """The course of the kept voxel that lies at a world position, in source units."""
    distance = np.abs(store.grid.world(store.voxels) - mm).max(axis=1)
    place = int(distance.argmin())
    assert distance[place] < 1e-3
    run = store.runs[index]
    return np.asarray(store.read_bold(index, 0, run.frames)[:, place].astype(np.float64) * run.slope + run.intercept)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPI", "PSR"])
def test_v1_into_a_store_value_by_value_at_its_place(codes: str, tmp_path: Path) -> None:
    corner = (12.0 if "L" in codes else -12.0, 0.0 if "P" in codes else -20.0, 30.0 if "I" in codes else 10.0)
    affine = affine_of(codes, corner)
    marker = tuple(round(x) for x in (np.linalg.inv(affine) @ [*MARKER_MM, 1])[:3])
    assert all(2 <= place < size - 1 for place, size in zip(marker, SHAPE, strict=True)), "the marker lies in the box"
    values = v1_values(raw(0, marker=(marker[0], marker[1], marker[2])))
    save_v1(tmp_path / "img" / "100206", values)
    words = ["--orientation", codes, "--space", SPACE, "--voxel-mm", "2", "--tr", "0.8", "--corner", *map(str, affine[:3, 3])]
    build = ["--store", tmp_path / "s.zarr", "--cohort", "hcp", "--keep-float", "--salt", "0" * 32, *SOURCE_GRID]
    assert v1(tmp_path / "img", tmp_path / "out", *words, *build) == 0

    image = bold_of(tmp_path / "out", "100206")
    np.testing.assert_allclose(image.affine, affine)
    assert "".join(orientations.aff2axcodes(image.affine)) == codes
    np.testing.assert_array_equal(np.asarray(image.dataobj), values.astype(np.float32))
    store = Store.open(tmp_path / "s.zarr")
    run = store.runs[0]
    assert (run.tr, run.frames, run.values, run.source_orientation) == (0.8, FRAMES, "float32", codes)
    assert not store.generated, "converted data are somebody's"
    np.testing.assert_array_equal(at_world(store, 0, MARKER_MM), values[marker].astype(np.float64))
    other = (-MARKER_MM[0], *MARKER_MM[1:])
    assert at_world(store, 0, other).max() < values[marker].min(), "left is not right"
    assert verify(tmp_path / "s.zarr").ok


def test_the_mni_box_takes_v1_data_cropped_from_fsl_s_template(tmp_path: Path) -> None:
    """As v1's own script crops (`[:, 14:-7]`): through the fixed 192 mm cube nothing moves and nothing is interpolated."""
    marker = (60, 40, 45)
    values = v1_values(raw(1, (91, 88, 91), marker))[..., :3]
    save_v1(tmp_path / "img" / "sub-7", values)
    words = ["--crop", "0", "14", "0", "--store", tmp_path / "s.zarr", "--cohort", "ukb", "--keep-float", "--grid", "mask=box"]
    assert v1(tmp_path / "img", tmp_path / "out", *PLACE, *words) == 0
    store = Store.open(tmp_path / "s.zarr")
    assert not store.runs[0].resampled
    assert store.grid.shape == (96, 96, 96)
    # FSL's LAS template: x = 90 - 2 i, y = 2 j - 126, z = 2 k - 72.
    world = (90.0 - 2 * 60, 2.0 * (40 + 14) - 126, 2.0 * 45 - 72)
    np.testing.assert_array_equal(at_world(store, 0, world), values[marker].astype(np.float64))


def test_a_negative_crop_is_padding_and_other_orientations_count_from_their_own_corner(tmp_path: Path) -> None:
    save_v1(tmp_path / "img" / "1", v1_values(raw(2)))
    assert v1(tmp_path / "img", tmp_path / "las", *PLACE, "--crop", "-3", "7", "-3") == 0
    np.testing.assert_allclose(bold_of(tmp_path / "las", "1").affine[:3, 3], (96.0, -112.0, -78.0))
    words = ["--orientation", "RAS", "--space", SPACE, "--voxel-mm", "2", "--tr", "0.8", "--crop", "4", "0", "1"]
    assert v1(tmp_path / "img", tmp_path / "ras", *words) == 0
    np.testing.assert_allclose(bold_of(tmp_path / "ras", "1").affine[:3, 3], (-82.0, -126.0, -70.0))


@pytest.mark.parametrize("zeroback", [False, True])
def test_the_brain_is_what_differs_from_the_background(zeroback: bool, tmp_path: Path) -> None:
    run = raw(3)
    folder = save_v1(tmp_path / "img" / "1", v1_values(run, zeroback=zeroback), flat=True)
    torch.save({"global_mean": torch.tensor(950.5), "global_std": 210.0}, folder / "global_stats.pt")
    torch.save(torch.zeros(SHAPE), folder / "voxel_mean.pt")
    assert v1(tmp_path / "img", tmp_path / "out", *PLACE, "--corner", *CORNER) == 0
    func = tmp_path / "out" / "sub-1" / "func"
    mask = nifti.load(func / f"sub-1_task-rest_space-{SPACE}_desc-brain_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, (run != 0).any(axis=3))
    facts = json.loads((func / f"sub-1_task-rest_space-{SPACE}_desc-preproc_bold.json").read_text())
    assert (facts["RepetitionTime"], facts["RunMean"], facts["RunStd"]) == (0.8, 950.5, 210.0)
    report = tmp_path / "out" / migration.REPORT
    assert "ignored: voxel_mean.pt" in report.read_text()
    assert report.stat().st_mode & 0o077 == 0


def test_two_backgrounds_at_a_time_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = v1_values(raw(4))
    values[0] = 0.0  # as zero padding around data whose background is the smallest value
    save_v1(tmp_path / "img" / "1", values)
    words = [*PLACE, "--corner", *CORNER]
    assert v1(tmp_path / "img", tmp_path / "out", *words) == 1
    assert "say --background" in capsys.readouterr().err
    assert v1(tmp_path / "img", tmp_path / "out", *words, "--background", "min") == 0


@pytest.mark.parametrize(
    ("order", "options", "words"),
    [
        ("first", {"chunks": (1, *SHAPE)}, []),
        ("last", {"chunks": (*SHAPE, 1)}, []),
        ("last", {}, ["--frames-axis", "last"]),
        ("first", {}, ["--frames-axis", "first", "--dataset", "runs/data"]),
    ],
)
def test_v2_into_a_store(order: str, options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    run = raw(5, marker=(8, 6, 4))
    name = "runs/data" if "--dataset" in words else "data"
    path = save_v2(tmp_path / "h5" / "s1.h5", np.moveaxis(run, 3, 0) if order == "first" else run, name, **options)
    if "--dataset" in words:
        save_v2(path, np.zeros((3, 4, 5, 6)), "other")
    build = ["--store", tmp_path / "s.zarr", "--cohort", "v2", *SOURCE_GRID]
    assert v2(tmp_path / "h5", tmp_path / "out", *PLACE, "--corner", *CORNER, *words, *build) == 0
    np.testing.assert_array_equal(np.asarray(bold_of(tmp_path / "out", "s1").dataobj), run)
    store = Store.open(tmp_path / "s.zarr")
    world = (-20.0 - 2 * 8, -30.0 + 2 * 6, 10.0 + 2 * 4)  # LAS: the first index runs to the left
    np.testing.assert_allclose(at_world(store, 0, world), run[8, 6, 4], atol=store.runs[0].max_error + 1e-3)
    assert info(tmp_path / "s.zarr")["orientations"] == {"LAS": 1}


def test_v2_files_that_leave_a_question_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = raw(6)
    several = save_v2(tmp_path / "several" / "a.h5", run, "one", chunks=(*SHAPE, 1))
    save_v2(several, run, "two", chunks=(*SHAPE, 1))
    save_v2(tmp_path / "axis" / "a.h5", run)
    save_v2(tmp_path / "none" / "a.h5", run[..., 0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.h5").write_bytes(several.read_bytes()[:4000])
    for folder, words in (
        ("several", "name one by --dataset"),
        ("axis", "say --frames-axis"),
        ("none", "holds 0 4-D"),
        ("broken", "cannot be read"),
    ):
        assert v2(tmp_path / folder, tmp_path / "out", *PLACE, "--corner", *CORNER) == 1
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1


def test_a_cube_tells_its_axis_of_frames(tmp_path: Path) -> None:
    run = raw(7, (12, 12, 12))
    save_v2(tmp_path / "h5" / "1.h5", np.moveaxis(run, 3, 0))
    assert v2(tmp_path / "h5", tmp_path / "out", *PLACE, "--corner", *CORNER) == 0
    np.testing.assert_array_equal(np.asarray(bold_of(tmp_path / "out", "1").dataobj), run)


@pytest.mark.parametrize("left_out", ["--orientation", "--space", "--voxel-mm", "--tr", "--corner"])
def test_what_was_never_recorded_is_asked_for(left_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_v1(tmp_path / "img" / "100206", v1_values(raw(8)))
    words = [*PLACE, "--corner", *CORNER]
    place = words.index(left_out)
    del words[place : place + (4 if left_out == "--corner" else 2)]
    assert v1(tmp_path / "img", tmp_path / "out", *words) == 2
    line = capsys.readouterr().err
    assert left_out in line
    assert "--show" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--orientation", "LAR", "--corner", *CORNER], "three letters"),
        (["--crop", "0", "0", "0", "--voxel-mm", "3"], "2 mm"),
        (["--crop", "0", "0", "0", "--corner", *CORNER], "say the same"),
        (["--corner", *CORNER, "--tr", "800"], "plausible"),
        (["--corner", *CORNER, "--part", "3/2"], "--part"),
        (["--corner", *CORNER, "--store", "s"], "--cohort"),
        (["--corner", *CORNER, "--names", "(?P<subject>x+)"], "does not fit --names"),
    ],
)
def test_options_that_make_no_sense(words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_v1(tmp_path / "img" / "100206", v1_values(raw(8)))
    assert v1(tmp_path / "img", tmp_path / "out", *PLACE, *words) == 2
    line = capsys.readouterr().err
    assert reason in line
    assert "100206" not in line


def test_bad_subjects_are_refused_by_number_and_the_others_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = v1_values(raw(9))
    bad = values.copy()
    bad[4, 4, 4, 3] = np.inf
    for number, one in enumerate((values, bad, values, values, values), start=1):
        save_v1(tmp_path / "img" / f"private{number}", one)
    (tmp_path / "img" / "private3" / "frame_2.pt").unlink()
    (tmp_path / "img" / "private4" / "frame_5.pt").write_bytes(b"no tensor")
    torch.save(torch.zeros(3, 3, 3), tmp_path / "img" / "private5" / "frame_1.pt")
    build = ["--store", tmp_path / "s.zarr", "--cohort", "v1", *SOURCE_GRID]
    words = [tmp_path / "img", tmp_path / "out", *PLACE, "--corner", *CORNER]
    assert v1(*words, *build) == 1
    said = capsys.readouterr()
    assert "private" not in said.err + said.out, "ids stay in the report"
    for line in (
        "subject 2 of 5 refused: frame 3 holds NaN or infinity",
        "subject 3 of 5 refused: frame 2 is missing",
        "subject 4 of 5 refused: frame 5 cannot be read",
        "subject 5 of 5 refused: frame 1 has the shape",
    ):
        assert line in said.err
    assert not (tmp_path / "s.zarr").exists()
    assert [path.name for path in (tmp_path / "out").rglob("*bold.nii.gz")] == [
        bold_of(tmp_path / "out", "private1").get_filename().split("/")[-1]
    ]
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert "private3\trefused" in (tmp_path / "out" / migration.REPORT).read_text()
    assert v1(*words, *build, "--skip-refused") == 1
    assert info(tmp_path / "s.zarr")["runs"] == 1


def test_a_second_start_does_only_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        save_v1(tmp_path / "img" / f"{number}_20227_2_0", v1_values(raw(number)))
    names = ["--names", r"(?P<subject>\d+)_20227_(?P<session>\d)_(?P<run>\d)"]
    words = [tmp_path / "img", tmp_path / "out", *PLACE, "--corner", *CORNER, *names]
    assert v1(*words, "--part", "1/2") == 0
    done = sorted((tmp_path / "out").rglob("*_bold.nii.gz"))
    assert [path.name for path in done] == [
        f"sub-{n}_ses-2_task-rest_run-0_space-{SPACE}_desc-preproc_bold.nii.gz" for n in (1, 3)
    ]
    torn = done[1].with_name(f".{done[1].name}.partial")
    done[1].rename(torn)  # as a kill leaves it: not yet in its place
    first = done[0].stat().st_mtime_ns
    assert v1(*words) == 0
    assert done[0].stat().st_mtime_ns == first
    assert len(list((tmp_path / "out").rglob("*_bold.nii.gz"))) == 3
    assert not torn.exists()
    assert v1(*words[:-2], *names, "--tr", "2") == 1
    assert "converted before with other options" in capsys.readouterr().err


def test_the_picture_marks_left_and_right_and_is_private(tmp_path: Path) -> None:
    save_v1(tmp_path / "img" / "100206", v1_values(raw(10)))
    assert v1(tmp_path / "img", tmp_path / "out", *PLACE, "--crop", "30", "40", "30", "--show", "100206") == 0
    picture = tmp_path / "out" / migration.PICTURE
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
