import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import nitime
import numpy as np
import pytest
import zarr
from store_files import (
    FRAMES,
    GRID,
    SHAPE,
    SPACE,
    bold_values,
    contents,
    flipped,
    mni_affine,
    nifti,
    save_nifti,
    save_run,
)

from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.data.changes.tally import Progress
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError, UsageError

NITIME = Path(nitime.__file__).parent / "data"
NIBABEL = Path(nib.__file__).parent / "tests" / "data"
SALT = "fixed salt of the tests"
RUNS = 7

BUILD = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from swiftv2.config.data import GridConfig
    from swiftv2.data.changes import tally
    from swiftv2.data.changes.build import build
    from swiftv2.data.ranks import MPICommunicator

    source, store, kill_after, parallel = sys.argv[1:]

    def progress(state):
        if 0 < int(kill_after) <= state.done:
            os.kill(os.getpid(), signal.SIGKILL)

    tally.SECONDS = 0.001
    comm = MPICommunicator() if parallel == "mpi" else None
    build(source, Path(store), GridConfig(voxel_mm=6.0), "demo", salt="fixed salt of the tests",
          progress=progress, comm=comm)
""")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven runs of four subjects, one of them truncated, one constant, one with confounds."""
    root = tmp_path_factory.mktemp("cohort")
    mask = np.zeros(SHAPE, dtype=bool)
    mask[5:30, 5:35, 8:30] = True
    for number in range(5):
        data = bold_values(number, frames=FRAMES - number)
        save_run(root, f"x{number // 2}", data, run=str(number), mask=mask if number else None)
    bad = save_run(root, "x7", bold_values(9), run="1")
    bad.write_bytes(bad.read_bytes()[:-2000])
    save_run(root, "x8", np.full((*SHAPE, 6), 700, dtype=np.int16))
    lines = ["participant_id\tage\tsex", *(f"sub-x{number}\t{20 + number}\tn/a" for number in range(9))]
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    confounds = ["framewise_displacement\tmotion_outlier00\tnon_steady_state_outlier00", "n/a\t0\t1"]
    confounds += [f"0.{frame}\t{int(frame == 4)}\t0" for frame in range(1, FRAMES - 1)]
    (root / "sub-x0/func/sub-x0_task-rest_run-1_desc-confounds_timeseries.tsv").write_text("\n".join(confounds) + "\n")
    return root


@pytest.fixture(scope="module")
def built(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("built") / "store"
    build(cohort, store, GRID, "demo", salt=SALT)
    return store


def test_takes_the_good_and_refuses_the_bad_by_key_and_reason(cohort: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = build(cohort, tmp_path / "store", GRID, "demo", salt=SALT, progress=seen.append)
    assert report.taken == 5
    assert sorted(reason.split(":")[0].split(" is ")[0] for _, reason in report.refused) == ["constant", "the file"]
    assert (seen[-1].done, seen[-1].total, seen[-1].refused) == (RUNS, RUNS, 2)
    assert seen[-1].bytes_done == seen[-1].bytes_total
    lines = [json.loads(line) for line in report.report.read_text().splitlines()]
    refused = {line["run"]: line["file"] for line in lines if line["status"] == "refused"}
    assert {key for key, _ in report.refused} == set(refused)
    assert sorted(file[:6] for file in refused.values()) == ["sub-x7", "sub-x8"]
    again = build(cohort, tmp_path / "store", GRID, "demo")
    assert again.nothing_to_do
    assert (again.taken, again.refused, again.bytes) == (report.taken, report.refused, report.bytes)


def test_frames_are_the_source_numbers_at_their_places(built: Path) -> None:
    store = Store.open(built)
    by_frames = {run.frames: index for index, run in enumerate(store.runs)}
    world = store.grid.world(store.voxels)
    there = np.rint((world - mni_affine()[:3, 3]) / 6.0).astype(int)
    for number in range(5):
        index = by_frames[FRAMES - number]
        run = store.runs[index]
        data = bold_values(number, frames=FRAMES - number)
        expected = data[there[:, 0], there[:, 1], there[:, 2]].T
        np.testing.assert_array_equal(store.read_bold(index, 0, run.frames), expected)
        np.testing.assert_array_equal(store.read_bold(index, 2, 5, 3), expected[2:17:3])
        brain = store.brain(index)
        assert run.brain_rule == ("mask" if number else "nonzero")
        assert brain.sum() == run.brain_voxels
        assert brain.all() == (number == 0)
        values = expected[run.steady_from :, brain].astype(float)
        assert run.statistics[:2] == pytest.approx((values.mean(), values.std()))
        np.testing.assert_allclose(store.voxel_mean(index)[brain], values.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(store.voxel_std(index)[brain], values.std(axis=0), rtol=1e-5)
        assert (run.values, run.dtype, run.tr, run.space, run.coverage) == ("exact", "int16", 2.0, SPACE, 1.0)


def test_confounds_and_labels_join(built: Path) -> None:
    store = Store.open(built)
    index = next(i for i, run in enumerate(store.runs) if run.confounds)
    displacement = store.frame_values("framewise_displacement", index)
    censored, unsteady = store.frame_values("censored", index), store.frame_values("non_steady_state", index)
    assert store.runs[index].steady_from == 1
    assert displacement is not None
    assert censored is not None
    assert unsteady is not None
    assert np.isnan(displacement[0])
    assert displacement[3] == pytest.approx(0.3)
    assert np.flatnonzero(censored).tolist() == [4]
    assert np.flatnonzero(unsteady).tolist() == [0]
    assert store.frame_values("censored", 0 if index else 1) is None
    keys = store.subject_ids()
    for run, labels in zip(store.runs, store.labels(), strict=True):
        number = next(n for n in range(9) if keys[f"demo/x{n}"] == run.subject)
        assert labels == {"age": str(20 + number), "sex": None}
        assert keys[f"x{number}"] == keys[f"sub-x{number}"] == store.subject_key("demo", f"sub-x{number}") == run.subject


def test_ids_are_in_private_files_only(built: Path) -> None:
    private = {layout.SUBJECTS_FILE, layout.REPORT_FILE}
    for path in built.rglob("*"):
        assert "x1" not in path.name
        if path.is_file():
            text = path.read_bytes()
            if path.name in private:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            elif path.suffix in (".json", ".jsonl"):
                assert b"sub-" not in text
                assert b"x1" not in text
                assert SALT.encode() not in text


@pytest.mark.filterwarnings("ignore:Object at")  # the index and the ids are no part of the Zarr hierarchy
def test_any_zarr_reader_can_read_it(built: Path) -> None:
    group = zarr.open_group(built, mode="r")
    store = Store.open(built)
    run = store.runs[0]
    bold = group[f"bold/{run.dtype}"]
    np.testing.assert_array_equal(bold[run.row, : run.frames], store.read_bold(0, 0, run.frames))  # type: ignore[index]
    np.testing.assert_array_equal(group["voxels"][:], store.voxels)  # type: ignore[index]
    assert sorted(name for name, _ in group.groups()) == ["bold"]


def test_two_files_a_run_or_fewer(built: Path) -> None:
    store = Store.open(built)
    for run in store.runs:
        assert [path.name for path in layout.bold_shards(built, run.dtype, run.row)] == [f"c.{run.row}.0.0"]
    shared = [path for name in layout.SMALL_ARRAYS for path in (built / name.name).glob("c.*")]
    assert len(shared) == len(layout.SMALL_ARRAYS)


def test_a_moved_store_opens(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "elsewhere")
    here, there = Store.open(built), Store.open(tmp_path / "elsewhere")
    assert here.runs == there.runs
    np.testing.assert_array_equal(here.read_bold(1, 0, 4), there.read_bold(1, 0, 4))


def run_build(cohort: Path, store: Path, kill_after: int = -1, launcher: tuple[str, ...] = ()) -> int:
    command = [*launcher, sys.executable, "-c", BUILD, str(cohort), str(store), str(kill_after)]
    command.append("mpi" if launcher else "alone")
    return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(cohort: Path, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run_build(cohort, store, kill_after=3) == -signal.SIGKILL
    with pytest.raises(SwiftError, match="unfinished"):
        Store.open(store)
    # What a kill in the middle of a write leaves behind: a half-written file, and a shard of a run that is not done.
    (store / "bold/int16/c.3.0.0123.partial").write_bytes(b"half")
    (store / "bold/int16/c.3.0.0").write_bytes(b"stale")
    (store / layout.STAGING / "rows" / "3.json").unlink(missing_ok=True)
    build(cohort, store, GRID, "demo", salt=SALT)
    assert contents(store) == contents(built)


@pytest.mark.slow
def test_two_ranks_killed_and_started_again_give_the_same_bytes(cohort: Path, built: Path, tmp_path: Path) -> None:
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec in this environment")
    launcher = (str(mpiexec), "-n", "2")
    assert run_build(cohort, tmp_path / "store", kill_after=4, launcher=launcher) != 0
    assert not layout.is_complete(tmp_path / "store")
    assert run_build(cohort, tmp_path / "store", launcher=launcher) == 0
    assert contents(tmp_path / "store") == contents(built)


def test_las_and_ras_files_give_the_same_store(tmp_path: Path) -> None:
    data = bold_values(3)
    turned, affine = flipped(data, mni_affine())
    save_run(tmp_path / "ras", "a", data)
    save_run(tmp_path / "las", "a", np.ascontiguousarray(turned), affine=affine)
    stores = []
    for name in ("ras", "las"):
        build(tmp_path / name, tmp_path / f"{name}.store", GRID, "demo", salt=SALT)
        stores.append(Store.open(tmp_path / f"{name}.store"))
    assert [store.runs[0].source_orientation for store in stores] == ["RAS", "LAS"]
    np.testing.assert_array_equal(stores[0].read_bold(0, 0, FRAMES), stores[1].read_bold(0, 0, FRAMES))
    assert stores[0].runs[0].statistics == stores[1].runs[0].statistics


@pytest.mark.parametrize(
    ("files", "shape", "orientation"),
    [(NITIME / "fmri*.nii.gz", (10, 18, 10), "LSP"), (NIBABEL / "functional.nii", (17, 21, 3), "LAS")],
)
def test_real_bold(files: Path, shape: tuple[int, int, int], orientation: str, tmp_path: Path) -> None:
    found = sorted(files.parent.glob(files.name))
    table = tmp_path / "labels.csv"
    lines = [f"p{number},{path.name},{number}" for number, path in enumerate(found)]
    table.write_text("\n".join(["subject,file,run", *lines]))
    grid = GridConfig(kind="source", mask="box", space="scanner-of-the-package")
    pattern = str(files.parent / files.name.replace(".nii", ".ni[i]"))
    build(pattern, tmp_path / "store", grid, "real", labels=table)
    store = Store.open(tmp_path / "store")
    assert store.grid.shape == shape
    assert len(store) == len(found)
    keys = store.subject_ids()
    for number, path in enumerate(found):
        index = next(i for i, run in enumerate(store.runs) if run.subject == keys[f"p{number}"])
        run = store.runs[index]
        assert (run.source_orientation, run.values) == (orientation, "exact")
        image = nifti.load(path)
        # nibabel's own reorientation is the judge of ours.
        expected = np.moveaxis(np.asarray(nifti.as_closest_canonical(image).dataobj), -1, 0).reshape(run.frames, -1)
        values = store.read_bold(index, 0, run.frames) * run.slope + run.intercept
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        np.testing.assert_allclose(run.statistics[0], expected[:, store.brain(index)].mean())


@pytest.mark.parametrize(
    ("space", "reason"),
    [("T1w", "native space"), ("Talairach", "unknown space"), ("MNI152NLin2009cAsym", "where grid.space is")],
)
def test_other_spaces_are_refused(space: str, reason: str, tmp_path: Path) -> None:
    save_run(tmp_path / "in", "a", bold_values(0, frames=4), space=space)
    config = GRID.model_copy(update={"space": SPACE}) if "2009" in space else GRID
    with pytest.raises(SwiftError, match=reason):
        build(tmp_path / "in", tmp_path / "store", config, "demo")
    assert not (tmp_path / "store").exists()


def test_mixed_spaces_need_a_choice(tmp_path: Path) -> None:
    save_run(tmp_path / "in", "a", bold_values(0, frames=4))
    save_run(tmp_path / "in", "b", bold_values(0, frames=4), space="MNI152NLin2009cAsym")
    with pytest.raises(UsageError, match=r"grid\.space"):
        build(tmp_path / "in", tmp_path / "store", GRID, "demo")
    config = GRID.model_copy(update={"space": SPACE})
    assert build(tmp_path / "in", tmp_path / "store", config, "demo").taken == 1


def test_floats_nan_and_missing_time(tmp_path: Path) -> None:
    data = bold_values(0, frames=8) + np.float32(0.25) * np.random.default_rng(0).random((*SHAPE, 8), dtype=np.float32)
    save_run(tmp_path / "in", "a", data)
    hole = data.copy()
    hole[SHAPE[0] // 2, SHAPE[1] // 2, SHAPE[2] // 2, 3] = np.nan
    save_run(tmp_path / "in", "b", hole)
    save_run(tmp_path / "in", "c", bold_values(1, frames=8), tr=0.0)
    report = build(tmp_path / "in", tmp_path / "store", GRID, "demo")
    assert sorted(reason[:3] for _, reason in report.refused) == ["NaN", "TR "]
    store = Store.open(tmp_path / "store")
    run = store.runs[0]
    there = np.rint((store.grid.world(store.voxels) - mni_affine()[:3, 3]) / 6.0).astype(int)
    expected = data[there[:, 0], there[:, 1], there[:, 2]].T.astype(np.float64)
    error = np.abs(store.read_bold(0, 0, 8) * run.slope + run.intercept - expected).max()
    assert (run.values, run.dtype) == ("scaled", "int16")
    assert run.max_error == pytest.approx(error)
    assert error < 0.02
    build(tmp_path / "in", tmp_path / "float", GRID, "demo", keep_float=True)
    kept = Store.open(tmp_path / "float")
    np.testing.assert_array_equal(kept.read_bold(0, 0, 8), expected.astype(np.float32))
    assert kept.runs[0].values == "float32"


def test_another_grid_is_refused_unless_resampled(tmp_path: Path) -> None:
    affine = mni_affine()
    affine[:3, 3] += (1.5, 0.0, 0.0)
    ramp = 1000 + 10 * np.arange(SHAPE[0])[:, None, None, None] + np.arange(6)
    save_run(tmp_path / "in", "a", np.broadcast_to(ramp, (*SHAPE, 6)).astype(np.int16), affine=affine)
    with pytest.raises(SwiftError, match=r"grid\.resample=true"):
        build(tmp_path / "in", tmp_path / "store", GRID, "demo")
    config = GRID.model_copy(update={"resample": True})
    build(tmp_path / "in", tmp_path / "store", config, "demo")
    store = Store.open(tmp_path / "store")
    run = store.runs[0]
    assert run.resampled
    x = store.grid.world(store.voxels)[:, 0]
    expected = 1000 + 10 * (x - affine[0, 3]) / 6.0 + np.arange(6)[:, None]
    values = store.read_bold(0, 0, 6) * run.slope + run.intercept
    np.testing.assert_allclose(values, expected, atol=run.max_error + 1e-3)


def test_beyond_the_field_of_view_is_background(tmp_path: Path) -> None:
    data = bold_values(0, frames=4)[:, :, 14:]
    affine = mni_affine()
    affine[2, 3] += 14 * 6.0
    save_run(tmp_path / "in", "a", data, affine=affine, scale=(0.5, 100.0))
    build(tmp_path / "in", tmp_path / "store", GRID, "demo")
    store = Store.open(tmp_path / "store")
    outside = store.grid.world(store.voxels)[:, 2] < affine[2, 3] - 3.0
    assert outside.any()
    assert store.runs[0].coverage == pytest.approx(1 - outside.mean())
    assert not store.brain(0)[outside].any()
    assert (store.read_bold(0, 0, 4)[:, outside] == -200).all()  # 0.5 x -200 + 100 = 0


def test_strict_fails_on_any_refusal_and_twins_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "in", "a", bold_values(0, frames=4))
    twin = save_run(tmp_path / "in", "b", bold_values(1, frames=4))
    shutil.copy(twin, twin.with_name(twin.name.replace("_desc", "_res-2_desc")))
    with pytest.raises(SwiftError, match="several files of one run"):
        build(tmp_path / "in", tmp_path / "store", GRID, "demo", strict=True)
    assert build(tmp_path / "in", tmp_path / "store", GRID, "demo").taken == 1


def test_destinations_that_hold_something_else_are_left_alone(built: Path, cohort: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "in", "a", bold_values(0, frames=4))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no store"):
        build(tmp_path / "in", tmp_path / "mine", GRID, "demo")
    before = contents(built)
    with pytest.raises(UsageError, match="other files or options"):
        build(tmp_path / "in", built, GRID, "demo")
    with pytest.raises(UsageError, match="other files or options"):
        build(cohort, built, GRID, "another cohort")
    with pytest.raises(UsageError, match="no BOLD file"):
        build(tmp_path / "mine", tmp_path / "store", GRID, "demo")
    assert contents(built) == before
    assert not (tmp_path / "store").exists()


def test_files_without_a_subject_are_refused(tmp_path: Path) -> None:
    save_nifti(tmp_path / "in" / "scan.nii.gz", bold_values(0, frames=4), mni_affine())
    config = GRID.model_copy(update={"space": SPACE})
    with pytest.raises(SwiftError, match="no subject"):
        build(str(tmp_path / "in" / "*.nii.gz"), tmp_path / "store", config, "demo")


def test_long_runs_take_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "in", "a", bold_values(0, frames=25))
    build(tmp_path / "in", tmp_path / "one", GRID, "demo", salt=SALT)
    voxels = len(Store.open(tmp_path / "one").voxels)
    monkeypatch.setattr(layout, "SHARD_BYTES", 2 * 10 * voxels)
    build(tmp_path / "in", tmp_path / "three", GRID, "demo", salt=SALT)
    one, three = Store.open(tmp_path / "one"), Store.open(tmp_path / "three")
    assert len(layout.bold_shards(three.path, "int16", 0)) == 3
    np.testing.assert_array_equal(one.read_bold(0, 0, 25), three.read_bold(0, 0, 25))


def test_generated_data_are_told(tmp_path: Path) -> None:
    save_run(tmp_path / "in", "a", bold_values(0, frames=4))
    description = {"Name": "demo", "GeneratedBy": [{"Name": "swiftv2 synth"}]}
    (tmp_path / "in" / "dataset_description.json").write_text(json.dumps(description))
    build(tmp_path / "in", tmp_path / "store", GRID, "demo")
    assert Store.open(tmp_path / "store").generated


def test_a_third_of_half_precision_volumes_at_most(built: Path) -> None:
    store = Store.open(built)
    full = sum(run.frames for run in store.runs) * store.grid.size * 2
    assert sum(run.bytes for run in store.runs) < full / 3


def test_a_forked_child_is_told_to_open_again(built: Path) -> None:
    store = Store.open(built)
    store._pid = os.getpid() + 1
    with pytest.raises(SwiftError, match="fork"):
        store.read_bold(0, 0, 2)
