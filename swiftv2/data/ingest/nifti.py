"""Reading NIfTI as it lies on disk: stored numbers and their scale, where the voxels are, how long a volume took."""

import errno
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from swiftv2.data.grid import FloatArray, Placement, orientations
from swiftv2.errors import SwiftError

TR_RANGE_S = (0.05, 20.0)
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
_UNSET_TR_S = (0.0, 1.0)
"""Values that tools write into the header where they do not know the repetition time."""
_TR_TOLERANCE_S = 0.005
MOST_FRAMES = 100_000
"""Volumes of a run at most, 14 hours at 0.5 s: all runs share arrays that are as long as the longest one."""
_DEFLATE_RATIO = 1032
"""Bytes that one byte of a gzip file can stand for at most."""
_BLOCK_BYTES = 1 << 22
_DAMAGE = (
    EOFError,
    zlib.error,
    OSError,
    ValueError,
    KeyError,
    OverflowError,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)
"""What nibabel raises on files that are cut short or whose header makes no sense."""


class RefusedError(SwiftError):
    """One run cannot be taken; the message is the reason and names neither file nor subject."""


@dataclass(frozen=True)
class Header:
    """What a 4-D NIfTI file says of itself.

    Attributes:
        shape: voxels along the file's three axes.
        frames: volumes.
        dtype: numbers as stored, native byte order.
        slope, intercept: value = stored x slope + intercept.
        affine: (4, 4) float64, voxel index to world mm (R, A, S).
        orientation: direction in which the file's indices grow, such as LAS.
        tr: repetition time in seconds that the header states; None where it states none.
    """

    shape: tuple[int, int, int]
    frames: int
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    affine: FloatArray
    orientation: str
    tr: float | None


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except RefusedError:
        raise
    except FileNotFoundError as error:
        raise RefusedError(f"{what} is missing") from error
    except _DAMAGE as error:
        # Errors of the file system have a number, gzip's have none; a header without sense asks for places that make none.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise RefusedError(f"{what} cannot be read ({error.strerror})") from error
        raise RefusedError(f"{what} is truncated or damaged ({type(error).__name__})") from error


def _load(path: Path, what: str) -> Any:
    with _refusing(what):
        path.open("rb").close()  # nibabel calls a file that may not be read damaged.
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise RefusedError(f"{what} is not a single NIfTI file")
        return image


def _checked_affine(image: Any) -> FloatArray:
    header = image.header
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes == (0, 0):
        raise RefusedError("no orientation: sform_code and qform_code are both 0; set them where left and right are known")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(float(np.linalg.det(affine[:3, :3]))) < 1e-6:
        raise RefusedError("the affine is singular or not finite")
    if None in orientations.aff2axcodes(affine):
        raise RefusedError("the affine does not tell which way an axis runs")
    if all(codes):
        with _refusing("the header's qform"):
            handed = np.linalg.det(header.get_qform()[:3, :3])
        if handed * np.linalg.det(affine[:3, :3]) < 0:
            raise RefusedError("sform and qform disagree on left and right")
    return affine


def read_header(path: Path) -> Header:
    """Read and check the header of a BOLD file.

    Raises:
        RefusedError: unreadable, not 4-D, one frame or too many, an unusable number type, more data than the file can hold, no
            orientation.
    """
    image = _load(path, "the file")
    shape = tuple(int(n) for n in image.shape)
    if len(shape) != 4:
        raise RefusedError(f"{len(shape)}-D, not 4-D")
    if shape[3] < 2:
        raise RefusedError("one frame only")
    if min(shape) < 1:
        raise RefusedError(f"an empty axis: shape {shape}")
    if shape[3] > MOST_FRAMES:
        raise RefusedError(
            f"its header states {shape[3]} frames, more than {MOST_FRAMES}: it is damaged, or the run must be cut"
        )
    with _refusing("the header's number type"):
        dtype = image.header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise RefusedError(f"number type {dtype} is not supported")
    _check_size(path, int(image.dataobj.offset) + math.prod(shape) * dtype.itemsize)
    affine = _checked_affine(image)
    with _refusing("the header's time unit"):
        tr = _header_tr(image.header)
    return Header(
        shape=(shape[0], shape[1], shape[2]),
        frames=shape[3],
        dtype=dtype.newbyteorder("="),
        slope=float(image.dataobj.slope),
        intercept=float(image.dataobj.inter),
        affine=affine,
        orientation="".join(orientations.aff2axcodes(affine)),
        tr=tr,
    )


def _check_size(path: Path, stated: int) -> None:
    """Refuse a header that states more bytes than the file can hold, before anything gets the size that it states."""
    with _refusing("the file"):
        size = path.stat().st_size
    if stated > size * (_DEFLATE_RATIO if path.name.endswith(".gz") else 1):
        raise RefusedError(f"the file is truncated or its header damaged: {size} bytes cannot hold the {stated} that it states")


def _header_tr(header: Any) -> float | None:
    unit = _SECONDS.get(header.get_xyzt_units()[1])
    tr = float(header["pixdim"][4])
    return None if unit is None or not np.isfinite(tr) or tr <= 0 else round(tr * unit, 6)


def repetition_time(stated: float | None, header: Header, expected: float | None = None) -> float:
    """The repetition time in seconds: what a side-car or label table states, else what the header states.

    Args:
        stated: from the side-car or the label table.
        header: the file's header.
        expected: what the user says that all runs have.

    Raises:
        RefusedError: missing, implausible, contradictory, or not what is expected.
    """
    tr = header.tr if stated is None else stated
    if tr is None:
        raise RefusedError("TR missing: no RepetitionTime in a side-car, no tr in the label table, no timed pixdim[4]")
    if not TR_RANGE_S[0] <= tr <= TR_RANGE_S[1]:
        raise RefusedError(f"TR {tr:g} s is implausible (0.05 to 20 s)")
    known = header.tr is not None and header.tr not in _UNSET_TR_S
    if known and header.tr is not None and abs(header.tr - tr) > _TR_TOLERANCE_S:
        raise RefusedError(f"TR {tr:g} s beside the file, {header.tr:g} s in its header")
    if expected is not None and abs(tr - expected) > _TR_TOLERANCE_S:
        raise RefusedError(f"TR {tr:g} s where {expected:g} s is expected")
    return tr


def _frames(path: Path, count: int) -> Iterator[npt.NDArray[Any]]:
    """Volumes one after another, flat, first axis fastest, as stored; reading on to the end proves gzip's checksum."""
    image = _load(path, "the file")
    header = image.header
    dtype = header.get_data_dtype()
    voxels = int(np.prod(image.shape[:3]))
    with _refusing("the file"), nib.openers.ImageOpener(str(path)) as stream:
        stream.seek(image.dataobj.offset)
        for _ in range(count):
            data = stream.read(voxels * dtype.itemsize)
            if len(data) != voxels * dtype.itemsize:
                raise RefusedError("the file is truncated: fewer volumes than its header states")
            yield np.frombuffer(data, dtype=dtype).astype(dtype.newbyteorder("="), copy=False)
        rest = 0
        while block := stream.read(_BLOCK_BYTES):
            rest += len(block)
        if rest >= voxels * dtype.itemsize:
            raise RefusedError("the file holds more volumes than its header states: write the header anew")


def background_number(dtype: np.dtype[Any], slope: float, intercept: float) -> float:
    """The stored number nearest to the value 0: what stands where a file's field of view does not reach."""
    nearest = -intercept / slope
    if dtype.kind == "f":
        return nearest
    limits = np.iinfo(dtype)
    return float(np.clip(np.rint(nearest), limits.min, limits.max))


@dataclass(frozen=True)
class Bold:
    """A run's kept voxels.

    Attributes:
        numbers: (frames, V), as the file stores them, or interpolated float32 values.
        slope, intercept: value = number x slope + intercept.
        nonzero: (V,) bool, whether the voxel is in the field of view and has another value than 0 at some time.
    """

    numbers: npt.NDArray[Any]
    slope: float
    intercept: float
    nonzero: npt.NDArray[np.bool_]


def read_bold(path: Path, header: Header, placement: Placement) -> Bold:
    """Read the kept voxels of all volumes; where the grids differ, smoothed by `placement.sigma` and interpolated.

    Memory: the result and one volume, three of them as float64 where it interpolates.

    Raises:
        RefusedError: truncated, damaged, or longer than its header states.
    """
    if not placement.exact:
        return _read_resampled(path, header, placement)
    numbers = np.empty((header.frames, len(placement.flat)), dtype=header.dtype)
    zero = background_number(header.dtype, header.slope, header.intercept)
    hidden = zero * header.slope + header.intercept != 0  # No stored number stands for 0, so no voxel is background.
    nonzero = np.full(len(placement.flat), hidden)
    for number, volume in enumerate(_frames(path, header.frames)):
        np.take(volume, placement.flat, out=numbers[number])
        nonzero |= numbers[number] != zero
    if not placement.inside.all():
        numbers[:, ~placement.inside] = zero
    return Bold(numbers, header.slope, header.intercept, nonzero & placement.inside)


def _read_resampled(path: Path, header: Header, placement: Placement) -> Bold:
    numbers = np.empty((header.frames, len(placement.flat)), dtype=np.float32)
    nonzero = np.zeros(header.shape, dtype=bool)
    for number, volume in enumerate(_frames(path, header.frames)):
        values = volume.reshape(header.shape, order="F").astype(np.float64) * header.slope + header.intercept
        nonzero |= values != 0
        numbers[number] = _interpolate(values, placement)
    numbers[:, ~placement.inside] = 0.0
    return Bold(numbers, 1.0, 0.0, _covered(nonzero, placement))


def _interpolate(values: FloatArray, placement: Placement) -> FloatArray:
    """A volume on a file's grid at the kept voxels, (V,): smoothed if finer, then linear, beyond the border as on it."""
    if any(placement.sigma):
        values = ndimage.gaussian_filter(values, placement.sigma, mode="nearest")
    there: FloatArray = ndimage.map_coordinates(values, placement.coordinates.T, order=1, mode="nearest")
    return there


def _covered(mask: npt.NDArray[np.bool_], placement: Placement) -> npt.NDArray[np.bool_]:
    """The kept voxels (V,) of which at least half lies in a mask on the file's grid."""
    return np.asarray((_interpolate(mask.astype(np.float64), placement) >= 0.5) & placement.inside, dtype=np.bool_)


def read_mask(path: Path, header: Header, placement: Placement) -> npt.NDArray[np.bool_]:
    """Brain mask (V,) at the kept voxels, from a 3-D file on the grid of the BOLD file; interpolated as that is, from 0.5 on.

    Raises:
        RefusedError: unreadable, or on another grid than the BOLD file.
    """
    image = _load(path, "the brain mask")
    shape = tuple(image.shape[:3])
    if int(np.prod(image.shape)) != int(np.prod(header.shape)) or shape != header.shape:
        raise RefusedError("the brain mask has another shape than the BOLD file")
    if np.abs(np.asarray(image.affine) - header.affine).max() > 1e-2:
        raise RefusedError("the brain mask has another affine than the BOLD file")
    with _refusing("the brain mask"):
        volume = np.asarray(image.dataobj).reshape(header.shape)
    if not placement.exact:
        return _covered(volume > 0, placement)
    return np.asarray((volume.ravel(order="F") > 0)[placement.flat] & placement.inside, dtype=np.bool_)
