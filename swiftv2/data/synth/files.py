"""A generated subject's files, as fMRIPrep would leave them: NIfTI integers, side-cars, masks, confounds."""

import csv
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from swiftv2.config.synth import SynthConfig
from swiftv2.data import keyed
from swiftv2.data.synth.anatomy import SPACE, Atlas, Lattice, brain_margins, window_lattice
from swiftv2.data.synth.people import Person
from swiftv2.data.synth.volumes import SLOPE, Run, make_anatomy, make_run

nifti: Any = nib
FAULTS = ("truncated", "nan", "constant", "three_dimensional", "no_orientation")
ROOM_VOXELS = 2
"""Voxels of the field of view beyond the template's brain."""
CENSOR_MM = 0.5
GZIP_WINDOW = 31
"""What zlib takes for a gzip file with the largest window; it writes no time into it."""


def write_person(config: SynthConfig, person: Person, atlas: Atlas, root: Path, fault: str | None = None) -> tuple[int, int]:
    """Write all runs of a subject.

    Args:
        config: the cohort's configuration.
        person: the subject.
        atlas: tissue and network maps.
        root: the dataset's folder.
        fault: what is wrong with the first BOLD file, one of `FAULTS`.

    Returns:
        Runs and volumes written.
    """
    layout = keyed.generator(config.seed, "layout", person.index)
    las = bool(layout.random() < config.las_share)
    voxel_mm = config.other_voxel_mm if layout.random() < config.other_voxel_share else config.voxel_mm
    lattice = field_of_view(atlas, voxel_mm)
    anatomy = make_anatomy(person, atlas, lattice, keyed.generator(config.seed, "anatomy", person.index))
    frames = config.run_frames(person.tr)
    for session in range(person.sessions):
        rng = keyed.generator(config.seed, "run", person.index, session)
        non_steady = int(rng.integers(0, config.non_steady_frames + 1))
        run = make_run(person, anatomy, frames, non_steady, rng)
        label = f"ses-{session + 1}" if person.sessions > 1 else ""
        folder = root / person.name / label / "func"
        folder.mkdir(parents=True)
        stem = "_".join(part for part in (person.name, label, "task-rest", f"space-{SPACE}") if part)
        _write_run(folder, stem, person, lattice, las, run, anatomy.brain)
        if fault and session == 0:
            _spoil(folder / f"{stem}_desc-preproc_bold.nii.gz", fault)
    return person.sessions, person.sessions * frames


def field_of_view(atlas: Atlas, voxel_mm: float) -> Lattice:
    """A box on the store's lattice with some room around the template's brain."""
    low, high = brain_margins(atlas, voxel_mm)
    a, b, c = (max(n - ROOM_VOXELS, 0) for n in low)
    d, e, f = (max(n - ROOM_VOXELS, 0) for n in high)
    return window_lattice(voxel_mm, (a, b, c), (d, e, f))


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows with the same columns as tab-separated values."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_run(
    folder: Path, stem: str, person: Person, lattice: Lattice, las: bool, run: Run, brain: NDArray[np.bool_]
) -> None:
    side = {"RepetitionTime": person.tr, "TaskName": "rest", "SkullStripped": False, "Space": SPACE}
    (folder / f"{stem}_desc-preproc_bold.json").write_text(json.dumps(side, indent=1) + "\n", encoding="utf-8")
    affine = lattice.affine(las)
    _save(folder / f"{stem}_desc-preproc_bold.nii.gz", run.stored, affine, las, tr=person.tr, slope=SLOPE)
    _save(folder / f"{stem}_desc-brain_mask.nii.gz", brain.astype(np.uint8), affine, las)
    tables = stem.partition("_space-")[0]
    write_table(folder / f"{tables}_desc-confounds_timeseries.tsv", _confound_rows(run))


def _confound_rows(run: Run) -> list[dict[str, str]]:
    frames = len(run.stored)
    flags = {f"non_steady_state_outlier{i:02d}": i for i in range(run.non_steady)}
    moved = np.flatnonzero(np.nan_to_num(run.confounds["framewise_displacement"]) > CENSOR_MM)
    flags |= {f"motion_outlier{i:02d}": int(frame) for i, frame in enumerate(moved)}
    return [
        {name: "n/a" if np.isnan(values[t]) else f"{values[t]:.6g}" for name, values in run.confounds.items()}
        | {name: str(int(t == frame)) for name, frame in flags.items()}
        for t in range(frames)
    ]


def _save(
    path: Path,
    data: NDArray[Any],
    affine: NDArray[np.float64],
    las: bool,
    *,
    tr: float | None = None,
    slope: float | None = None,
) -> None:
    """Write (z, y, x) or (T, z, y, x) numbers of RAS order as NIfTI in RAS or LAS voxel order."""
    turned = data[..., ::-1] if las else data
    order = (3, 2, 1, 0) if data.ndim == 4 else (2, 1, 0)
    image = nifti.Nifti1Image(turned.transpose(order), affine, dtype=data.dtype)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=4)
    if tr is not None:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    image.header.set_xyzt_units("mm", "sec")
    if slope is not None:
        image.header.set_slope_inter(slope, 0.0)
    # Run-length matching finds the empty background and does not look for repeats in noise: half the time, smaller files.
    packer = zlib.compressobj(1, zlib.DEFLATED, GZIP_WINDOW, 9, zlib.Z_RLE)
    path.write_bytes(packer.compress(image.to_bytes()) + packer.flush())


def _spoil(path: Path, fault: str) -> None:
    if fault == "truncated":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return
    image = nifti.load(path)
    values, affine, zooms = np.asarray(image.dataobj, np.float32), image.affine, image.header.get_zooms()
    if fault == "nan":
        values[tuple(n // 2 for n in values.shape[:3])] = np.nan
    elif fault == "constant":
        values[:] = values.mean()
    elif fault == "three_dimensional":
        values, zooms = values[..., 0], zooms[:3]
    spoilt = nifti.Nifti1Image(values, affine)
    spoilt.header.set_zooms(zooms)
    spoilt.header.set_xyzt_units("mm", "sec")
    code = 0 if fault == "no_orientation" else 4
    spoilt.set_sform(affine, code=code)
    spoilt.set_qform(affine, code=code)
    nifti.save(spoilt, path)
