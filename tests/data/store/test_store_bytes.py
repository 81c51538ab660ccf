"""docs/store.md, followed word by word without any Zarr library."""

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
from store_files import GRID, bold_values, mni_affine, save_run

from swiftv2 import cli
from swiftv2.data.changes.build import build
from swiftv2.data.store.reader import Store

FRAMES = 27
blosc: Any = importlib.import_module("numcodecs.blosc")


def checked(data: bytes) -> bytes:
    body, (stated,) = data[:-4], struct.unpack("<I", data[-4:])
    assert google_crc32c.value(body) == stated
    return body


def read_shard(path: Path, chunks: int) -> list[bytes | None]:
    data = path.read_bytes()
    index = np.frombuffer(checked(data[-(16 * chunks + 4) :]), dtype="<u8").reshape(chunks, 2)
    absent = 2**64 - 1
    return [
        None if int(offset) == absent else blosc.decompress(checked(data[int(offset) : int(offset) + int(length)]))
        for offset, length in index
    ]


def test_a_reader_can_be_written_from_the_documentation(tmp_path: Path) -> None:
    for number in range(2):
        save_run(tmp_path / "in", f"s{number}", bold_values(number, frames=FRAMES - 9 * number))
    build(tmp_path / "in", tmp_path / "store", GRID, "demo")
    folder = tmp_path / "store"
    store = Store.open(folder)
    voxels = len(store.voxels)
    kept = blosc.decompress(checked((folder / "voxels" / "c.0").read_bytes()))
    np.testing.assert_array_equal(np.frombuffer(kept, dtype="<i4"), store.voxels)
    means = read_shard(folder / "voxel_mean" / "c.0.0", 256)
    for index, line in enumerate((folder / "runs.jsonl").read_text().splitlines()):
        run = json.loads(line)
        chunks = read_shard(folder / "bold" / run["dtype"] / f"c.{run['row']}.0.0", 14)
        frames: list[npt.NDArray[Any]] = [
            np.frombuffer(chunk, dtype="<i2").reshape(2, voxels) for chunk in chunks if chunk is not None
        ]
        assert len(frames) == -(-run["frames"] // 2)
        np.testing.assert_array_equal(np.concatenate(frames)[: run["frames"]], store.read_bold(index, 0, run["frames"]))
        mean = means[run["row"]]
        assert mean is not None
        np.testing.assert_array_equal(np.frombuffer(mean, dtype="<f4"), store.voxel_mean(index))


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_every_codec_gives_the_same_numbers(compression: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bold_values(4, frames=12)
    save_run(tmp_path / "in", "a", data)
    words = ["store", "build", str(tmp_path / "in"), str(tmp_path / "store"), "--compression", compression, "grid.voxel_mm=6"]
    assert cli.main([*words, "clean.high_pass_hz=1", "clean.low_pass_hz=0.1"]) == 2
    assert "clean.high_pass_hz" in capsys.readouterr().err
    assert cli.main(words) == 0
    store = Store.open(tmp_path / "store")
    assert store.attributes["options"]["compression"] == compression
    there = np.rint((store.grid.world(store.voxels) - mni_affine()[:3, 3]) / 6.0).astype(int)
    np.testing.assert_array_equal(store.read_bold(0, 0, 12), data[there[:, 0], there[:, 1], there[:, 2]].T)
    if compression == "none":
        assert store.runs[0].bytes > 12 * 2 * len(store.voxels)
