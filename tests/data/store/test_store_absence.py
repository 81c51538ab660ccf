"""No fill value stands in for a file that is missing, whether it alone is gone or the whole store is away."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_changes import append_tiny, build_tiny, save_cohort

from swiftv2.data.store import layout
from swiftv2.data.store.absence import AwayError
from swiftv2.data.store.reader import Store
from swiftv2.errors import DamagedError, SwiftError

READS: dict[str, Callable[[Store, int], Any]] = {
    "bold": lambda store, run: store.read_bold(run, 2, 7),
    "brain": lambda store, run: store.brain(run),
    "voxel_mean": lambda store, run: store.voxel_mean(run),
    "voxel_std": lambda store, run: store.voxel_std(run),
    "framewise_displacement": lambda store, run: store.frame_values("framewise_displacement", run),
    "censored": lambda store, run: store.frame_values("censored", run),
    "non_steady_state": lambda store, run: store.frame_values("non_steady_state", run),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 12 to 14 frames, then some of 45 and more: their frames lie in several files."""
    root = tmp_path_factory.mktemp("absence")
    save_cohort(root / "short", "abc")
    save_cohort(root / "long", "xyz", first=9, frames=45)
    build_tiny(root / "short", root / "store")
    append_tiny(root / "long", root / "store")
    return root / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def _told(store: Store) -> int:
    """The longest run whose confounds are known."""
    known = [i for i, run in enumerate(store.runs) if "censored" in run.confounds]
    return max(known, key=lambda i: store.runs[i].frames)


@pytest.mark.parametrize("name", READS)
def test_a_store_that_is_away_is_no_fill_value_and_is_read_again_once_it_is_back(name: str, store: Path) -> None:
    read, opened = READS[name], Store.open(store)
    run = _told(opened)
    expected = READS[name](Store.open(store), run)
    elsewhere = store.rename(store.with_name("elsewhere"))
    for _ in range(2):
        with pytest.raises(AwayError, match=f"store {store}: run {opened.runs[run].key}.* cannot be read now") as told:
            read(opened, run)
        assert told.value.strerror == "No such file or directory"
        assert not isinstance(told.value, DamagedError)
    store.mkdir()  # The mount point of a file system that is not mounted.
    with pytest.raises(AwayError):
        read(opened, run)
    store.rmdir()
    elsewhere.rename(store)
    np.testing.assert_array_equal(read(opened, run), expected)


@pytest.mark.parametrize("name", ["framewise_displacement", "censored", "non_steady_state"])
def test_one_lost_file_of_several_that_hold_a_run_s_frames_is_damage(name: str, store: Path) -> None:
    run = _told(Store.open(store))
    files = sorted((store / name).glob("c.0.*"))
    assert len(files) > 1
    files[-1].unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        Store.open(store).frame_values(name, run)


def test_lost_voxels_are_no_zeros(store: Path) -> None:
    (store / "voxels" / "c.0").unlink()
    with pytest.raises(DamagedError, match="voxels is missing"):
        Store.open(store)


def test_a_file_without_a_store_around_it_is_no_damage(store: Path) -> None:
    """A lost shard of a store that is away too: who can tell."""
    opened = Store.open(store)
    layout.bold_shards(store, opened.runs[0].dtype, 0)[0].unlink()
    with pytest.raises(DamagedError, match="its shard file is missing"):
        opened.read_bold(0, 0, 5)
    store.rename(store.with_name("elsewhere"))
    with pytest.raises(AwayError):
        opened.read_bold(0, 0, 5)


def test_a_later_version_may_come_back_and_another_store_may_not(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    expected = opened.read_bold(0, 0, 5)
    elsewhere = store.rename(tmp_path / "elsewhere")
    with pytest.raises(AwayError):
        opened.voxel_std(0)
    save_cohort(tmp_path / "more", "pq", first=30)
    append_tiny(tmp_path / "more", elsewhere, cohort="three")
    elsewhere.rename(store)
    np.testing.assert_array_equal(opened.read_bold(0, 0, 5), expected)
    store.rename(elsewhere)
    with pytest.raises(AwayError):
        opened.voxel_std(1)
    build_tiny(tmp_path / "more", store)
    with pytest.raises(SwiftError, match="another store is in its place now") as told:
        opened.read_bold(0, 0, 5)
    assert not isinstance(told.value, AwayError)


def test_an_absence_travels_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(AwayError("store x: cannot be read now", "Stale file handle")))  # noqa: S301 (our own)
    assert isinstance(error, AwayError)
    assert str(error) == "store x: cannot be read now"
