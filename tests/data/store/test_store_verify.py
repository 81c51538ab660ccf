import errno
import io
import json
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import swiftv2_run
from store_files import GRID, bold_values, contents, save_run

from swiftv2 import cli
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes.append import append
from swiftv2.data.changes.build import build
from swiftv2.data.changes.drop import drop, read_withdrawals
from swiftv2.data.store import layout
from swiftv2.data.store.contents import info
from swiftv2.data.store.reader import Store
from swiftv2.data.store.verify import verify
from swiftv2.data.synth import generate
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sha256

FRAMES = 24


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for number in range(3):
        save_run(root / "in", f"s{number}", bold_values(number, frames=FRAMES), tr=(2.0, 2.0, 0.8)[number])
    build(root / "in", root / "store", GRID, "demo", salt="salt")
    return root / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def damage(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 16
    path.write_bytes(bytes(data))


def test_a_sound_store_is_sound(store: Path) -> None:
    before = contents(store)
    seen: list[tuple[int, int, int, int]] = []
    report = verify(store, progress=lambda *state: seen.append(state))
    assert report.ok
    assert (report.runs, seen[-1]) == (3, (3, 3, report.bytes, report.bytes))
    assert report.bytes == sum(run.bytes for run in Store.open(store).runs)
    assert contents(store) == before


@pytest.mark.parametrize("at", [0.0, 0.1, 0.37, 0.5, 0.93, 0.9999, 1.0])
def test_a_flipped_bit_names_store_run_and_frames(at: float, store: Path) -> None:
    opened = Store.open(store)
    run = opened.runs[1]
    damage(layout.bold_shards(store, run.dtype, run.row)[0], at)
    with pytest.raises(SwiftError, match=f"{run.key}, frames 0 to {FRAMES - 1}") as error:
        opened.read_bold(1, 0, FRAMES)
    assert str(store) in str(error.value)
    assert "\n" not in str(error.value)
    assert [key for key, _ in verify(store).bad] == [run.key]
    np.testing.assert_array_equal(opened.read_bold(0, 0, 3), Store.open(store).read_bold(0, 0, 3))


@pytest.mark.parametrize("name", ["voxel_mean", "voxel_std", "brain"])
def test_damage_to_shared_shards_is_found(name: str, store: Path) -> None:
    damage(store / name / "c.0.0", 0.5)
    assert not verify(store).ok


def test_a_missing_or_cut_shard_is_no_run_of_zeros(store: Path) -> None:
    opened = Store.open(store)
    first, second = (layout.bold_shards(store, opened.runs[i].dtype, opened.runs[i].row)[0] for i in (0, 1))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(SwiftError, match="missing"):
        opened.read_bold(0, 5, 10)
    with pytest.raises(SwiftError, match=opened.runs[1].key):
        opened.read_bold(1, 5, 10)
    assert {key for key, _ in verify(store).bad} == {opened.runs[0].key, opened.runs[1].key}


@pytest.mark.parametrize("name", ["voxel_mean", "voxel_std", "brain"])
def test_a_missing_shared_shard_is_no_empty_brain(name: str, store: Path) -> None:
    for shard in (store / name).glob("c.*"):
        shard.unlink()
    with pytest.raises(SwiftError, match=f"{name} is missing"):
        getattr(Store.open(store), name)(0)
    assert not verify(store).ok


@pytest.mark.parametrize("name", ["framewise_displacement", "censored", "non_steady_state"])
def test_a_lost_shard_of_confounds_is_not_unknown_confounds(name: str, tmp_path: Path) -> None:
    generate(SynthConfig(subjects=8, voxel_mm=6, frames=24), tmp_path / "in")
    build(tmp_path / "in", tmp_path / "store", GRID, "a")
    store = Store.open(tmp_path / "store")
    told = [i for i, run in enumerate(store.runs) if name in run.confounds]
    assert told
    assert store.frame_values(name, told[0]) is not None
    (tmp_path / "store" / name / "c.0.0").unlink()
    with pytest.raises(SwiftError, match=f"{name} is missing"):
        Store.open(tmp_path / "store").frame_values(name, told[0])
    assert {store.runs[i].key for i in told} <= {key for key, _ in verify(tmp_path / "store").bad}


def test_statistics_that_do_not_fit_are_found(store: Path) -> None:
    opened = Store.open(store)
    shards = [layout.bold_shards(store, run.dtype, run.row)[0] for run in opened.runs[:2]]
    shards[0].write_bytes(shards[1].read_bytes())  # sound bytes, but of another run
    problems = [problem for key, problem in verify(store).bad if key == opened.runs[0].key]
    assert any("statistics" in problem for problem in problems)


def test_a_changed_index_is_refused(store: Path) -> None:
    index = store / layout.RUNS_FILE
    index.write_text(index.read_text().replace('"tr": 2.0', '"tr": 0.5'))
    with pytest.raises(SwiftError, match="checksum"):
        Store.open(store)
    index.unlink()
    with pytest.raises(SwiftError, match="missing"):
        verify(store)


def test_other_folders_and_formats_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SwiftError, match="is no store"):
        Store.open(tmp_path)
    metadata = json.loads((store / "zarr.json").read_text())
    metadata["attributes"]["swiftv2"]["format"] = 99
    (store / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(SwiftError, match="format 99"):
        Store.open(store)
    (store / "zarr.json").write_text("{")
    with pytest.raises(SwiftError, match="damaged"):
        Store.open(store)


def test_ids_open_to_others_are_reported(store: Path) -> None:
    (store / layout.SUBJECTS_FILE).chmod(0o644)
    assert [key for key, _ in verify(store).bad] == ["store"]


def edit_ids(store: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = store / layout.SUBJECTS_FILE
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda ids: ids.update(salt="another"), "its salt is not"),
        (lambda ids: ids.pop("labels"), "no salt, subjects and labels"),
        (lambda ids: ids.update(subjects=[]), "no salt, subjects and labels"),
        (lambda ids: ids["subjects"].popitem(), "1 subjects have no id in it (s"),
        (
            lambda ids: ids["subjects"].update(s0={"cohort": "demo", "id": "x"}),
            "1 subjects are named in it and have no run (s0)",
        ),
        (lambda ids: ids["labels"].append({"subject": "s0"}), "1 subjects are named in it and have no run (s0)"),
        (lambda ids: next(iter(ids["subjects"].values())).update(id="x"), "1 subjects have an id that does not give their key"),
    ],
)
def test_ids_that_do_not_fit_the_runs_are_found(edit: Callable[[dict[str, Any]], object], told: str, store: Path) -> None:
    edit_ids(store, edit)
    bad = verify(store, workers=1).bad
    assert {key for key, _ in bad} == {"store"}
    assert any(told in text for _, text in bad), bad


def test_files_of_ids_that_are_damaged_or_gone_are_found(store: Path) -> None:
    (store / layout.REPORT_FILE).write_text('{"file": \n')
    (store / layout.SUBJECTS_FILE).write_text("{")
    assert [text.partition(":")[0] for _, text in verify(store, workers=1).bad] == [layout.REPORT_FILE, layout.SUBJECTS_FILE]
    (store / layout.SUBJECTS_FILE).unlink()
    (store / layout.REPORT_FILE).unlink()  # which its owner may
    assert [text.partition(":")[0] for _, text in verify(store, workers=1).bad] == [f"{layout.SUBJECTS_FILE} is missing"]


def test_ids_that_this_user_may_not_read_are_no_damage(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Any = io.open

    def denying(file: object, *arguments: Any, **options: Any) -> Any:
        """What the system does where the user is not root, whom these tests may run as."""
        if str(file).endswith(layout.SUBJECTS_FILE):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(io, "open", denying)
    report = verify(store, workers=1)
    assert (report.ok, len(report.notes)) == (True, 1)
    assert "subjects.json was not checked" in report.notes[0]
    assert cli.main(["store", "verify", str(store), "--workers", "1"]) == 0
    assert "note: subjects.json was not checked" in capsys.readouterr().out


def test_every_column_of_the_frames_is_checked(tmp_path: Path) -> None:
    """Rows of per-frame arrays grow by columns: each is a file of its own, and the first one may be absent."""
    for part, frames in (("in", FRAMES), ("more", FRAMES + 20)):
        generate(SynthConfig(subjects=8, voxel_mm=6, frames=frames, seed=frames), tmp_path / part)
    build(tmp_path / "in", tmp_path / "store", GRID, "a")
    append(tmp_path / "more", tmp_path / "store", "b")
    assert verify(tmp_path / "store", workers=1).ok
    first, second = (tmp_path / "store" / "censored" / f"c.0.{column}" for column in (0, 1))
    data = second.read_bytes()
    footer = 16 * layout.ROWS_PER_SHARD + 4
    second.write_bytes(data[:-footer] + b"loose" + data[-footer:])
    assert ("store", "censored/c.0.1 holds bytes that belong to no row") in verify(tmp_path / "store", workers=1).bad
    first.unlink()
    store = Store.open(tmp_path / "store")
    bad = verify(tmp_path / "store", workers=1).bad
    assert ("store", "censored/c.0.1 holds bytes that belong to no row") in bad
    assert {run.key for run in store.runs if "censored" in run.confounds} <= {key for key, _ in bad}
    second.write_bytes(data[:-1])
    assert any("censored/c.0.1 is damaged" in text for _, text in verify(tmp_path / "store", workers=1).bad)


def change_index(store: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    """Edit the lines of the index and make the store whole again."""
    metadata = json.loads((store / "zarr.json").read_text())
    attributes = metadata["attributes"]["swiftv2"]
    index = store / attributes["index"]
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    edit(lines)
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    attributes["runs_sha256"] = sha256(index)
    (store / "zarr.json").write_text(json.dumps(metadata))


def withdraw(lines: list[dict[str, Any]], place: int = 1) -> None:
    """Make a tombstone of a line, and leave the data to be found."""
    lines[place] |= {
        "withdrawn": 1,
        "statistics": [0.0] * 6,
        "slope": 0.0,
        "brain_voxels": 0,
        "coverage": 0.0,
        "max_error": 0.0,
    }
    lines[place] |= {"source_shape": [], "source_affine": [], "source_sha256": "", "bytes": 0}


def test_data_of_a_withdrawn_run_are_found(store: Path) -> None:
    run = Store.open(store).runs[1]
    change_index(store, withdraw)
    bad = verify(store).bad
    assert {key for key, _ in bad} == {run.key}
    texts = " ".join(text for _, text in bad)
    for left in (
        "bold/int16/c.1.0.0",
        "row of voxel_mean",
        "row of voxel_std",
        "row of brain",
        "subjects.json",
        "build_report.jsonl",
    ):
        assert left in texts, left
    assert all("swiftv2 store drop" in text for _, text in bad)


def test_appended_and_dropped_stores_are_sound_until_something_comes_back(store: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "more", "s7", bold_values(7, frames=FRAMES + 20))
    append(tmp_path / "more", store, "later")
    assert verify(store, workers=1).bad == ()
    before = contents(store)
    (tmp_path / "withdrawn.txt").write_text("s1\n")
    drop(store, read_withdrawals(store, tmp_path / "withdrawn.txt"))
    assert verify(store, workers=1).bad == ()
    facts = info(store)
    assert (facts["version"], facts["runs"], facts["withdrawn"], facts["cohorts"]["demo"]["withdrawn"]) == (3, 3, 1, 1)
    assert [change["change"] for change in facts["history"]] == ["build", "append", "drop"]
    assert list(facts["cohorts"]) == ["demo", "later"]
    gone = next(run for run in Store.open(store).runs if run.withdrawn)
    # A backup that is copied over the store brings the data back, beside the newer index.
    for name, data in before.items():
        if name.startswith(("bold/", "brain/", "voxel_")) or name in (layout.SUBJECTS_FILE, layout.REPORT_FILE):
            (store / name).write_bytes(data)
    bad = verify(store, workers=1).bad
    assert {key for key, _ in bad} == {gone.key}
    assert len(bad) == 6


def test_a_tombstone_that_still_tells_of_its_data_is_found(store: Path) -> None:
    change_index(store, lambda lines: lines[0].update(withdrawn=1))
    assert any("line of the index" in text for _, text in verify(store).bad)


def test_what_does_not_belong_is_found(store: Path) -> None:
    opened = Store.open(store)
    shard = layout.bold_shards(store, "int16", 0)[0]
    (store / "sub-ab12_notes.txt").write_text("mine")
    shutil.copy(shard, shard.with_name("c.7.0.0"))  # a row of no run
    shutil.copy(shard, shard.with_name("c.0.4.0"))  # frames that no run has
    (store / ".drop").mkdir()
    (store / ".drop" / "plan.json").write_text("{}")
    assert verify(store).bad == (
        ("store", ".drop/ is left of a change that was interrupted: give the same `swiftv2 store drop` again"),
        ("store", "1 files are no part of the store (sub-*_notes.txt): move them away"),
        ("store", "2 files in bold/int16 are no part of the store (c.0.4.0, c.7.0.0): move them away"),
    )
    np.testing.assert_array_equal(opened.read_bold(0, 0, 3), Store.open(store).read_bold(0, 0, 3))


def test_bytes_of_no_chunk_are_found(store: Path) -> None:
    """As a rewrite in place would leave them: the shard's own table is sound and tells nothing of them."""
    opened = Store.open(store)
    shard = layout.bold_shards(store, "int16", 1)[0]
    data = shard.read_bytes()
    array = opened._arrays["bold/int16"]
    footer = 16 * (array.shard_length // array.chunk_length) + 4
    shard.write_bytes(data[:-footer] + b"left of another run" + data[-footer:])
    small = store / "brain" / "c.0.0"
    small.write_bytes(
        small.read_bytes()[: -16 * layout.ROWS_PER_SHARD - 4] + b"left" + small.read_bytes()[-16 * layout.ROWS_PER_SHARD - 4 :]
    )
    texts = dict(verify(store).bad)
    assert "bytes that belong to no row" in texts["store"]
    assert opened.runs[1].key in texts


def test_small_rows_of_no_run_are_read_too(store: Path) -> None:
    """The shard that three runs share is damaged in the row of one: it is named, and the others are sound."""
    run = Store.open(store).runs[2]
    table = np.frombuffer((store / "voxel_std" / "c.0.0").read_bytes()[-16 * layout.ROWS_PER_SHARD - 4 : -4], "<u8").reshape(
        -1, 2
    )
    offset, length = (int(n) for n in table[2])
    path = store / "voxel_std" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 1
    path.write_bytes(bytes(data))
    assert [key for key, _ in verify(store).bad] == [run.key]
    change_index(store, lambda lines: lines.pop())
    assert any("row 2 of voxel_std" in text for key, text in verify(store).bad if key == "store")


def test_index_lines_that_make_no_sense_are_found(store: Path) -> None:
    run = Store.open(store).runs[0]
    change_index(store, lambda lines: lines[0]["statistics"].__setitem__(1, float("nan")))
    assert any("not finite" in text for key, text in verify(store).bad if key == run.key)


def test_workers_and_ranks_find_the_same(store: Path) -> None:
    runs = Store.open(store).runs
    damage(layout.bold_shards(store, "int16", 0)[0], 0.4)
    damage(layout.bold_shards(store, "int16", 2)[0], 0.7)
    damage(store / "brain" / "c.0.0", 0.0)
    (store / "stray").write_bytes(b"")
    alone = verify(store, workers=1)
    assert {runs[0].key, runs[2].key, "store"} <= {key for key, _ in alone.bad}
    assert not any("b'" in text or "\\x" in text for _, text in alone.bad), "no bytes of the files in messages"
    seen: list[tuple[int, int, int, int]] = []
    assert verify(store, lambda *state: seen.append(state), workers=2) == alone
    assert seen[-1][:2] == (3, 3)
    assert seen[-1][2] == seen[-1][3] == sum(run.bytes for run in runs)
    done = swiftv2_run(["store", "verify", str(store), "--json"], ranks=2, launcher="mpiexec")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["bad"] == [list(pair) for pair in alone.bad]
    with pytest.raises(UsageError, match="--workers"):
        verify(store, workers=0)
    (store / layout.RUNS_FILE).unlink()
    done = swiftv2_run(["store", "verify", str(store)], ranks=2, launcher="mpiexec")
    assert done.returncode == 1
    assert done.stderr.count("is missing") == 1, "one line for all ranks"


def test_reading_beyond_the_end_is_refused(store: Path) -> None:
    opened = Store.open(store)
    for start, frames, stride in ((0, FRAMES + 1, 1), (FRAMES - 3, 2, 3), (-1, 2, 1), (0, 0, 1)):
        with pytest.raises(SwiftError, match="asked for"):
            opened.read_bold(0, start, frames, stride)
    assert opened.read_bold(0, FRAMES - 4, 2, 3).shape == (2, len(opened.voxels))


def test_threads_and_spawned_workers_read_the_same(store: Path) -> None:
    opened = Store.open(store)
    expected = [opened.read_bold(index, 0, FRAMES) for index in range(3)]
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            index, start = int(rng.integers(3)), int(rng.integers(FRAMES - 4))
            if not np.array_equal(opened.read_bold(index, start, 4), expected[index][start : start + 4]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301  # our own object, as a spawned worker gets it
    np.testing.assert_array_equal(again.read_bold(2, 0, FRAMES), expected[2])


def test_info_counts(store: Path) -> None:
    facts = info(store)
    assert (facts["runs"], facts["subjects"], facts["frames"]) == (3, 3, 3 * FRAMES)
    assert facts["tr"] == {"0.8": 1, "2": 2}
    assert facts["hours"] == pytest.approx(FRAMES * 4.8 / 3600, abs=1e-4)
    assert facts["cohorts"]["demo"]["runs"] == 3
    assert facts["files"] == len(contents(store))
    assert facts["bytes"] == sum(len(data) for data in contents(store).values())
    assert facts["cohorts"]["demo"]["bytes"] == sum(run.bytes for run in Store.open(store).runs)
    assert (facts["censored"], facts["framewise_displacement"]) == (None, None)
    assert facts["files_per_run"] == pytest.approx(facts["files"] / 3, abs=1e-3)
    assert json.loads(json.dumps(facts)) == facts
    change_index(store, withdraw)
    assert [info(store)["cohorts"]["demo"][name] for name in ("runs", "subjects", "withdrawn")] == [2, 2, 1]


def test_info_of_motion_and_labels(tmp_path: Path) -> None:
    displacement = [[None, 0.2, 0.7, 0.1, 0.2], [None, 0.1, 0.1, 0.1, 0.1]]
    for number, values in enumerate(displacement):
        path = save_run(tmp_path / "in", f"s{number}", bold_values(number, frames=5))
        lines = ["framewise_displacement\tmotion_outlier00"]
        lines += [f"{'n/a' if value is None else value}\t{int((value or 0) > 0.5)}" for value in values]
        stem = path.name.partition("_space-")[0]
        (path.parent / f"{stem}_desc-confounds_timeseries.tsv").write_text("\n".join(lines) + "\n")
    save_run(tmp_path / "in", "s2", bold_values(2, frames=5))
    (tmp_path / "in" / "participants.tsv").write_text("participant_id\tage\nsub-s0\t31\nsub-s1\tn/a\n")
    build(tmp_path / "in", tmp_path / "store", GRID, "demo", salt="salt")
    facts = info(tmp_path / "store")
    assert facts["censored"] == pytest.approx(0.1)
    assert facts["framewise_displacement"] == pytest.approx((0.2 + 0.7 + 0.1 + 0.2 + 0.4) / 8, abs=1e-6)
    assert (facts["confounds"], facts["unlabelled"]) == (2, 2)
    (tmp_path / "store" / layout.SUBJECTS_FILE).unlink()
    assert info(tmp_path / "store")["unlabelled"] is None
