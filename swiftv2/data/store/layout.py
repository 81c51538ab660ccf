"""Format 1 of the store on disk: its arrays, shards, codecs and small files (docs/store.md says the same in words)."""

import json
import struct
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from swiftv2.data.store.shards import ABSENT, ChunkError, read_shard_index
from swiftv2.errors import SwiftError
from swiftv2.files import sync, write_file

FORMAT = 1
BOLD_TYPES = ("uint8", "int16", "uint16", "float32")
CHUNK_FRAMES = 2
"""Frames of a chunk: a clip of 20 frames anywhere reads 21, and a run of 500 has an index of 4 kB (measured: benchmarks/)."""
BLOCK_BYTES = 1 << 15
"""What blosc is asked to compress at a time; it takes twice as much of 2-byte numbers. With blocks of its own choice it leaves
the bits of a last block unshuffled whose bytes are no multiple of 16, and that may be much of a small chunk."""
ROWS_PER_SHARD = 256
"""Runs that share one file of each small array of a new store: so few files that a training keeps all of them open."""
SHARD_BYTES = 1 << 30
"""Uncompressed bytes of a shard at most: longer runs take several, so that the memory of a writer stays bounded."""
UNKNOWN = 255
"""Frame flag of runs without a confound table."""
RUNS_FILE, SUBJECTS_FILE, REPORT_FILE = "runs.jsonl", "subjects.json", "build_report.jsonl"
WITHDRAWALS_FILE = "withdrawals.jsonl"
STAGING, DROPPING = ".build", ".drop"
"""Folders that are there only while a build or append, or a drop, is unfinished."""
PLAN_FILE = "plan.json"
PRIVATE, PRIVATE_FOLDER = 0o600, 0o700

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


def shard_frames(longest: int, voxels: int, dtype: str, chunk: int = CHUNK_FRAMES) -> int:
    """Frames of a bold shard: the longest run, rounded up to chunks, as far as `SHARD_BYTES` allows."""
    limit = SHARD_BYTES // (voxels * np.dtype(dtype).itemsize) // chunk * chunk
    return max(chunk, min(-(-longest // chunk) * chunk, limit))


def _compressors(dtype: str, compression: Compression) -> tuple[Any, ...]:
    itemsize = np.dtype(dtype).itemsize
    checksum = Crc32cCodec()
    if compression == "none":
        return (checksum,)
    level = 5 if compression == "lz4" else 3
    codec = BloscCodec(typesize=itemsize, cname=compression, clevel=level, shuffle="bitshuffle", blocksize=BLOCK_BYTES)
    return (codec, checksum)


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


def create_bold(
    store: Path, dtype: str, shape: tuple[int, int, int], compression: Compression, chunk: int = CHUNK_FRAMES
) -> None:
    """Write the metadata of the bold array of one number type: (rows, frames, V), chunks of so many frames, a shard a run."""
    _, longest, voxels = shape
    shards, axes = (1, shard_frames(longest, voxels, dtype, chunk), voxels), ("row", "frame", "voxel")
    create_array(store, f"bold/{dtype}", shape, (1, chunk, voxels), shards, dtype, 0, axes, compression)


def create_small(folder: Path, small: Small, shape: tuple[int, int], width: int, compression: Compression) -> None:
    """Write the metadata of a small array: (rows, V) or (rows, frames), a shard every `ROWS_PER_SHARD` rows, a chunk a row.

    Args:
        folder: what holds the array.
        small: which one.
        shape: of the array.
        width: of a chunk; what an append adds to the frames takes further chunks.
        compression: of the chunks.
    """
    shards, axes = (ROWS_PER_SHARD, width), ("row", small.axis)
    create_array(folder, small.name, shape, (1, width), shards, small.dtype, small.fill, axes, compression)


def set_shape(array: Path, shape: tuple[int, ...]) -> None:
    """Give an array another shape; chunks and shards stay as they are."""
    path = array / "zarr.json"
    metadata = json.loads(path.read_bytes())
    if tuple(metadata["shape"]) != shape:
        write_file(path, json.dumps(metadata | {"shape": list(shape)}, indent=2))


def rows_of_shard(array: Path) -> int:
    """Runs that share a file of a small array, as its metadata say."""
    return int(json.loads((array / "zarr.json").read_bytes())["chunk_grid"]["configuration"]["chunk_shape"][0])


def bold_shards(store: Path, dtype: str, row: int) -> list[Path]:
    """The shard files of a run that exist, in the order of their frames; asks for each rather than list the folder."""
    folder = store / "bold" / dtype
    metadata = json.loads((folder / "zarr.json").read_bytes())
    count = -(-int(metadata["shape"][1]) // int(metadata["chunk_grid"]["configuration"]["chunk_shape"][1]))
    return [path for path in (folder / f"c.{row}.{number}.0" for number in range(count)) if path.is_file()]


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
    sync(store / "bold" / dtype)
    return sum(path.stat().st_size for path in written)


def create_voxels(store: Path, voxels: npt.NDArray[np.int32], compression: Compression) -> None:
    """Write the kept voxels (V,)."""
    shape = (len(voxels),)
    create_array(store, "voxels", shape, shape, None, "int32", 0, ("voxel",), compression)
    array: Any = zarr.open_array(LocalStore(store / "voxels"), mode="r+")
    array[:] = voxels


def write_rows(staging: Path, store: Path, small: Small, first: int, rows: Iterable[tuple[int, AnyArray]]) -> None:
    """Write one shard of a small array, and put the file in its place whole.

    Args:
        staging: folder that holds the array's metadata, with room for the whole shard, and takes the new file first.
        store: folder of the store.
        small: which array.
        first: first row of the shard.
        rows: numbers and content of rows, taken one by one; the others, and what lies behind a short one's end, get the
            fill value.
    """
    folder = staging / small.name
    array: Any = zarr.open_array(LocalStore(folder), mode="r+")
    width = int(array.shards[0])
    values = np.full((width, array.shape[1]), small.fill, dtype=small.dtype)
    for row, content in rows:
        values[row - first, : len(content)] = content
    array[first : first + width] = values
    for path in sorted(folder.glob(f"c.{first // width}.*")):
        sync(path)
        path.replace(store / small.name / path.name)
    sync(store / small.name)


def keep_rows(shard: Path, keep: Set[int]) -> None:
    """Take rows out of a shard of a small array; what is kept is the same bytes as before, and is not decoded.

    The file is replaced whole; it goes when no row is left.

    Args:
        shard: the file.
        keep: rows that stay, by their numbers in the shard.

    Raises:
        SwiftError: the shard's own index is damaged.
    """
    rows = rows_of_shard(shard.parent)
    with shard.open("rb") as stream:
        try:
            places = read_shard_index(stream.fileno(), shard.stat().st_size, rows)
        except ChunkError as error:
            raise SwiftError(
                f"{shard} is damaged (the index of the shard): restore it from a copy, then give the command again"
            ) from error
        there = sorted((place, row) for row, place in enumerate(places) if place != (ABSENT, ABSENT))
        kept = [(place, row) for place, row in there if row in keep]
        if len(kept) == len(there):
            return
        content, places = bytearray(), [(ABSENT, ABSENT)] * rows
        for (offset, count), row in kept:
            stream.seek(offset)
            places[row] = (len(content), count)
            content += stream.read(count)
    if not kept:
        shard.unlink()
        return
    table = b"".join(struct.pack("<2Q", *place) for place in places)
    write_file(shard, bytes(content) + table + crc32c.crc32c(table).to_bytes(4, "little"))


def write_attributes(store: Path, attributes: dict[str, Any]) -> None:
    """Make the folder a store, or a store another version of itself: one file, replaced whole."""
    group = {"attributes": {"swiftv2": attributes}, "zarr_format": 3, "node_type": "group"}
    write_file(store / "zarr.json", json.dumps(group, indent=2))


def index_name(version: int) -> str:
    """Name of the run index of a version."""
    return RUNS_FILE if version == 1 else f"runs.{version}.jsonl"


def unfinished(store: Path) -> str | None:
    """The change that was begun and neither finished nor given up: `build`, `append`, `drop`, or None.

    Raises:
        SwiftError: the plan of an append is damaged.
    """
    if (store / DROPPING / PLAN_FILE).is_file():
        return "drop"
    try:
        plan = json.loads((store / STAGING / PLAN_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    if not is_complete(store):
        return "build"
    try:
        version = int(plan["version"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"{store / STAGING / PLAN_FILE} is damaged: give the append up by removing {store / STAGING}, then give it again"
        raise SwiftError(text) from error
    return None if version <= int(read_attributes(store)["version"]) else "append"


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
