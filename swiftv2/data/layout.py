"""Format 1 of the store on disk: its arrays, shards, codecs and small files (docs/store.md says the same in words)."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from swiftv2.errors import SwiftError
from swiftv2.files import sync

FORMAT = 1
BOLD_TYPES = ("uint8", "int16", "uint16", "float32")
CHUNK_FRAMES = 10
"""Frames of a chunk: a clip of 20 frames touches two or three, and a chunk at 2 mm is about 5 MB."""
ROWS_PER_SHARD = 64
"""Runs that share one file of each small array."""
SHARD_BYTES = 1 << 30
"""Uncompressed bytes of a shard at most: longer runs take several, so that the memory of a writer stays bounded."""
UNKNOWN = 255
"""Frame flag of runs without a confound table."""
RUNS_FILE, SUBJECTS_FILE, REPORT_FILE, STAGING = "runs.jsonl", "subjects.json", "build_report.jsonl", ".build"
PRIVATE = 0o600

Compression = Literal["none", "lz4", "zstd"]
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Small:
    """An array with one row a run whose shards are shared by runs."""

    name: str
    dtype: str
    fill: float | int | bool
    axis: Literal["voxel", "frame"]


SMALL_ARRAYS = (
    Small("voxel_mean", "float32", 0.0, "voxel"),
    Small("voxel_std", "float32", 0.0, "voxel"),
    Small("brain", "bool", False, "voxel"),
    Small("framewise_displacement", "float32", float("nan"), "frame"),
    Small("censored", "uint8", UNKNOWN, "frame"),
    Small("non_steady_state", "uint8", UNKNOWN, "frame"),
)


def shard_frames(longest: int, voxels: int, dtype: str) -> int:
    """Frames of a bold shard: the longest run, rounded up to chunks, as far as `SHARD_BYTES` allows."""
    whole = -(-longest // CHUNK_FRAMES) * CHUNK_FRAMES
    limit = SHARD_BYTES // (voxels * np.dtype(dtype).itemsize) // CHUNK_FRAMES * CHUNK_FRAMES
    return max(CHUNK_FRAMES, min(whole, limit))


def _compressors(dtype: str, compression: Compression) -> tuple[Any, ...]:
    itemsize = np.dtype(dtype).itemsize
    checksum = Crc32cCodec()
    if compression == "none":
        return (checksum,)
    level = 5 if compression == "lz4" else 3
    return (BloscCodec(typesize=itemsize, cname=compression, clevel=level, shuffle="bitshuffle"), checksum)


def create_array(
    store: Path,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    dtype: str,
    fill: float | int | bool,
    axes: tuple[str, ...],
    compression: Compression,
) -> None:
    """Write the metadata of one array, replacing what an interrupted build left of it."""
    sharding: Any = None if shards is None else {"shape": shards, "index_location": "end"}
    zarr.create_array(
        LocalStore(store / name),
        shape=shape,
        chunks=chunks,
        shards=sharding,
        dtype=dtype,
        fill_value=fill,
        compressors=_compressors(dtype, compression),
        dimension_names=axes,
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
    )


def create_folder(store: Path, name: str) -> None:
    """Write the metadata of a group that holds arrays, emptying it."""
    zarr.create_group(LocalStore(store / name), overwrite=True)


def create_bold(store: Path, dtype: str, rows: int, longest: int, voxels: int, compression: Compression) -> None:
    """Write the metadata of the bold array of one number type: (rows, frames, V), a shard a run."""
    name = f"bold/{dtype}"
    shards = (1, shard_frames(longest, voxels, dtype), voxels)
    chunks = (1, CHUNK_FRAMES, voxels)
    axes = ("row", "frame", "voxel")
    create_array(store, name, (rows, longest, voxels), chunks, shards, dtype, 0, axes, compression)


def create_small(store: Path, small: Small, rows: int, longest: int, voxels: int, compression: Compression) -> None:
    """Write the metadata of a small array: (rows, V) or (rows, frames), a chunk a row, a shard every 64 rows."""
    width = voxels if small.axis == "voxel" else longest
    shards = (ROWS_PER_SHARD, width)
    axes = ("row", small.axis)
    create_array(store, small.name, (rows, width), (1, width), shards, small.dtype, small.fill, axes, compression)


def bold_shards(store: Path, dtype: str, row: int) -> list[Path]:
    """The shard files of a run that exist, in the order of their frames."""
    found = (store / "bold" / dtype).glob(f"c.{row}.*.0")
    return sorted(found, key=lambda path: int(path.name.split(".")[2]))


def write_bold(store: Path, dtype: str, row: int, bold: AnyArray) -> int:
    """Write a run (frames, V) to its shards, in place of what an interrupted build left; returns the bytes on disk."""
    for stale in bold_shards(store, dtype, row):
        stale.unlink()
    array: Any = zarr.open_array(LocalStore(store / "bold" / dtype), mode="r+")
    length = int(array.shards[1])
    for first in range(0, len(bold), length):
        array[row, first : min(first + length, len(bold))] = bold[first : first + length]
    written = bold_shards(store, dtype, row)
    for path in written:
        sync(path)
    return sum(path.stat().st_size for path in written)


def create_voxels(store: Path, voxels: npt.NDArray[np.int32], compression: Compression) -> None:
    """Write the kept voxels (V,)."""
    shape = (len(voxels),)
    create_array(store, "voxels", shape, shape, None, "int32", 0, ("voxel",), compression)
    array: Any = zarr.open_array(LocalStore(store / "voxels"), mode="r+")
    array[:] = voxels


def write_rows(store: Path, small: Small, first: int, last: int, rows: Mapping[int, AnyArray | None]) -> None:
    """Write the rows first .. last of a small array, which are one shard; rows that are not there keep the fill value."""
    array: Any = zarr.open_array(LocalStore(store / small.name), mode="r+")
    values = np.full((last - first, array.shape[1]), small.fill, dtype=small.dtype)
    for row, content in rows.items():
        if content is not None:
            values[row - first, : len(content)] = content
    array[first:last] = values
    shard = store / small.name / f"c.{first // ROWS_PER_SHARD}.0"
    if shard.exists():
        sync(shard)


def commit(store: Path, attributes: dict[str, Any]) -> None:
    """Make the folder a store: the group's metadata come last, and without them nothing opens it."""
    for stale in store.rglob("*.partial"):
        stale.unlink()
    zarr.create_group(LocalStore(store), attributes={"swiftv2": attributes})
    sync(store / "zarr.json")
    sync(store)
    shutil.rmtree(store / STAGING, ignore_errors=True)


def is_complete(store: Path) -> bool:
    """Whether a build was carried to its end here."""
    return (store / "zarr.json").is_file()


def read_attributes(store: Path) -> dict[str, Any]:
    """The store's own attributes.

    Raises:
        SwiftError: no store, an unfinished one, or one of another format.
    """
    if not is_complete(store):
        if (store / STAGING).is_dir():
            raise SwiftError(f"store {store} is unfinished: run the same `swiftv2 store build` again and it goes on")
        raise SwiftError(f"{store} is no store: build one with `swiftv2 store build`")
    try:
        attributes = json.loads((store / "zarr.json").read_bytes())["attributes"].get("swiftv2")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SwiftError(f"store {store} has damaged metadata (zarr.json): restore it from a copy") from error
    if not isinstance(attributes, dict) or "format" not in attributes:
        raise SwiftError(f"{store} is a Zarr group but no swiftv2 store: build one with `swiftv2 store build`")
    if attributes["format"] != FORMAT:
        raise SwiftError(f"store {store} has format {attributes['format']}, this swiftv2 reads {FORMAT}: update swiftv2")
    return dict(attributes)
