"""Reading arrays of a store by byte ranges: pread, checksum, decode, straight into the caller's memory.

The arrays are plain Zarr v3 (codecs bytes, blosc, crc32c inside sharding_indexed; docs/store.md). A clip costs the
reading of the chunks that hold it; descriptors and the indices of shards are kept. No threads of its own run here.
"""

import json
import os
import resource
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from swiftv2.errors import SwiftError

AnyArray = npt.NDArray[Any]
ABSENT = (1 << 64) - 1
"""Offset and length of a chunk that holds the fill value only and is not written."""
_CHECKSUM_BYTES = 4
_ENTRY_BYTES = 16
_CHUNKS_A_CALL = 256
"""Chunks that one call reads: the system takes 1024 buffers at most, two a chunk."""
SHARE_OF_DESCRIPTORS = 0.25, 0.625
"""Shards of runs, and those that runs share, that a process keeps open, as shares of the descriptors that it may have."""
MOST_OPEN = 1024


class ChunkError(Exception):
    """Bytes that are missing or not what was written; `first` and `stop` bound the rows of the damaged chunk."""

    def __init__(self, reason: str, first: int = 0, stop: int = 0) -> None:
        super().__init__(reason)
        self.first, self.stop = first, stop


def read_shard_index(descriptor: int, size: int, chunks: int) -> list[tuple[int, int]]:
    """Offset and length of each chunk of a shard file, `ABSENT` both where it is not written.

    Args:
        descriptor: of the open file.
        size: of the file, bytes.
        chunks: in the shard.

    Raises:
        ChunkError: too short, or the checksum of the index fails.
        OSError: the file system does not give it.
    """
    length = chunks * _ENTRY_BYTES + _CHECKSUM_BYTES
    data = os.pread(descriptor, length, max(size - length, 0))
    if len(data) != length or not _sound(memoryview(data)):
        raise ChunkError("its shard is cut short or the checksum of its index fails")
    numbers = struct.unpack(f"<{2 * chunks}Q", data[:-_CHECKSUM_BYTES])
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class _Shard:
    """An open file with the place (offset, length) of each of its chunks; closed when nobody holds it any more."""

    def __init__(self, path: Path, chunks: int | None, size: int | None) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Clips lie anywhere: what the system would read beyond them is read for nothing.
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self.size = os.fstat(self.descriptor).st_size if size is None else size
        self.entries = [(0, self.size)] if chunks is None else read_shard_index(self.descriptor, self.size, chunks)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class OpenShards:
    """The files that a process has open, the least recently used closed first; safe to use from several threads."""

    def __init__(self, capacity: int | None = None, *, shared: bool = False) -> None:
        """Keep `capacity` files open; by default as many as the process may, for files that runs share or for theirs."""
        allowed = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], MOST_OPEN)
        self.capacity = int(allowed * SHARE_OF_DESCRIPTORS[shared]) if capacity is None else capacity
        self._shards: OrderedDict[Path, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, chunks: int | None, size: int | None) -> _Shard:
        """An open file with its index, which lives at least as long as the caller holds it."""
        with self._lock:
            shard = self._shards.get(path)
            if shard is not None:
                self._shards.move_to_end(path)
                return shard
        # Opened outside the lock: two threads may open one file, and one of the two is dropped again.
        opened = _Shard(path, chunks, size)
        with self._lock:
            self._shards[path] = opened
            while len(self._shards) > self.capacity:
                self._shards.popitem(last=False)
        return opened

    def __len__(self) -> int:
        return len(self._shards)


@dataclass(frozen=True)
class _Piece:
    """A chunk to read: where its bytes lie, which rows of the array it holds, whether all of them are wanted."""

    offset: int
    length: int
    first: int
    stop: int


@dataclass(frozen=True)
class _Form:
    """What an array's metadata say: shape, number type, fill value, extent of a file and of a chunk, how chunks are coded."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: AnyArray
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    sharded: bool
    compressed: bool


def _read_form(folder: Path) -> _Form | None:
    """The form of an array; None where format 1 has no such form.

    Raises:
        OSError, ValueError, KeyError, TypeError, IndexError: the metadata are missing or make no sense.
    """
    metadata = json.loads((folder / "zarr.json").read_bytes())
    outer = inner = tuple(int(n) for n in metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, at_end = metadata["codecs"], True
    sharded = codecs[0]["name"] == "sharding_indexed"
    if sharded:
        sharding = codecs[0]["configuration"]
        inner, codecs = tuple(int(n) for n in sharding["chunk_shape"]), sharding["codecs"]
        at_end = sharding.get("index_location", "end") == "end"
    names = [codec["name"] for codec in codecs]
    little = codecs[0].get("configuration", {}).get("endian", "little") == "little"
    dotted = metadata["chunk_key_encoding"]["configuration"]["separator"] == "."
    if names not in (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]) or not (little and dotted and at_end):
        return None
    dtype: np.dtype[Any] = np.dtype(metadata["data_type"])
    fill = np.asarray(float("nan") if metadata["fill_value"] == "NaN" else metadata["fill_value"], dtype)
    return _Form(tuple(int(n) for n in metadata["shape"]), dtype, fill, outer, inner, sharded, "blosc" in names)


class ShardedArray:
    """One array of a store, whose last axis lies whole in every chunk.

    Attributes:
        shape: of the array.
        dtype: native byte order.
        shard_length: frames of a shard, for an array (rows, frames, V).
        chunk_length: frames of a chunk.
    """

    def __init__(self, folder: Path, files: OpenShards) -> None:
        """Read the metadata.

        Raises:
            SwiftError: missing, damaged, or of a form that format 1 does not have.
        """
        try:
            form = _read_form(folder)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise SwiftError(f"array {folder.name} is missing or damaged (its zarr.json): restore it from a copy") from error
        if form is None:
            raise SwiftError(f"array {folder.name} has codecs that this swiftv2 does not read: update swiftv2")
        self._folder, self._files, self._form = folder, files, form
        self.shape, self.dtype = form.shape, form.dtype
        self.shard_length, self.chunk_length = (form.outer[-2], form.inner[-2]) if len(form.outer) > 1 else (1, 1)
        count = int(np.prod([o // i for o, i in zip(form.outer, form.inner, strict=True)]))
        self._chunks = count if form.sharded else None

    def read_row(self, row: int) -> AnyArray:
        """One row of a (rows, width) array: (width,); all of a (width,) array for row 0.

        Raises:
            ChunkError: its bytes are not what was written.
            OSError: the file system does not give them.
        """
        width, chunk = self.shape[-1], self._form.inner[-1]
        out = np.empty(width, dtype=self.dtype)
        for first in range(0, width, chunk):
            column = first // chunk
            key = f"c.{row // self._form.outer[0]}.{column}" if len(self.shape) > 1 else f"c.{column}"
            place = row % self._form.outer[0] if len(self.shape) > 1 else 0
            shard = self._open(key, None)
            entry = (ABSENT, ABSENT) if shard is None else shard.entries[place]
            part = out[first : first + chunk]
            if shard is None or entry == (ABSENT, ABSENT):
                part[:] = self._form.fill
                continue
            whole = part if len(part) == chunk else np.empty(chunk, dtype=self.dtype)
            self._fetch(shard, [_Piece(*entry, row, row + 1)], [whole])
            part[:] = whole[: len(part)]
        return out

    def read_frames(self, row: int, first: int, stop: int, out: AnyArray, size: int | None = None) -> None:
        """Frames first .. stop - 1 of a row of a (rows, frames, V) array.

        Args:
            row: which row.
            first: first frame.
            stop: frame behind the last.
            out: (stop - first, V) of the array's dtype, C-contiguous, to be filled.
            size: bytes of the row's shard where it is known and the row has one only; spares a call to the file system.

        Raises:
            ChunkError: a file or bytes are missing or not what was written.
            OSError: the file system does not give them.
        """
        for number in range(first // self.shard_length, (stop - 1) // self.shard_length + 1):
            begin = number * self.shard_length
            shard = self._open(f"c.{row}.{number}.0", size)
            if shard is None:
                raise ChunkError("its shard file is missing", begin, begin + self.shard_length)
            self._read_shard(shard, begin, max(first, begin), min(stop, begin + self.shard_length), out, first)

    def _read_shard(self, shard: _Shard, begin: int, first: int, stop: int, out: AnyArray, origin: int) -> None:
        length, width = self.chunk_length, self.shape[-1]
        pieces, targets, cut = [], [], []
        for chunk in range((first - begin) // length, (stop - 1 - begin) // length + 1):
            start, end = begin + chunk * length, begin + (chunk + 1) * length
            low, high = max(start, first), min(end, stop)
            wanted = out[low - origin : high - origin]
            if shard.entries[chunk] == (ABSENT, ABSENT):
                wanted[:] = self._form.fill
                continue
            whole = wanted if len(wanted) == length else np.empty((length, width), dtype=self.dtype)
            pieces.append(_Piece(*shard.entries[chunk], start, end))
            targets.append(whole)
            if whole is not wanted:
                cut.append((wanted, whole[low - start : high - start]))
        self._fetch(shard, pieces, targets)
        for wanted, part in cut:
            wanted[:] = part

    def _open(self, key: str, size: int | None) -> _Shard | None:
        try:
            return self._files.get(self._folder / key, self._chunks, size)
        except FileNotFoundError:
            return None

    def _fetch(self, shard: _Shard, pieces: list[_Piece], targets: list[AnyArray]) -> None:
        """Read chunks whole into their targets, neighbours in the file together, and check every one."""
        done = 0
        while done < len(pieces):
            last = done + 1
            while (
                last < min(len(pieces), done + _CHUNKS_A_CALL)
                and pieces[last].offset == pieces[last - 1].offset + pieces[last - 1].length
            ):
                last += 1
            fetch = self._fetch_compressed if self._form.compressed else self._fetch_plain
            fetch(shard, pieces[done:last], targets[done:last])
            done = last

    def _fetch_plain(self, shard: _Shard, pieces: list[_Piece], targets: list[AnyArray]) -> None:
        sums = [bytearray(_CHECKSUM_BYTES) for _ in pieces]
        views = [target.data.cast("B") for target in targets]
        for piece, view in zip(pieces, views, strict=True):
            if piece.length != len(view) + _CHECKSUM_BYTES:
                raise ChunkError("a chunk has another length than its array says", piece.first, piece.stop)
        buffers = [buffer for pair in zip(views, sums, strict=True) for buffer in pair]
        read = os.preadv(shard.descriptor, buffers, pieces[0].offset)
        for piece, view, stated in zip(pieces, views, sums, strict=True):
            read -= piece.length
            if read < 0:
                raise ChunkError("the shard is cut short", piece.first, piece.stop)
            if crc32c.crc32c(view) != int.from_bytes(stated, "little"):
                raise ChunkError("the checksum fails", piece.first, piece.stop)

    def _fetch_compressed(self, shard: _Shard, pieces: list[_Piece], targets: list[AnyArray]) -> None:
        if len(pieces) > 1:
            # The system goes on reading what comes next while a chunk is decoded.
            whole = pieces[-1].offset + pieces[-1].length - pieces[0].offset
            os.posix_fadvise(shard.descriptor, pieces[0].offset, whole, os.POSIX_FADV_WILLNEED)
        for piece, target in zip(pieces, targets, strict=True):
            chunk = _scratch(piece.length)
            if os.preadv(shard.descriptor, [chunk], piece.offset) != piece.length:
                raise ChunkError("the shard is cut short", piece.first, piece.stop)
            if not _sound(chunk):
                raise ChunkError("the checksum fails", piece.first, piece.stop)
            try:
                blosc.decompress(chunk[:-_CHECKSUM_BYTES], target)
            except (RuntimeError, ValueError) as error:
                raise ChunkError("a chunk cannot be decompressed", piece.first, piece.stop) from error


_threads = threading.local()


def _scratch(length: int) -> memoryview:
    """This thread's memory for encoded bytes: fresh memory for each chunk would cost more than reading it."""
    kept: bytearray | None = getattr(_threads, "scratch", None)
    if kept is None or len(kept) < length:
        kept = _threads.scratch = bytearray(length)
    return memoryview(kept)[:length]


def _sound(data: memoryview) -> bool:
    """Whether bytes end on the CRC-32C of those before."""
    return crc32c.crc32c(data[:-_CHECKSUM_BYTES]) == int.from_bytes(data[-_CHECKSUM_BYTES:], "little")
