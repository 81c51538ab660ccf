"""One run as the converters write it: NIfTI files that are whole or not there, brain masks, a picture to check by eye."""

import gzip
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from swiftv2.errors import SwiftError
from swiftv2.files import write_file

nifti: Any = nib
"""nibabel, most of whose functions carry no annotations."""
Volume = NDArray[np.float32]

_CLEAR = 100
"""How many times more voxels one background value must hold than the other for it to be beyond doubt."""
_SHOWN_FRAMES = 20


class RefusedError(SwiftError):
    """One subject cannot be converted; the message names neither file nor subject."""


class Frames(Protocol):
    """The run of one subject, opened."""

    shape: tuple[int, int, int]
    count: int
    remarks: tuple[str, ...]
    facts: dict[str, Any]

    def read(self, wanted: Sequence[int]) -> Iterable[Volume]:
        """The wanted frames, (H, W, D) float32 each, in ascending order."""


@dataclass(frozen=True)
class Where:
    """What the old formats never recorded: affine (voxel index to world mm, R A S), template space, TR in seconds."""

    affine: NDArray[np.float64]
    space: str
    tr: float


def header_of(shape: tuple[int, ...], dtype: np.dtype[Any], place: Where) -> Any:
    """Header of a single NIfTI file whose numbers need no scale."""
    header = nifti.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    edges = np.sqrt((place.affine[:3, :3] ** 2).sum(axis=0))
    header.set_zooms((*edges, place.tr)[: len(shape)])
    header.set_xyzt_units("mm", "sec")
    header.set_sform(place.affine, code=4)
    header.set_qform(place.affine, code=4)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header


def check_same(path: Path, header: Any) -> str:
    """Check that a file of an earlier attempt, which is whole, was written with these options."""
    there = nifti.load(path)
    same = there.shape == header.get_data_shape() and np.allclose(there.affine, header.get_best_affine())
    if not same or abs(float(there.header["pixdim"][4]) - float(header["pixdim"][4])) > 1e-6:
        raise RefusedError("converted before with other options or from other frames: remove it, or give another folder")
    return "there already"


def beside(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f".{path.name}.partial")


def write_bold(path: Path, header: Any, run: Frames) -> tuple[Volume, Volume]:
    """Write frame after frame beside the file; returns each voxel's smallest and largest value."""
    low, high = np.full(run.shape, np.inf, np.float32), np.full(run.shape, -np.inf, np.float32)
    try:
        with beside(path).open("wb") as raw:
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as stream:
                header.write_to(stream)
                for number, frame in enumerate(run.read(range(run.count))):
                    _check_finite(frame, number)
                    np.minimum(low, frame, out=low)
                    np.maximum(high, frame, out=high)
                    stream.write(frame.astype("<f4", copy=False).tobytes(order="F"))
            raw.flush()
            os.fsync(raw.fileno())
    except BaseException:
        beside(path).unlink(missing_ok=True)
        raise
    return low, high


def _check_finite(frame: Volume, number: int) -> None:
    if not np.isfinite(frame).all():
        raise RefusedError(f"frame {number} holds NaN or infinity")


def find_brain(low: Volume, high: Volume, background: str) -> tuple[NDArray[np.bool_], float]:
    """Voxels that differ from the background at some time, and the background's value."""
    smallest = float(low.min())
    held = {value: int(((low == value) & (high == value)).sum()) for value in {smallest, 0.0}}
    value = {"min": smallest, "zero": 0.0}.get(background)
    if value is None:
        value = max(held, key=lambda one: held[one])
        other = min(held.values()) if len(held) > 1 else 0
        if not held[value]:
            raise RefusedError("no voxel keeps the smallest value or 0 all the time: say --background min or zero")
        if other * _CLEAR > held[value]:
            raise RefusedError("voxels keep the smallest value and others 0 all the time: say --background min or zero")
    brain = (low != value) | (high != value)
    if not (brain & (low != high)).any():
        raise RefusedError("no voxel changes over the run")
    return brain, value


def write_mask(path: Path, mask: NDArray[np.bool_], place: Where) -> None:
    """Write a brain mask (H, W, D), whole or not at all."""
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=buffer, mtime=0) as stream:
        header_of(mask.shape, np.dtype(np.uint8), place).write_to(stream)
        stream.write(mask.astype(np.uint8).tobytes(order="F"))
    write_file(path, buffer.getvalue())


def describe(out: Path, made_by: str) -> None:
    """Say who made the files; the maker's name is none of swiftv2's own, which would mark the data as generated."""
    content = {
        "Name": "Converted SwiFT data",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": made_by}],
    }
    write_file(out / "dataset_description.json", json.dumps(content, indent=1) + "\n")


def draw_mean(path: Path, run: Frames, place: Where, orientation: str) -> int:
    """Draw three planes of a run's mean with the sides that the options say; returns the number of frames in the mean."""
    from matplotlib.figure import Figure

    wanted = sorted({int(n) for n in np.linspace(0, run.count - 1, min(_SHOWN_FRAMES, run.count))})
    total = np.zeros(run.shape)
    for frame in run.read(wanted):
        total += frame
    image = nifti.as_closest_canonical(nifti.Nifti1Image(total / len(wanted), place.affine))
    mean, affine = np.asarray(image.dataobj), np.asarray(image.affine)
    outline = _template(mean.shape, affine) if place.space.startswith("MNI152") else None
    with np.errstate(invalid="ignore"):
        inside = np.abs(mean - mean.flat[0]) > 1e-3 * np.ptp(mean)
    middle = [int(np.median(places)) for places in np.nonzero(inside)] if inside.any() else [n // 2 for n in mean.shape]
    figure: Any = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle(f"mean, as {orientation} in {place.space}: left is drawn left; red: template's brain")
    for axis, (cut, sides) in zip(figure.subplots(1, 3), enumerate(("PA", "LR", "LR")), strict=True):
        picture = mean.take(middle[cut], axis=cut)
        axis.imshow(picture.T, origin="lower", cmap="gray", interpolation="nearest")
        if outline is not None and outline.take(middle[cut], axis=cut).any():
            axis.contour(outline.take(middle[cut], axis=cut).T, levels=[0.5], colors="red", linewidths=0.8)
        world = (affine @ [*middle, 1])[cut]
        axis.set(xticks=[], yticks=[], title=f"{'xyz'[cut]} = {world:.0f} mm")
        for side, x in zip(sides, (0.02, 0.95), strict=True):
            axis.text(x, 0.03, side, transform=axis.transAxes, color="orange", fontsize=14, weight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue(), 0o600)
    return len(wanted)


def _template(shape: tuple[int, ...], affine: NDArray[np.float64]) -> Any:
    """The MNI152 brain mask on a grid whose axes follow R, A, S."""
    from nilearn.datasets import load_mni152_brain_mask
    from nilearn.image import resample_img

    mask = load_mni152_brain_mask(resolution=2)
    options = {"interpolation": "nearest", "force_resample": True, "copy_header": True}
    return np.asarray(resample_img(mask, target_affine=affine, target_shape=shape, **options).dataobj)
