"""Convert SwiFT v2's HDF5 files, one a subject, to NIfTI files that `swiftv2 store build` takes.

Read: `SOURCE/SUBJECT.h5` (or .hdf5) with one 4-D data set of raw frames, float16 or float32. Needs h5py
(`pip install 'swiftv2[migrate]'`).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from migration import convert, parser, run_tool
from migration_files import RefusedError, Volume

from swiftv2.errors import SwiftError, UsageError

try:
    import h5py
except ImportError:
    h5py = None

PROGRAM = "convert_swift_v2_hdf5"
_SUFFIXES = (".h5", ".hdf5", ".hdf")
_DAMAGE = (OSError, RuntimeError, ValueError, KeyError)
_BLOCK_BYTES = 1 << 28


class HDF5File:
    """The data set of one subject; opened for each reading, so that no handle stays."""

    def __init__(self, path: Path, dataset: str | None, frames: str) -> None:
        """Find the data set and its axis of frames.

        Raises:
            RefusedError: damaged, no fitting data set, several, or an axis that cannot be told.
        """
        self._path = path
        self.remarks: tuple[str, ...] = ()
        self.facts: dict[str, Any] = {"Normalisation": "none, by SwiFT v2"}
        try:
            with h5py.File(path, "r") as file:
                self._dataset = _find(file, dataset)
                found = file[self._dataset]
                self._axis = _frame_axis(found.shape, found.chunks, frames)
                shape = [int(n) for axis, n in enumerate(found.shape) if axis != self._axis]
                self.shape, self.count = (shape[0], shape[1], shape[2]), int(found.shape[self._axis])
                chunk = found.chunks[self._axis] if found.chunks else 1
        except _DAMAGE as error:
            raise RefusedError(f"the file cannot be read ({type(error).__name__})") from error
        # A chunk is decompressed whole: reading it frame by frame would do so again for each.
        self._block = max(1, min(chunk, _BLOCK_BYTES // (4 * int(np.prod(self.shape)))))

    def read(self, wanted: Sequence[int]) -> Iterator[Volume]:
        """The wanted frames, (H, W, D) float32."""
        frames, done = set(wanted), 0
        try:
            with h5py.File(self._path, "r") as file:
                data = file[self._dataset]
                for first in range(0, self.count, self._block):
                    here = range(first, min(first + self._block, self.count))
                    if not frames.intersection(here):
                        continue
                    part = slice(here.start, here.stop)
                    block = np.moveaxis(data[part] if self._axis == 0 else data[..., part], self._axis, 0)
                    for number in here:
                        if number in frames:
                            yield block[number - first].astype(np.float32)
                            done += 1
        except _DAMAGE as error:
            raise RefusedError(f"frames from {done} on cannot be read ({type(error).__name__})") from error


def _find(file: Any, wanted: str | None) -> str:
    if wanted is not None:
        if not isinstance(file.get(wanted), h5py.Dataset) or not _fits(file[wanted]):
            raise RefusedError("--dataset names no 4-D data set of float16 or float32 in it")
        return wanted
    fitting: list[str] = []
    file.visititems(lambda name, found: fitting.append(name) if isinstance(found, h5py.Dataset) and _fits(found) else None)
    if len(fitting) != 1:
        kind = "4-D data sets of float16 or float32"
        raise RefusedError(f"it holds {len(fitting)} {kind}{': name one by --dataset' if fitting else ''}")
    return fitting[0]


def _fits(found: Any) -> bool:
    return found.ndim == 4 and found.dtype in (np.dtype(np.float16), np.dtype(np.float32)) and min(found.shape) > 0


def _frame_axis(shape: tuple[int, ...], chunks: tuple[int, ...] | None, stated: str) -> int:
    """Which axis counts the frames: as stated, else the one beside a cube, else the one that chunks cut to single frames."""
    if stated != "auto":
        return 0 if stated == "first" else 3
    cubes = [axis for axis in (0, 3) if len({n for place, n in enumerate(shape) if place != axis}) == 1]
    single = [axis for axis in (0, 3) if chunks and chunks[axis] == 1 and _whole(shape, chunks, axis)]
    for candidates in (cubes, single):
        if len(candidates) == 1:
            return candidates[0]
    raise RefusedError(f"whether frames are the first or the last axis of {tuple(shape)} cannot be told: say --frames-axis")


def _whole(shape: tuple[int, ...], chunks: tuple[int, ...], frames: int) -> bool:
    return all(n == chunk for axis, (n, chunk) in enumerate(zip(shape, chunks, strict=True)) if axis != frames)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    options = parser(PROGRAM, __doc__ or "", "folder of HDF5 files, one a subject")
    options.add_argument("--dataset", metavar="PATH", help="of the frames in the file; the only 4-D one by default")
    options.add_argument(
        "--frames-axis", choices=("auto", "first", "last"), default="auto", help="which axis counts the frames"
    )

    def command() -> int:
        arguments: argparse.Namespace = options.parse_args(argv)
        if h5py is None:
            raise SwiftError("h5py is needed: pip install 'swiftv2[migrate]'")
        if not arguments.source.is_dir():
            raise UsageError(f"{arguments.source} is no folder: give the one that holds the HDF5 files")
        files = [path for path in arguments.source.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
        return convert(arguments, files, lambda path: HDF5File(path, arguments.dataset, arguments.frames_axis), PROGRAM, "zero")

    return run_tool(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
