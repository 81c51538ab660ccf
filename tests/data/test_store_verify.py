import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from store_files import GRID, bold_values, contents, save_run

from swiftv2.data import layout
from swiftv2.data.build import build
from swiftv2.data.contents import info
from swiftv2.data.store import Store
from swiftv2.data.verify import verify
from swiftv2.errors import SwiftError

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
    assert json.loads(json.dumps(facts)) == facts
