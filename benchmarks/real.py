"""How far codecs compress real BOLD that comes with installed packages."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from formats import Codec, blosc
from machine import prose, table
from numcodecs import blosc as coder

PACKAGED = (("nibabel", "tests/data/functional.nii"), ("nitime", "data/fmri1.nii.gz"), ("nitime", "data/fmri2.nii.gz"))
_SHUFFLES = {"shuffle": coder.SHUFFLE, "bitshuffle": coder.BITSHUFFLE}


def real_table(further: Sequence[Path], chunks: Sequence[int], codecs: Sequence[Codec]) -> Iterator[str]:
    """Lines: bytes of each file's voxels under each codec and chunk, of their 16-bit integers without compression."""
    yield from prose(
        "Share of the bytes of 16-bit stored numbers; voxels that are 0 throughout are left out, as a store leaves them out, "
        "and so are the last one to seven, since blosc shuffles the bits of whole groups of eight only. Small files compress "
        "worse than whole brains. `functional.nii` holds floats spread over all 16 bits by whoever wrote it; the others hold "
        "a scanner's integers."
    )
    found = [
        Path(spec.origin).parent / name
        for package, name in PACKAGED
        if (spec := importlib.util.find_spec(package)) and spec.origin
    ]
    rows = []
    for path in [*found, *further]:
        stored = _stored(path)
        shape = f"{stored.shape[0]} x {stored.shape[1]}"
        for chunk in chunks:
            shares = [f"{_share(stored, chunk, codec):.3f}" for codec in codecs if codec != "none"]
            rows.append([path.name, shape, str(stored.dtype), str(chunk), *shares])
    yield from table(["file", "frames x voxels", "numbers", "chunk", *(codec for codec in codecs if codec != "none")], rows)


def _stored(path: Path) -> npt.NDArray[np.int16]:
    """A file's stored integers (frames, voxels), floats rounded; voxels that are 0 throughout left out."""
    image: Any = nibabel.load(path)
    values = np.asanyarray(image.dataobj.get_unscaled())
    flat = values.reshape(-1, values.shape[-1]).T
    if not np.issubdtype(flat.dtype, np.integer):
        top = np.abs(flat).max()
        flat = np.rint(flat if top <= np.iinfo(np.int16).max else flat * (np.iinfo(np.int16).max / top))
    kept = flat[:, flat.any(axis=0)]
    # A chunk here is one block of blosc, whose bits are shuffled only where it is whole groups of eight numbers.
    return np.ascontiguousarray(kept[:, : kept.shape[1] // 8 * 8].astype(np.int16))


def _share(stored: npt.NDArray[np.int16], chunk: int, codec: Codec) -> float:
    settings = blosc(codec, stored.dtype.itemsize)
    size = 0
    for first in range(0, len(stored), chunk):
        part = np.ascontiguousarray(stored[first : first + chunk])
        size += len(
            coder.compress(
                part, settings["cname"].encode(), settings["clevel"], _SHUFFLES[settings["shuffle"]], settings["blocksize"]
            )
        )
    return size / stored.nbytes
