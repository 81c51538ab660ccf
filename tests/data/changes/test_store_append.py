import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from store_changes import BOX, SALT, TINY, append_tiny, assert_same, build_tiny, everything, save_cohort
from store_files import bold_values, contents, mni_affine, nifti, save_nifti, save_run

from swiftv2 import cli
from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.data.store import layout
from swiftv2.data.store.contents import info
from swiftv2.data.store.reader import Store
from swiftv2.data.store.verify import verify
from swiftv2.errors import DamagedError, SwiftError, UsageError


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    save_cohort(root / "one", "abc")
    save_cohort(root / "two", "ad", first=5, frames=17)
    return root


@pytest.fixture(scope="module")
def original(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("original") / "store"
    build_tiny(sources / "one", store)
    return store


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def test_new_runs_come_behind_those_that_are_there(sources: Path, store: Path) -> None:
    before, files = everything(store), contents(store)
    reader = Store.open(store)
    report = append_tiny(sources / "two", store)
    assert (report.version, report.taken, report.present, report.refused) == (2, 2, 0, ())
    opened = Store.open(store)
    assert [(run.row, run.since, run.cohort) for run in opened.runs] == [
        (0, 1, "one"),
        (1, 1, "one"),
        (2, 1, "one"),
        (3, 2, "two"),
        (4, 2, "two"),
    ]
    assert opened.runs[:3] == reader.runs
    after = everything(store)
    assert_same({key: after[key] for key in before}, before)
    assert {name: data for name, data in contents(store).items() if name in files and "/c." in name and "bold" in name} == {
        name: data for name, data in files.items() if "/c." in name and "bold" in name
    }
    history = opened.attributes["history"]
    assert [(one["version"], one["change"], one["runs"]) for one in history] == [(1, "build", 3), (2, "append", 5)]
    assert history[1]["runs_sha256"] == opened.fingerprint
    assert opened.attributes["store_id"] == reader.attributes["store_id"]
    assert sorted(path.name for path in store.glob("runs*")) == ["runs.2.jsonl"]
    assert not list(store.glob(".*"))
    assert verify(store).ok
    # Who opened the former version still has it, whole.
    assert reader.version == 1
    for index, run in enumerate(reader.runs):
        np.testing.assert_equal(reader.read_bold(index, 0, run.frames), before[run.key][0])
        np.testing.assert_equal(reader.voxel_mean(index), before[run.key][2])


def test_the_runs_are_what_a_build_of_them_gives(sources: Path, store: Path, tmp_path: Path) -> None:
    append_tiny(sources / "two", store)
    build_tiny(sources / "two", tmp_path / "alone", cohort="two")
    appended, alone = everything(store), everything(tmp_path / "alone")
    assert_same({key: appended[key] for key in alone}, alone)
    kept = [run for run in Store.open(store).runs if run.since == 2]
    for one, other in zip(kept, Store.open(tmp_path / "alone").runs, strict=True):
        assert (
            dataclasses.replace(one, row=other.row, since=1, bytes=other.bytes) == other
        )  # Their shards are of other lengths.
    keys = Store.open(store).subject_ids()
    assert set(keys) == {"one/a", "one/b", "one/c", "two/a", "two/d", "b", "sub-b", "c", "sub-c", "d", "sub-d"}
    assert keys["one/a"] != keys["two/a"]


@pytest.mark.filterwarnings("ignore:Object at")  # the index and the ids are no part of the Zarr hierarchy
def test_longer_runs_take_more_shards_and_columns(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ROWS_PER_SHARD", 2)
    build_tiny(sources / "one", tmp_path / "store")
    save_cohort(tmp_path / "long", "xyz", first=9, frames=45)
    before = everything(tmp_path / "store")
    append_tiny(tmp_path / "long", tmp_path / "store")
    store = Store.open(tmp_path / "store")
    after = everything(tmp_path / "store")
    assert_same({key: after[key] for key in before}, before)
    assert [len(layout.bold_shards(store.path, run.dtype, run.row)) for run in store.runs] == [1, 1, 1, 4, 4, 4]
    group = zarr.open_group(store.path, mode="r")
    for index, run in enumerate(store.runs):
        bold: Any = group[f"bold/{run.dtype}"]
        np.testing.assert_array_equal(bold[run.row, : run.frames], store.read_bold(index, 0, run.frames))
        displacement: Any = group["framewise_displacement"]
        values = store.frame_values("framewise_displacement", index)
        if values is not None:
            np.testing.assert_array_equal(displacement[run.row, : run.frames], values)
            assert np.isfinite(values[1:]).all()
        else:
            assert np.isnan(displacement[run.row]).all()
    assert sorted(path.name for path in (store.path / "voxel_mean").glob("c.*")) == ["c.0.0", "c.1.0", "c.2.0"]
    assert verify(store.path).ok


def test_what_is_there_already_is_passed_over(sources: Path, store: Path, tmp_path: Path) -> None:
    append_tiny(sources / "two", store)
    before = contents(store)
    again = append_tiny(sources / "two", store)
    assert (again.nothing_to_do, again.taken, again.version) == (True, 2, 2)
    same = append_tiny(sources / "one", store, cohort="one")
    assert (same.nothing_to_do, same.taken, same.present) == (True, 0, 3)
    assert contents(store) == before
    grown = Path(shutil.copytree(sources / "two", tmp_path / "grown"))
    save_run(grown, "e", bold_values(20, 9, TINY))
    other = save_run(grown, "a", bold_values(21, 18, TINY))
    report = append_tiny(grown, store)
    assert (report.version, report.taken, report.present) == (3, 1, 1)
    assert ["another file of this run" in reason for _, reason in report.refused] == [True]
    lines = [json.loads(line) for line in report.report.read_text().splitlines()]
    assert [line["file"] for line in lines if line["status"] == "refused"] == [other.relative_to(grown).as_posix()]
    assert [line["version"] for line in lines] == [1, 1, 1, 2, 2, 3, 3]
    twice = append_tiny(grown, store)
    assert (twice.nothing_to_do, twice.taken, twice.present, len(twice.refused)) == (True, 0, 2, 1)


def test_labels_add_up_and_may_not_differ(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.tsv"
    table.write_text("participant_id\tage\tsex\nb\t21\tf\nd\t26\tm\n")
    before = contents(store)
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("participant_id\tage\nb\t99\nd\t26\n")
    save_run(tmp_path / "new", "d", bold_values(6, 18, TINY))
    with pytest.raises(UsageError, match=r"labels differ .*age"):
        append_tiny(tmp_path / "new", store, cohort="one", labels=wrong)
    assert contents(store) == before
    append_tiny(tmp_path / "new", store, cohort="one", labels=table)
    opened = Store.open(store)
    names = {key: name for name, key in opened.subject_ids().items() if "/" in name}
    found = {names[run.subject]: labels for run, labels in zip(opened.runs, opened.labels(), strict=True)}
    assert found == {
        "one/a": {"age": "20"},
        "one/b": {"age": "21", "sex": "f"},
        "one/c": {"age": "22"},
        "one/d": {"age": "26", "sex": "m"},
    }


def test_labels_without_a_run_that_brings_them_are_refused(sources: Path, store: Path, tmp_path: Path) -> None:
    table = tmp_path / "more.tsv"
    table.write_text("participant_id\tage\tsex\na\t20\tm\nd\t26\tf\n")
    same = sources / "one" / "participants.tsv"
    append_tiny(sources / "two", store)
    before = contents(store)
    with pytest.raises(UsageError, match="--labels"):
        build_tiny(sources / "one", store, labels=table)
    with pytest.raises(UsageError, match="--labels"):
        append_tiny(sources / "one", store, cohort="one", labels=table)
    # What a command that is given again says is in the store.
    assert build_tiny(sources / "one", store, labels=same).nothing_to_do
    assert append_tiny(sources / "one", store, cohort="one", labels=same).nothing_to_do
    assert contents(store) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": GridConfig(voxel_mm=6.0)}, r"grid\.voxel_mm=6"),
        ({"grid": GridConfig(space="MNI152NLin2009cAsym")}, r"grid\.space="),
        ({"grid": GridConfig(orientation="LAS")}, r"grid\.orientation=LAS"),
        ({"compression": "zstd"}, "--compression lz4"),
        ({"clean": CleanConfig(detrend=True)}, r"clean\.detrend=True"),
        ({"salt": "f" * 16}, "another salt"),
        ({"expect_tr": 3.0}, "TR"),
    ],
)
def test_what_contradicts_the_store_is_refused(options: dict[str, Any], message: str, sources: Path, store: Path) -> None:
    before = contents(store)
    with pytest.raises(SwiftError, match=message):
        append_tiny(sources / "two", store, **options)
    assert contents(store) == before
    agreeing = {"grid": BOX, "compression": "lz4", "clean": CleanConfig(strategy="none"), "salt": SALT, "expect_tr": 2.0}
    assert append_tiny(sources / "two", store, **agreeing).taken == 2


def test_other_spaces_and_grids_are_refused_run_by_run(store: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    shifted = mni_affine()
    shifted[:3, 3] += 1.5
    save_run(root, "good", bold_values(1, 9, TINY))
    save_run(root, "space", bold_values(2, 9, TINY), space="MNI152NLin2009cAsym")
    save_run(root, "grid", bold_values(3, 9, TINY), affine=shifted)
    save_run(root, "short", bold_values(4, 9, (5, 8, 6)))
    report = append_tiny(root, store)
    assert report.taken == 1
    assert sorted(reason.split(" ")[0] for _, reason in report.refused) == ["its", "its", "space"]
    save_nifti(tmp_path / "plain" / "sub-p_bold.nii.gz", bold_values(5, 9, TINY), mni_affine())
    pattern = str(tmp_path / "plain" / "*.nii.gz")
    with pytest.raises(SwiftError, match="space unknown"):
        append_tiny(pattern, store)
    assert append_tiny(pattern, store, grid=GridConfig(space=BOX.space)).taken == 1


def test_an_append_that_takes_nothing_changes_nothing(store: Path, tmp_path: Path) -> None:
    before = contents(store)
    save_run(tmp_path / "bad", "x", np.full((*TINY, 30), 700, dtype=np.int16))
    report = append_tiny(tmp_path / "bad", store)
    assert (report.nothing_to_do, report.taken, len(report.refused), report.version) == (True, 0, 1, 1)
    lines = report.report.read_text().splitlines()
    assert json.loads(lines[-1])["reason"].startswith("constant")
    assert {name: data for name, data in contents(store).items() if name != layout.REPORT_FILE} == {
        name: data for name, data in before.items() if name != layout.REPORT_FILE
    }
    save_run(tmp_path / "bad", "y", bold_values(0, 9, TINY))
    with pytest.raises(SwiftError, match="constant"):
        append_tiny(tmp_path / "bad", store, strict=True)
    assert Store.open(store).version == 1
    assert info(store)["unfinished"] == "append"
    with pytest.raises(UsageError, match="other files or options is unfinished"):
        append_tiny(tmp_path / "bad", store, cohort="third", strict=True)
    shutil.rmtree(store / layout.STAGING)
    assert append_tiny(tmp_path / "bad", store).taken == 1
    assert info(store)["unfinished"] is None
    assert verify(store).ok


def test_an_append_that_was_given_up_leaves_nothing(sources: Path, store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(store, tmp_path / "other"))
    save_run(tmp_path / "long", "x", bold_values(1, 40, TINY).astype(np.uint8))
    save_run(tmp_path / "long", "y", np.full((*TINY, 6), 700, dtype=np.int16))
    with pytest.raises(SwiftError, match="refused"):
        append_tiny(tmp_path / "long", store, strict=True)
    assert (store / "bold" / "uint8").is_dir()
    assert Store.open(store).version == 1
    shutil.rmtree(store / layout.STAGING)
    append_tiny(sources / "two", store)
    append_tiny(sources / "two", other)
    assert contents(store) == contents(other)


def test_a_number_type_that_is_new_gets_its_array(store: Path, tmp_path: Path) -> None:
    data = bold_values(1, 15, TINY).astype(np.uint8)
    save_run(tmp_path / "in", "u", data)
    append_tiny(tmp_path / "in", store)
    opened = Store.open(store)
    assert [run.dtype for run in opened.runs] == ["int16", "int16", "int16", "uint8"]
    expected = np.moveaxis(data, -1, 0).reshape(15, -1)
    np.testing.assert_array_equal(opened.read_bold(3, 0, 15), expected)
    assert verify(store).ok


def test_a_damaged_row_beside_the_new_ones_is_named(sources: Path, store: Path) -> None:
    shard = store / "voxel_mean" / "c.0.0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(SwiftError, match="of voxel_mean cannot be read"):
        append_tiny(sources / "two", store)
    assert shard.read_bytes() == bytes(data)


@pytest.mark.parametrize("name", ["brain", "voxel_mean", "voxel_std", "framewise_displacement", "censored"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_lost_row_beside_the_new_ones_is_not_taken_for_empty(name: str, whole: bool, sources: Path, store: Path) -> None:
    shard = store / name / "c.0.0"
    if whole:
        shard.unlink()
    else:
        layout.keep_rows(shard, {next(run.row for run in Store.open(store).runs if not run.confounds)})
    with pytest.raises(DamagedError, match=f"of {name} cannot be read or is lost: restore {name} from a copy, then append"):
        append_tiny(sources / "two", store)
    assert Store.open(store).version == 1


def test_stores_of_fewer_runs_a_shard_stay_as_they_are(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ROWS_PER_SHARD", 2)
    build_tiny(sources / "one", tmp_path / "store")
    monkeypatch.undo()
    before = everything(tmp_path / "store")
    append_tiny(sources / "two", tmp_path / "store")
    after = everything(tmp_path / "store")
    assert_same({key: after[key] for key in before}, before)
    assert sorted(path.name for path in (tmp_path / "store" / "brain").glob("c.*")) == ["c.0.0", "c.1.0", "c.2.0"]


def test_nothing_to_append_to(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(SwiftError, match="is no store"):
        append_tiny(sources / "two", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command(sources: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = ["store", "append", str(sources / "two"), str(store)]
    assert cli.main(bare) == 2
    assert "say --cohort NAME" in (said := capsys.readouterr().err)
    assert "has one" in said
    for tr in ("nan", "0", "-1", "inf"):
        assert cli.main([*bare, "--cohort", "two", f"--tr={tr}"]) == 2
        assert "--tr" in capsys.readouterr().err
    words = [*bare, "--cohort", "two", "--json"]
    assert cli.main([*words, "clean.detrend=true"]) == 2
    assert "clean.detrend" in capsys.readouterr().err
    assert cli.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["version"], answer["taken"], answer["present"], answer["nothing_to_do"]) == (2, 2, 0, False)
    assert cli.main(words[:-1]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_real_data_append(real_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(real_store, tmp_path / "store"))
    runs = Store.open(store).runs
    loaded: Any = nifti.load(min((real_store.parent / "files").glob("*.nii.gz")))
    save_nifti(tmp_path / "sub-3_bold.nii.gz", np.asarray(loaded.dataobj)[..., 5:], loaded.affine, tr=1.35)
    grid = GridConfig(space="native-nitime")
    assert append_tiny(str(tmp_path / "*.nii.gz"), store, grid=grid, cohort="nitime").taken == 1
    opened = Store.open(store)
    assert opened.runs[:2] == runs
    first = next(i for i, run in enumerate(runs) if run.subject == opened.subject_ids()["1"])
    np.testing.assert_array_equal(opened.read_bold(2, 0, 35), opened.read_bold(first, 5, 35))
