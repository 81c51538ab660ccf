"""One run: from its files to the numbers, masks and statistics of its row in the store."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swiftv2.config.clean import CleanConfig
from swiftv2.data.grid import FloatArray, Grid, Placement, place
from swiftv2.data.ingest.clean import clean_run
from swiftv2.data.ingest.confounds import Confounds, leading_non_steady, read_confounds
from swiftv2.data.ingest.discover import Source
from swiftv2.data.ingest.nifti import Bold, Header, RefusedError, read_bold, read_mask
from swiftv2.data.ingest.quantise import Stored, to_stored
from swiftv2.data.statistics import is_cleaned, run_statistics, voxel_statistics
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run
from swiftv2.files import sha256, write_file

PER_FRAME = tuple(small.name for small in layout.SMALL_ARRAYS if small.axis == "frame")


@dataclass(frozen=True)
class Candidate:
    """A run whose header was found good: where it goes and what it is called.

    Attributes:
        row: its row in the arrays.
        key, subject: pseudonymous keys.
        cohort: name of the cohort.
        source: its files.
        header: of the BOLD file.
        tr: repetition time in seconds.
        space: template space.
    """

    row: int
    key: str
    subject: str
    cohort: str
    source: Source
    header: Header
    tr: float
    space: str


@dataclass(frozen=True)
class Taken:
    """A run ready to be written: its index entry (bytes still 0), its frames, and its rows of the small arrays."""

    run: Run
    bold: npt.NDArray[Any]
    rows: dict[str, npt.NDArray[Any]]


def take_run(
    candidate: Candidate,
    grid: Grid,
    voxels: npt.NDArray[np.int32],
    *,
    resample: bool = False,
    keep_float: bool = False,
    clean: CleanConfig | None = None,
) -> Taken:
    """Read a run, bring it to the grid, check it and compute its statistics.

    Memory: the run's kept voxels as the file holds them and as the store does, and one volume; cleaning and interpolation hold
    them as float32 beside these.

    Args:
        candidate: the run.
        grid: the store's window.
        voxels: (V,) kept voxels of the grid.
        resample: whether a run on another grid may be interpolated.
        keep_float: whether numbers that are no integers stay float32.
        clean: how time courses are cleaned; untouched when None.

    Raises:
        RefusedError: the run cannot be taken, or not in the memory that is there.
    """
    try:
        return _take(candidate, grid, voxels, resample, keep_float, clean)
    except MemoryError as error:
        raise RefusedError(f"no memory for its {candidate.header.frames} frames: give the build more") from error


def _take(
    candidate: Candidate,
    grid: Grid,
    voxels: npt.NDArray[np.int32],
    resample: bool,
    keep_float: bool,
    clean: CleanConfig | None,
) -> Taken:
    source, header = candidate.source, candidate.header
    placement = _checked_placement(grid, voxels, header, resample=resample)
    bold = read_bold(source.path, header, placement)
    _check_finite(bold.numbers)
    brain, rule = _brain(source, header, placement, bold)
    rows: dict[str, npt.NDArray[Any]] = {"brain": brain}
    steady_from = 0
    if source.confounds is not None:
        confounds = read_confounds(source.confounds, header.frames)
        steady_from = leading_non_steady(confounds.non_steady_state)
        rows |= _known(confounds)
    cleaning: dict[str, Any] = {}
    if clean is not None and clean.active:
        bold, cleaning = clean_run(bold, brain, clean, candidate.tr, steady_from, source.confounds)
    stored = to_stored(bold.numbers, bold.slope, bold.intercept, keep_float=keep_float)
    del bold
    mean, std = voxel_statistics(stored.bold[steady_from:], brain, stored.slope, stored.intercept)
    if not std[brain].any():
        raise RefusedError("constant: no brain voxel changes over the run")
    rows |= {"voxel_mean": mean, "voxel_std": std}
    run = _entry(candidate, placement, stored, brain, rule, steady_from, is_cleaned(mean, std, brain), cleaning)
    run = replace(run, confounds=tuple(name for name in PER_FRAME if name in rows))
    return Taken(run, stored.bold, rows)


def _known(confounds: Confounds) -> dict[str, npt.NDArray[Any]]:
    """The per-frame rows that tell anything."""
    rows = {name: getattr(confounds, name) for name in PER_FRAME}
    return {
        name: row for name, row in rows.items() if not (np.isnan(row) if row.dtype.kind == "f" else row == layout.UNKNOWN).all()
    }


def _checked_placement(grid: Grid, voxels: npt.NDArray[np.int32], header: Header, *, resample: bool) -> Placement:
    placement = place(grid, voxels, header.shape, header.affine)
    if not placement.exact and not resample:
        edges = "x".join(f"{edge:.3g}" for edge in np.sqrt((header.affine[:3, :3] ** 2).sum(axis=0)))
        wanted = "x".join(f"{edge:.3g}" for edge in grid.voxel_mm)
        raise RefusedError(
            f"its voxels ({edges} mm) do not fall on those of the store ({wanted} mm): grid.resample=true interpolates"
        )
    if not placement.inside.any():
        raise RefusedError("its field of view does not meet the store's voxels")
    if grid.kind == "source" and not placement.inside.all():
        raise RefusedError("its field of view differs from the first run's, which is the grid")
    return placement


def _check_finite(numbers: npt.NDArray[Any]) -> None:
    if numbers.dtype.kind == "f":
        bad = sum(int(volume.size - np.isfinite(volume).sum()) for volume in numbers)
        if bad:
            raise RefusedError(f"NaN or infinity: {bad} of {numbers.size} numbers in the kept voxels")


def _brain(source: Source, header: Header, placement: Placement, bold: Bold) -> tuple[npt.NDArray[np.bool_], str]:
    if source.mask is not None:
        brain, rule = read_mask(source.mask, header, placement), "mask"
    else:
        brain, rule = bold.nonzero, "nonzero"
    if not brain.any():
        raise RefusedError("constant: all kept voxels are 0" if rule == "nonzero" else "the brain mask is empty here")
    return brain, rule


def _entry(
    candidate: Candidate,
    placement: Placement,
    stored: Stored,
    brain: npt.NDArray[np.bool_],
    rule: str,
    steady_from: int,
    cleaned: bool,
    cleaning: dict[str, Any],
) -> Run:
    source, header = candidate.source, candidate.header
    statistics = run_statistics(stored.bold[steady_from:], brain, stored.slope, stored.intercept)
    return Run(
        key=candidate.key,
        subject=candidate.subject,
        cohort=candidate.cohort,
        session=source.session,
        task=source.task,
        run=source.run,
        row=candidate.row,
        dtype=stored.bold.dtype.name,
        slope=stored.slope,
        intercept=stored.intercept,
        frames=header.frames,
        tr=candidate.tr,
        space=candidate.space,
        statistics=statistics.as_tuple(),
        brain_voxels=int(brain.sum()),
        brain_rule=rule,
        coverage=float(placement.inside.mean()),
        values=stored.values,
        max_error=stored.max_error,
        resampled=not placement.exact,
        cleaned=cleaned,
        confounds=(),
        source_orientation=header.orientation,
        source_shape=header.shape,
        source_affine=_rows_of(header.affine),
        source_sha256=sha256(source.path),
        bytes=0,
        steady_from=steady_from,
        cleaning=cleaning,
    )


def _rows_of(matrix: FloatArray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in row) for row in matrix)


def stage(folder: Path, taken: Taken, written: int) -> None:
    """Leave a run's rows and index entry in the staging folder; the entry comes last and marks the run as done."""
    row = taken.run.row
    buffer = io.BytesIO()
    save: Any = np.savez
    save(buffer, **taken.rows)
    write_file(folder / f"{row}.npz", buffer.getvalue(), layout.PRIVATE)
    entry = {**taken.run.to_json(), "bytes": written}
    write_file(folder / f"{row}.json", json.dumps({"taken": entry}).encode(), layout.PRIVATE)


def stage_refusal(folder: Path, row: int, reason: str) -> None:
    """Mark a run as done and refused."""
    write_file(folder / f"{row}.json", json.dumps({"refused": reason}).encode(), layout.PRIVATE)
