"""What the benchmarks stand on: formats hold the same numbers, caches are emptied, system calls are counted."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from formats import CODECS, H5_FRAME, H5_OWN, LIMIT, PT, READERS, PlainReads, bold_shards, convert, formats, recode
from machine import BEGIN, END, ROOT, command, count_calls, drop, fill, prose, resident, table
from timing import Cost, random_clips, read_in_turn

from swiftv2.data.store.reader import Store


def test_formats_hold_the_numbers_of_the_store(real_store: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    convert(real_store, tmp_path)
    opened, made = Store.open(real_store), formats(tmp_path, real_store)
    run = opened.runs[1]
    wanted = opened.read_bold(1, 7, 20).astype(np.float32) * run.slope + run.intercept
    for name in (H5_OWN, H5_FRAME):
        found = np.asarray(made[name].open().read(1, 7, 20), dtype=np.float32)
        np.testing.assert_allclose(found.reshape(20, -1)[:, opened.voxels], wanted, rtol=1e-3)
    scaled = np.asarray(made[PT].open().read(1, 7, 20), dtype=np.float32)
    assert scaled.shape == (20, *opened.grid.shape, 1)
    assert np.corrcoef(scaled.reshape(20, -1)[:, opened.voxels].ravel(), wanted.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("codec", CODECS)
def test_every_reader_reads_every_layout(real_store: Path, tmp_path: Path, codec: str) -> None:
    for library in ("zarrs", "tensorstore"):
        pytest.importorskip(library)
    place = recode(real_store, tmp_path / "other.zarr", 3, next(one for one in CODECS if one == codec))
    wanted = Store.open(real_store).read_bold(0, 4, 20)
    for make in READERS.values():
        np.testing.assert_array_equal(make(place).read(0, 4, 20), wanted)


def test_the_limit_reads_the_bytes_of_the_chunks_of_a_clip(real_store: Path, tmp_path: Path) -> None:
    place = recode(real_store, tmp_path / "plain.zarr", 5, "none")
    opened = Store.open(place)
    read = PlainReads(place).read(0, 4, 20)
    # Frames 4 to 23 lie in the chunks 0 to 4, which are neighbours; each ends on a checksum of 4 bytes.
    assert [len(part) for part in read] == [5 * (5 * len(opened.voxels) * 2 + 4)]
    assert np.array_equal(np.frombuffer(read[0], np.int16, 5 * len(opened.voxels)), opened.read_bold(0, 0, 5).ravel())


def test_clips_are_read_in_turn_and_ratios_are_paired(real_store: Path) -> None:
    opened = Store.open(real_store)
    made = formats(real_store.parent, real_store)
    readers = {LIMIT: made[LIMIT].open(), "ours": READERS["ours"](real_store)}
    costs = read_in_turn(readers, opened.runs, 20, clips=4, rounds=3, cold=True)
    assert {len(cost.seconds) for cost in costs.values()} == {3}
    assert (
        random_clips(opened.runs, 20, 9, "a") == random_clips(opened.runs, 20, 9, "a") != random_clips(opened.runs, 20, 9, "b")
    )
    assert Cost(4, [1.0, 2.0, 4.0]).times(Cost(4, [3.0, 4.0, 20.0])) == (3.0, 2.0, 5.0)


def test_files_leave_the_page_cache_and_come_back(real_store: Path) -> None:
    shards = bold_shards(real_store, Store.open(real_store).runs[0])
    fill(shards)
    assert resident(shards) == 1
    drop(shards)
    if resident(shards) == 1:
        pytest.skip("this file system lives in memory")
    assert resident(shards) == 0


def test_system_calls_between_the_marks_are_counted() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    program = (
        "import os, machine\n"
        "os.stat('/')\n"
        f"machine.mark({BEGIN!r})\n"
        "f = os.open('/', os.O_RDONLY); os.fstat(f); os.lseek(f, 0, 0); os.stat('/')\n"
        "os.open('/', os.O_RDONLY)\n"
        f"machine.mark({END!r})\n"
    )
    assert count_calls([sys.executable, "-c", program]) == (2, 2, 1)


def test_pages_name_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "store.py"), "--folder", "/somewhere/else", "--rounds", "3"])
    assert command() == "python benchmarks/store.py --folder FOLDER --rounds 3"
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert max(map(len, prose("word " * 100))) <= 124
