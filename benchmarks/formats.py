"""One cohort in the formats that are compared, and how a clip is read from each.

Every format holds the same brain voxels: a store holds them alone, the older formats lay them into half-precision full
volumes on a constant background, as SwiFT v1 (scaled over the run, background at the brain's minimum) and v2 (raw numbers,
background 0) did.
"""

import importlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import zarr
from cohorts import index_path, read_json, rewrite_index
from zarr.storage import LocalStore

from swiftv2.data.store.reader import Run, Store
from swiftv2.errors import SwiftError
from swiftv2.files import write_file

Codec = Literal["none", "lz4+bitshuffle", "zstd+bitshuffle", "zstd+shuffle"]
CODECS: tuple[Codec, ...] = ("none", "lz4+bitshuffle", "zstd+bitshuffle", "zstd+shuffle")
BLOCK = 1 << 15
"""Bytes of a block of blosc, which lz4 doubles. Bits of a last block that is no multiple of 16 bytes stay unshuffled: a short
block makes that cost little, whatever the number of voxels."""
_ENTRY, _CHECKSUM = 16, 4
_ABSENT = (1 << 64) - 1


class Reader(Protocol):
    """How clips are read from one format."""

    def files(self, run: int) -> list[Path]:
        """The files that hold a run's frames."""

    def read(self, run: int, start: int, frames: int) -> Any:
        """A clip, as the format gives it."""

    def renew(self) -> None:
        """Forget what was kept of earlier clips, if this reader is one that does."""


class Kept:
    """A reader that keeps what it has opened."""

    def renew(self) -> None:
        """Nothing is forgotten."""


class TorchFrames(Kept):
    """A `.pt` file a frame, loaded by `torch.load(weights_only=True)` and stacked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with io.BytesIO() as memory:  # The first load brings in parts of torch.
            torch.save(torch.zeros(1), memory)
            memory.seek(0)
            torch.load(memory, weights_only=True)

    def files(self, run: int) -> list[Path]:
        """All frames of a run."""
        return sorted((self._folder / str(run)).iterdir())

    def read(self, run: int, start: int, frames: int) -> torch.Tensor:
        """(frames, H, W, D, 1) half precision."""
        folder = self._folder / str(run)
        names = [folder / f"frame_{frame}.pt" for frame in range(start, start + frames)]
        return torch.stack([torch.load(name, weights_only=True) for name in names])


class Hdf5(Kept):
    """A gzip HDF5 file a run, every file kept open."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._library = folder, _module("h5py")
        self._open: dict[int, Any] = {}

    def files(self, run: int) -> list[Path]:
        """The one file."""
        return [self._folder / f"{run}.h5"]

    def read(self, run: int, start: int, frames: int) -> npt.NDArray[np.float16]:
        """(frames, H, W, D) half precision."""
        if run not in self._open:
            self._open[run] = self._library.File(self._folder / f"{run}.h5", "r")["bold"]
        clip: npt.NDArray[np.float16] = self._open[run][start : start + frames]
        return clip


class OwnReader(Kept):
    """The store through its own API, checksums and all."""

    def __init__(self, path: Path, *, forgets: bool = False) -> None:
        self._path, self._forgets = path, forgets
        self._store = Store.open(path)

    def files(self, run: int) -> list[Path]:
        """The run's shards."""
        return bold_shards(self._path, self._store.runs[run])

    def read(self, run: int, start: int, frames: int) -> npt.NDArray[Any]:
        """(frames, V) stored numbers."""
        return self._store.read_bold(run, start, frames)

    def renew(self) -> None:
        """Open the store anew, so that no shard of it is open and no shard's index is known."""
        if self._forgets:
            self._store = Store.open(self._path)


class PlainReads(Kept):
    """The limit: `pread` of the byte ranges of the chunks that hold a clip, neighbours in one call, nothing else done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs = Store.open(path).runs
        sharding = read_json(path / "bold" / self._runs[0].dtype / "zarr.json")
        self._shard_frames = int(sharding["chunk_grid"]["configuration"]["chunk_shape"][1])
        self._chunk_frames = int(sharding["codecs"][0]["configuration"]["chunk_shape"][1])
        self._open: dict[Path, tuple[int, list[tuple[int, int]]]] = {}

    def files(self, run: int) -> list[Path]:
        """The run's shards."""
        return bold_shards(self._path, self._runs[run])

    def read(self, run: int, start: int, frames: int) -> list[bytes]:
        """The bytes as they lie on disk."""
        found = []
        for shard, pieces in self._ranges(run, start, frames):
            first, length = pieces[0]
            for offset, size in pieces[1:]:
                if offset != first + length:
                    found.append(os.pread(shard, length, first))
                    first, length = offset, 0
                length += size
            found.append(os.pread(shard, length, first))
        return found

    def _ranges(self, run: int, start: int, frames: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        chunks = range(start // self._chunk_frames, (start + frames - 1) // self._chunk_frames + 1)
        each = self._shard_frames // self._chunk_frames
        for number in sorted({chunk // each for chunk in chunks}):
            info = self._runs[run]
            path = self._path / "bold" / info.dtype / f"c.{info.row}.{number}.0"
            if path not in self._open:
                self._open[path] = _open_shard(path, each)
            descriptor, entries = self._open[path]
            yield (
                descriptor,
                [entry for chunk in chunks if chunk // each == number and (entry := entries[chunk % each])[0] != _ABSENT],
            )


class ZarrPython(Kept):
    """The store's BOLD through zarr-python, with its own codecs or those of zarrs."""

    def __init__(self, path: Path, pipeline: str | None = None) -> None:
        self._path, self._runs = path, Store.open(path).runs
        settings = {"codec_pipeline.path": pipeline, "codec_pipeline.validate_checksums": True} if pipeline else {}
        if pipeline:
            _module(pipeline.split(".")[0])
        # An array takes the pipeline that is set when it is opened.
        with zarr.config.set(settings):
            self._arrays: dict[str, Any] = {
                dtype: zarr.open_array(LocalStore(path / "bold" / dtype, read_only=True), mode="r")
                for dtype in {run.dtype for run in self._runs}
            }

    def files(self, run: int) -> list[Path]:
        """The run's shards."""
        return bold_shards(self._path, self._runs[run])

    def read(self, run: int, start: int, frames: int) -> npt.NDArray[Any]:
        """(frames, V) stored numbers."""
        info = self._runs[run]
        return np.asarray(self._arrays[info.dtype][info.row, start : start + frames])


class TensorStore(Kept):
    """The store's BOLD through tensorstore."""

    def __init__(self, path: Path) -> None:
        self._path, self._runs = path, Store.open(path).runs
        library = _module("tensorstore")
        self._arrays = {
            dtype: library.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{(path / 'bold' / dtype).absolute()}/"}}, read=True
            ).result()
            for dtype in {run.dtype for run in self._runs}
        }

    def files(self, run: int) -> list[Path]:
        """The run's shards."""
        return bold_shards(self._path, self._runs[run])

    def read(self, run: int, start: int, frames: int) -> npt.NDArray[Any]:
        """(frames, V) stored numbers."""
        info = self._runs[run]
        return np.asarray(self._arrays[info.dtype][info.row, start : start + frames].read().result())


@dataclass(frozen=True)
class Format:
    """A format under its name in the tables, with the folder that holds it and what opens it."""

    name: str
    folder: Path
    open: Callable[[], Reader]


PT, H5_OWN, H5_FRAME = ".pt a frame", "HDF5 gzip, h5py's chunks", "HDF5 gzip, chunk = frame"
OURS, FRESH, LIMIT = "this store", "this store, shard never opened before", "limit: pread of the same bytes"


def formats(folder: Path, store: Path) -> dict[str, Format]:
    """The formats of the first table, made already by `convert`."""
    bold = store / "bold"
    made = [
        Format(PT, folder / "pt", lambda: TorchFrames(folder / "pt")),
        Format(H5_OWN, folder / "h5-own", lambda: Hdf5(folder / "h5-own")),
        Format(H5_FRAME, folder / "h5-frame", lambda: Hdf5(folder / "h5-frame")),
        Format(OURS, bold, lambda: OwnReader(store)),
        Format(FRESH, bold, lambda: OwnReader(store, forgets=True)),
        Format(LIMIT, bold, lambda: PlainReads(store)),
    ]
    return {one.name: one for one in made}


READERS: dict[str, Callable[[Path], Reader]] = {
    "zarr-python": ZarrPython,
    "zarrs": lambda path: ZarrPython(path, "zarrs.ZarrsCodecPipeline"),
    "tensorstore": TensorStore,
    "ours": OwnReader,
}


def convert(store: Path, folder: Path) -> None:
    """Write the older formats of a store's runs, unless they are there."""
    opened = Store.open(store)
    for number, run in enumerate(opened.runs):
        done = folder / f"{number}.done"
        if done.is_file():
            continue
        volumes = _volumes(opened, number, run, scaled=True)
        (folder / "pt" / str(number)).mkdir(parents=True, exist_ok=True)
        for frame, volume in enumerate(volumes):
            torch.save(torch.from_numpy(volume)[..., None].clone(), folder / "pt" / str(number) / f"frame_{frame}.pt")
        volumes = _volumes(opened, number, run, scaled=False)
        for name, chunks in (("h5-own", True), ("h5-frame", (1, *volumes.shape[1:]))):
            (folder / name).mkdir(exist_ok=True)
            with _module("h5py").File(folder / name / f"{number}.h5", "w") as file:
                file.create_dataset("bold", data=volumes, chunks=chunks, compression="gzip")
        write_file(done, b"")
    os.sync()


def _volumes(opened: Store, number: int, run: Run, *, scaled: bool) -> npt.NDArray[np.float16]:
    """A run as full volumes (frames, H, W, D): source numbers on 0, or scaled over the run on the smallest brain value."""
    values = opened.read_bold(number, 0, run.frames).astype(np.float32) * np.float32(run.slope) + np.float32(run.intercept)
    if scaled:
        values = (values - values.mean(dtype=np.float64)) / values.std(dtype=np.float64)
    flat = np.full((run.frames, int(np.prod(opened.grid.shape))), values.min() if scaled else 0, dtype=np.float16)
    flat[:, opened.voxels] = values
    return flat.reshape(run.frames, *opened.grid.shape)


def recode(store: Path, place: Path, chunk: int, codec: Codec) -> Path:
    """A copy of a store whose BOLD has chunks of `chunk` frames coded by `codec`, checksums as in the store."""
    if (place / "zarr.json").is_file():
        return place
    opened = Store.open(store)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(store, place, ignore=shutil.ignore_patterns("c.*.*.0", "zarr.json"))
    for path in store.rglob("zarr.json"):
        if path.parent != store:
            shutil.copy(path, place / path.relative_to(store))
    for dtype in {run.dtype for run in opened.runs}:
        _recode_metadata(place / "bold" / dtype / "zarr.json", chunk, codec)
        array: Any = zarr.open_array(LocalStore(place / "bold" / dtype), mode="r+")
        for number, run in enumerate(opened.runs):
            if run.dtype == dtype:
                array[run.row, : run.frames] = opened.read_bold(number, 0, run.frames)
    shutil.copy(store / "zarr.json", place / ".zarr.json")
    lines = [json.loads(line) for line in index_path(store).read_text(encoding="utf-8").splitlines()]
    for line, run in zip(lines, opened.runs, strict=True):
        line["bytes"] = sum(path.stat().st_size for path in bold_shards(place, run))
    (place / ".zarr.json").replace(place / "zarr.json")
    rewrite_index(place, lines)
    os.sync()
    return place


def _recode_metadata(path: Path, chunk: int, codec: Codec) -> None:
    metadata = read_json(path)
    shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    shard[1] = -(-shard[1] // chunk) * chunk
    sharding = metadata["codecs"][0]["configuration"]
    sharding["chunk_shape"][1] = chunk
    to_bytes, checksum = sharding["codecs"][0], sharding["codecs"][-1]
    coder = (
        [] if codec == "none" else [{"name": "blosc", "configuration": blosc(codec, np.dtype(metadata["data_type"]).itemsize)}]
    )
    sharding["codecs"] = [to_bytes, *coder, checksum]
    write_file(path, json.dumps(metadata).encode())


def blosc(codec: Codec, itemsize: int) -> dict[str, Any]:
    """Settings of blosc for a codec."""
    name, shuffle = codec.split("+")
    return {"typesize": itemsize, "cname": name, "clevel": 5 if name == "lz4" else 3, "shuffle": shuffle, "blocksize": BLOCK}


def bold_shards(store: Path, run: Run) -> list[Path]:
    """The shard files of a run."""
    return sorted((store / "bold" / run.dtype).glob(f"c.{run.row}.*.0"))


def layout_of(store: Path, run: Run) -> str:
    """Chunk and codecs of a store's BOLD in a phrase."""
    sharding = read_json(store / "bold" / run.dtype / "zarr.json")["codecs"][0]["configuration"]
    names = []
    for codec in sharding["codecs"][1:]:
        settings = codec.get("configuration", {})
        names.append(
            " ".join(str(part) for part in (codec["name"], settings.get("cname", ""), settings.get("shuffle", ""))).strip()
        )
    return f"chunks of {sharding['chunk_shape'][1]} frames, {', '.join(names)}"


def size_of(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files below a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def _open_shard(path: Path, chunks: int) -> tuple[int, list[tuple[int, int]]]:
    descriptor = os.open(path, os.O_RDONLY)
    length = chunks * _ENTRY + _CHECKSUM
    data = os.pread(descriptor, length, path.stat().st_size - length)
    numbers = struct.unpack(f"<{2 * chunks}Q", data[:-_CHECKSUM])
    return descriptor, list(zip(numbers[::2], numbers[1::2], strict=True))


def _module(name: str) -> Any:
    """A library that only benchmarks need.

    Raises:
        SwiftError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SwiftError(
            f"{name} is not installed: pip install h5py zarrs tensorstore, which this benchmark compares"
        ) from error
