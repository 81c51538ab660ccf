"""The reader of byte ranges: the same numbers as any Zarr library, few calls to the file system, and no damage unseen."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import LocalStore

from swiftv2.data.store import layout
from swiftv2.data.store.shards import ChunkError, OpenShards, ShardedArray
from swiftv2.errors import SwiftError

VOXELS, ROWS, FRAMES, SHARD, CHUNK = 37, 3, 33, 20, 5


def _make(folder: Path, dtype: str, compression: layout.Compression) -> np.ndarray:
    """Rows of 33 frames in shards of 20 and chunks of 5; the last row was never written, the first holds an empty chunk."""
    shape, shards, chunks = (ROWS, FRAMES, VOXELS), (1, SHARD, VOXELS), (1, CHUNK, VOXELS)
    layout.create_array(folder, "bold", shape, chunks, shards, dtype, 0, ("row", "frame", "voxel"), compression)
    values = np.random.default_rng(0).integers(1, 90, shape).astype(dtype)
    values[0, 5:10] = 0
    values[2] = 0
    array: Any = zarr.open_array(LocalStore(folder / "bold"), mode="r+")
    array[:2] = values[:2]
    return values


@pytest.fixture(scope="module", params=["none", "lz4", "zstd"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("shards")
    return folder, _make(folder, "int16", request.param)


@settings(deadline=None, max_examples=60)
@given(row=st.integers(0, 1), first=st.integers(0, FRAMES - 1), length=st.integers(1, FRAMES))
def test_any_frames_are_those_that_were_written(written: tuple[Path, np.ndarray], row: int, first: int, length: int) -> None:
    folder, values = written
    stop = min(first + length, FRAMES)
    out = np.full((stop - first, VOXELS), -1, dtype=np.int16)
    ShardedArray(folder / "bold", OpenShards()).read_frames(row, first, stop, out)
    np.testing.assert_array_equal(out, values[row, first:stop])


@pytest.mark.parametrize("dtype", layout.BOLD_TYPES)
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_every_number_type_comes_back(tmp_path: Path, dtype: str, compression: layout.Compression) -> None:
    values = _make(tmp_path, dtype, compression)
    out = np.empty((FRAMES, VOXELS), dtype=dtype)
    ShardedArray(tmp_path / "bold", OpenShards()).read_frames(1, 0, FRAMES, out)
    np.testing.assert_array_equal(out, values[1])


def test_rows_of_small_arrays_come_back_also_where_they_grew(tmp_path: Path) -> None:
    layout.create_array(tmp_path, "flags", (5, 12), (1, 8), (4, 8), "float32", float("nan"), ("row", "frame"), "lz4")
    array: Any = zarr.open_array(LocalStore(tmp_path / "flags"), mode="r+")
    values = np.random.default_rng(0).random((5, 12)).astype(np.float32)
    values[3] = np.nan
    array[:] = values
    reader = ShardedArray(tmp_path / "flags", OpenShards())
    for row in range(5):
        np.testing.assert_array_equal(reader.read_row(row), values[row])


def test_a_missing_file_is_no_zeros(written: tuple[Path, np.ndarray]) -> None:
    out = np.empty((4, VOXELS), dtype=np.int16)
    with pytest.raises(ChunkError, match="shard file is missing"):
        ShardedArray(written[0] / "bold", OpenShards()).read_frames(2, 0, 4, out)


def test_every_flipped_bit_is_seen_and_placed(tmp_path: Path) -> None:
    """Whatever byte of a shard is changed, reading all of it fails; damage in a chunk is told by its frames."""
    values = _make(tmp_path, "int16", "none")
    path = tmp_path / "bold" / "c.1.0.0"
    sound = path.read_bytes()
    chunk = CHUNK * VOXELS * 2 + 4
    assert len(sound) == 4 * chunk + 4 * 16 + 4
    for place in range(0, len(sound), 7):
        broken = bytearray(sound)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        out = np.empty((SHARD, VOXELS), dtype=np.int16)
        with pytest.raises(ChunkError) as caught:
            ShardedArray(tmp_path / "bold", OpenShards()).read_frames(1, 0, SHARD, out)
        if place < 4 * chunk:
            assert (caught.value.first, caught.value.stop) == (place // chunk * CHUNK, (place // chunk + 1) * CHUNK)
        # What does not touch the damage is still read.
        if CHUNK <= place // chunk * CHUNK < 3 * CHUNK:
            kept = np.empty((CHUNK, VOXELS), dtype=np.int16)
            ShardedArray(tmp_path / "bold", OpenShards()).read_frames(1, 0, CHUNK, kept)
            np.testing.assert_array_equal(kept, values[1, :CHUNK])
    path.write_bytes(sound)


@pytest.mark.parametrize("compression", ["none", "lz4"])
@pytest.mark.parametrize("hint", [False, True])
def test_every_truncation_is_seen(tmp_path: Path, compression: layout.Compression, *, hint: bool) -> None:
    _make(tmp_path, "int16", compression)
    path = tmp_path / "bold" / "c.1.1.0"
    sound = path.read_bytes()
    for length in range(0, len(sound), 11):
        path.write_bytes(sound[:length])
        out = np.empty((5, VOXELS), dtype=np.int16)
        reader = ShardedArray(tmp_path / "bold", OpenShards())
        with pytest.raises(ChunkError):
            reader.read_frames(1, SHARD, SHARD + 5, out, len(sound) if hint else None)


def test_few_files_stay_open_and_none_is_left(tmp_path: Path) -> None:
    _make(tmp_path, "int16", "none")

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    files = OpenShards(capacity=2)
    reader = ShardedArray(tmp_path / "bold", files)
    out = np.empty((3, VOXELS), dtype=np.int16)
    for _ in range(3):
        for row in (0, 1):
            for first in (0, SHARD):
                reader.read_frames(row, first, first + 3, out)
                assert len(files) <= 2
                assert descriptors() - before <= 2
    del reader, files
    assert descriptors() == before


def test_a_file_that_is_closed_by_one_thread_serves_another_to_its_end(tmp_path: Path) -> None:
    """With room for one file, threads push each other's files out all the time."""
    values = _make(tmp_path, "int16", "lz4")
    reader = ShardedArray(tmp_path / "bold", OpenShards(capacity=1))
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        out = np.empty((7, VOXELS), dtype=np.int16)
        for _ in range(300):
            row, first = int(rng.integers(2)), int(rng.integers(FRAMES - 7))
            try:
                reader.read_frames(row, first, first + 7, out)
            except (ChunkError, OSError) as error:
                wrong.append(error)
            if not np.array_equal(out, values[row, first : first + 7]):
                wrong.append((row, first))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [('"crc32c"', '"adler32"', "codecs that this swiftv2 does not read"), ('"shape"', '"form"', "damaged")],
)
def test_other_metadata_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    _make(tmp_path, "int16", "none")
    path = tmp_path / "bold" / "zarr.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(SwiftError, match=message):
        ShardedArray(tmp_path / "bold", OpenShards())
