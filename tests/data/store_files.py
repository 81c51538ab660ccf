"""Small BOLD files as a scanner and fMRIPrep would leave them, and folders compared byte by byte."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from swiftv2.config.data import GridConfig

nifti: Any = nib
"""nibabel, most of whose functions carry no annotations."""
SPACE = "MNI152NLin6Asym"
SHAPE = (34, 40, 36)
FRAMES = 23
GRID = GridConfig(voxel_mm=6.0)


def mni_affine(voxel_mm: float = 6.0) -> npt.NDArray[np.float64]:
    """RAS affine of a box of 34 x 40 x 36 voxels at 6 mm on the lattice of FSL's template, wider than the cube."""
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = (-102.0, -126.0, -108.0)
    return affine


def bold_values(seed: int, frames: int = FRAMES, shape: tuple[int, int, int] = SHAPE) -> npt.NDArray[np.int16]:
    """Integers (H, W, D, T) with a mean of about 1000 that differ everywhere, so that a flip shows."""
    rng = np.random.default_rng(seed)
    static = rng.integers(500, 1500, size=(*shape, 1))
    return np.asarray(static + rng.integers(-20, 20, size=(*shape, frames)), dtype=np.int16)


def save_nifti(
    path: Path,
    data: npt.NDArray[Any],
    affine: npt.NDArray[np.float64],
    *,
    tr: float = 2.0,
    codes: tuple[int, int] = (4, 4),
    scale: tuple[float, float] | None = None,
) -> Path:
    """Write a NIfTI file with stored numbers `data`; `scale` is slope and intercept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nifti.Nifti1Image(data, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    if data.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    image.header.set_xyzt_units("mm", "sec")
    if scale is not None:
        image.header.set_slope_inter(*scale)
    nifti.save(image, path)
    return path


def save_run(
    root: Path,
    subject: str,
    data: npt.NDArray[Any],
    *,
    affine: npt.NDArray[np.float64] | None = None,
    space: str = SPACE,
    tr: float | None = 2.0,
    mask: npt.NDArray[np.bool_] | None = None,
    run: str = "1",
    **options: Any,
) -> Path:
    """Write a run as fMRIPrep would: BOLD, side-car with RepetitionTime, and a brain mask where one is given."""
    where = mni_affine() if affine is None else affine
    folder = root / f"sub-{subject}" / "func"
    stem = f"sub-{subject}_task-rest_run-{run}_space-{space}"
    path = save_nifti(folder / f"{stem}_desc-preproc_bold.nii.gz", data, where, tr=tr or 2.0, **options)
    if tr is not None:
        (folder / f"{stem}_desc-preproc_bold.json").write_text(json.dumps({"RepetitionTime": tr}))
    if mask is not None:
        save_nifti(folder / f"{stem}_desc-brain_mask.nii.gz", mask.astype(np.uint8), where)
    return path


def flipped(data: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """The same image with its first axis stored the other way round."""
    turn = np.diag([-1.0, 1.0, 1.0, 1.0])
    turn[0, 3] = data.shape[0] - 1
    return data[::-1], affine @ turn


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
