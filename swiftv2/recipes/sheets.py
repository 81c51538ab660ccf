"""Gathering what quality sheets show: maps and measures of cohorts and runs, from the small arrays of a store."""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftv2.data.grid import Grid
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sync, write_file
from swiftv2.report.sheets import PLANES, SPIKE_MM, CohortSheet, RunSheet, Slices, draw

Floats = NDArray[np.float64]

MEASURES = {
    "tsnr_median": "median temporal SNR",
    "displacement_mean": "mean framewise displacement (mm)",
    "spike_share": f"share of frames above {SPIKE_MM:g} mm",
    "global_mean": "mean of the brain (source units)",
    "global_std": "deviation in the brain (source units)",
    "coverage": "coverage of the kept voxels",
    "brain_voxels": "brain voxels",
}
"""Columns of the table, and what the sheets call them."""
OUTLIER_Z = 4.0
FEWEST_RUNS = 5
"""Runs below which no run is told to lie far from the others."""
FEWEST_SUBJECTS = 5
"""Real subjects below which a group mean would show single brains: at all, and at a voxel."""
_BLOCK_FRAMES = 32
_HISTOGRAM_FRAMES = 20
_BINS = 80


@dataclass(frozen=True)
class Sheets:
    """What was drawn.

    Attributes:
        pdf: the sheets.
        csv: one line a run.
        pages: of the PDF.
        individuals: whether single runs were drawn.
        outliers: (pseudonymous key, measure, robust z).
    """

    pdf: Path
    csv: Path
    pages: int
    individuals: bool
    outliers: tuple[tuple[str, str, float], ...]


def draw_sheets(
    store: str | Path, folder: Path, *, individuals: bool = False, progress: Callable[[int, int], None] | None = None
) -> Sheets:
    """Write `quality.pdf` and `quality.csv`.

    Single runs are drawn for generated stores, and for real ones where `individuals` says so: then the files are readable
    by their owner only. Memory: one run's small rows, sums over the voxels for each cohort, and blocks of frames.

    Args:
        store: folder of the store.
        folder: where the files go; made where it is not there.
        individuals: whether runs of real subjects may be drawn.
        progress: called with runs done and runs in all.

    Raises:
        UsageError: the folder lies in the store.
        SwiftError: no store, damaged bytes, or no run left in it.
    """
    opened = Store.open(store)
    if folder.resolve().is_relative_to(opened.path.resolve()):
        raise UsageError(f"{folder} lies in the store: give a folder elsewhere")
    present = [index for index, run in enumerate(opened.runs) if run.present]
    if not present:
        raise SwiftError(f"store {opened.path}: all its runs are withdrawn, there is nothing to draw")
    drawn = opened.generated or individuals
    mode = layout.PRIVATE if drawn and not opened.generated else 0o644
    total, gathered = len(present) * (2 if drawn else 1), 0

    def tell() -> None:
        nonlocal gathered
        gathered += 1
        if progress is not None:
            progress(gathered, total)

    cohorts: dict[str, _Cohort] = {}
    for index in sorted(present, key=lambda i: opened.runs[i].subject):
        run = opened.runs[index]
        cohorts.setdefault(run.cohort, _Cohort(run.cohort, len(opened.voxels))).add(opened, index)
        tell()
    outliers = [found for name in sorted(cohorts) for found in cohorts[name].outliers()]
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "quality.csv"
    write_file(table, _table(opened, cohorts, outliers), mode)

    def sheets() -> Iterator[CohortSheet | RunSheet]:
        for name in sorted(cohorts):
            yield cohorts[name].sheet(opened, drawn=drawn)
        if drawn:
            for index in sorted(present, key=lambda i: (opened.runs[i].cohort, opened.runs[i].key)):
                yield _run_sheet(opened, index)
                tell()

    pdf = folder / "quality.pdf"
    return Sheets(pdf, table, _write_pdf(pdf, sheets(), mode), drawn, tuple(outliers))


def _write_pdf(path: Path, sheets: Iterator[CohortSheet | RunSheet], mode: int) -> int:
    """Draw beside the file, to the disk, then in its place: a PDF may be too large to be held."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            pages = draw(stream, sheets)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)
    return pages


@dataclass
class _Cohort:
    """Sums over the runs of a cohort, which come subject by subject.

    Attributes:
        subjects: keys of those whose runs are in the maps.
        people: how many of them are, at each voxel (V,).
    """

    name: str
    voxels: int
    keys: list[str] = field(default_factory=list)
    subjects: set[str] = field(default_factory=set)
    values: list[dict[str, float]] = field(default_factory=list)
    cleaned: int = 0

    def __post_init__(self) -> None:
        self.mean, self.tsnr = np.zeros(self.voxels), np.zeros(self.voxels)
        self.count, self.people = np.zeros(self.voxels), np.zeros(self.voxels, dtype=np.int64)
        self._of_subject = np.zeros(self.voxels, dtype=np.bool_)

    def add(self, store: Store, index: int) -> None:
        run, brain = store.runs[index], store.brain(index)
        mean, tsnr = _maps(store, index)
        self.keys.append(run.key)
        self.values.append(_measures(store, index, tsnr))
        if tsnr is None:
            self.cleaned += 1
            return
        # Scanners' units differ by orders of magnitude: without scaling one run would be the whole mean.
        level = abs(float(mean[brain].mean())) or 1.0
        known = brain & np.isfinite(tsnr)
        self.mean[known] += mean[known] / level
        self.tsnr[known] += tsnr[known]
        self.count += known
        if run.subject not in self.subjects:
            self.subjects.add(run.subject)
            self._of_subject[:] = False
        self.people += known & ~self._of_subject
        self._of_subject |= known

    def column(self, measure: str) -> Floats:
        return np.array([values[measure] for values in self.values], dtype=np.float64)

    def outliers(self) -> list[tuple[str, str, float]]:
        """Key, measure and robust z of the runs that lie far from the others of the cohort."""
        found = []
        for measure in MEASURES:
            z = robust_z(self.column(measure))
            found += [
                (self.keys[i], measure, round(float(z[i]), 2)) for i in np.flatnonzero(np.abs(np.nan_to_num(z)) > OUTLIER_Z)
            ]
        return sorted(found, key=lambda one: (-abs(one[2]), one[0]))

    def sheet(self, store: Store, *, drawn: bool) -> CohortSheet:
        remarks = []
        shown = drawn or len(self.subjects) >= FEWEST_SUBJECTS
        if not shown:
            remarks.append(f"no group maps: a mean over fewer than {FEWEST_SUBJECTS} real subjects shows single brains")
        elif not drawn:
            remarks.append(f"voxels of fewer than {FEWEST_SUBJECTS} subjects are left out of the maps")
        if self.cleaned:
            remarks.append(f"{self.cleaned} runs whose voxel means were removed are not in the maps")
        if not drawn:
            remarks.append("single runs are not drawn: the data are not generated, and nobody asked for --individuals")
        mean = tsnr = None
        somewhere = self.people >= (1 if drawn else FEWEST_SUBJECTS)
        if shown and somewhere.any():
            with np.errstate(invalid="ignore"):
                mean, tsnr = (cut(store.grid, store.voxels, sums / self.count, somewhere) for sums in (self.mean, self.tsnr))
        runs = [run for run in store.runs if run.cohort == self.name and run.present]
        return CohortSheet(
            title=self.name,
            facts=_cohort_facts(store, runs),
            mean=mean,
            tsnr=tsnr,
            remark="; ".join(remarks),
            measures={text: self.column(measure) for measure, text in MEASURES.items()},
            outliers=tuple(f"{key} {measure} z {z:+.1f}" for key, measure, z in self.outliers()),
        )


def robust_z(values: Floats) -> Floats:
    """Distance from the median in robust deviations (1.4826 x median absolute deviation), (N,).

    NaN where a value is not known, where fewer than `FEWEST_RUNS` are, or where more than half of them are equal.
    """
    known = values[np.isfinite(values)]
    if len(known) < FEWEST_RUNS:
        return np.full(len(values), np.nan)
    middle = np.median(known)
    deviation = 1.4826 * np.median(np.abs(known - middle))
    return (values - middle) / deviation if deviation > 0 else np.full(len(values), np.nan)


def cut(grid: Grid, voxels: NDArray[np.int64], values: NDArray[Any], shown: NDArray[np.bool_]) -> Slices:
    """Three planes through the middle of the shown voxels.

    Args:
        grid: the store's window; its affine alone decides what is left and right.
        voxels: (V,) flat voxel numbers.
        values: (V,).
        shown: (V,) bool, at least one; the pictures end at these.
    """
    volume = np.full(grid.size, np.nan, dtype=np.float32)
    volume[voxels[shown]] = values[shown]
    places = grid.indices(voxels[shown])
    low, high = places.min(0), places.max(0) + 1
    middle = np.median(places, axis=0).astype(int)
    # Beside the midline, where a sagittal plane would show mostly the gap between the hemispheres.
    middle[0] = min(int(middle[0] + round(12.0 / grid.voxel_mm[0])), int(high[0]) - 1)
    box: Any = volume.reshape(grid.shape)
    # The grid's axes follow R, A, S in their order; only their directions may be turned.
    backwards = [bool(grid.matrix[axis, axis] < 0) for axis in range(3)]
    pictures, where = {}, {}
    for axis, plane in enumerate(PLANES):
        others = [other for other in range(3) if other != axis]
        picture = box.take(int(middle[axis]), axis=axis)[tuple(slice(low[other], high[other]) for other in others)]
        turned = tuple(place for place, other in enumerate(others) if backwards[other])
        pictures[plane] = np.flip(picture, turned)
        where[plane] = float((grid.matrix @ [*middle, 1])[axis])
    return Slices(pictures, where)


def _maps(store: Store, index: int) -> tuple[Floats, Floats | None]:
    """Voxel means, and means over deviations (NaN where a voxel never changes), (V,); no SNR where means were removed."""
    mean, std = (values.astype(np.float64) for values in (store.voxel_mean(index), store.voxel_std(index)))
    if store.runs[index].cleaned:
        return mean, None
    tsnr = np.full(len(mean), np.nan)
    np.divide(mean, std, out=tsnr, where=std > 0)
    return mean, tsnr


def _measures(store: Store, index: int, tsnr: Floats | None) -> dict[str, float]:
    run = store.runs[index]
    displacement = store.frame_values("framewise_displacement", index)
    known = np.zeros(0) if displacement is None else displacement[np.isfinite(displacement)].astype(np.float64)
    snr = np.zeros(0) if tsnr is None else tsnr[store.brain(index) & np.isfinite(tsnr)]
    return {
        "tsnr_median": float(np.median(snr)) if len(snr) else np.nan,
        "displacement_mean": float(known.mean()) if len(known) else np.nan,
        "spike_share": float((known > SPIKE_MM).mean()) if len(known) else np.nan,
        "global_mean": run.statistics[0],
        "global_std": run.statistics[1],
        "coverage": run.coverage,
        "brain_voxels": float(run.brain_voxels),
    }


def _table(store: Store, cohorts: Mapping[str, _Cohort], outliers: Sequence[tuple[str, str, float]]) -> str:
    runs = {run.key: run for run in store.runs}
    marked: dict[str, list[str]] = {}
    for key, measure, z in outliers:
        marked.setdefault(key, []).append(f"{measure} {z:+.1f}")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    facts = (
        "cohort",
        "session",
        "task",
        "run",
        "frames",
        "tr",
        "space",
        "source_orientation",
        "values",
        "resampled",
        "cleaned",
    )
    writer.writerow(["key", "subject", *facts, *MEASURES, "outlier"])
    for name in sorted(cohorts):
        for key, values in sorted(zip(cohorts[name].keys, cohorts[name].values, strict=True)):
            run = runs[key]
            numbers = ["" if np.isnan(values[measure]) else f"{values[measure]:.6g}" for measure in MEASURES]
            known = [getattr(run, fact) for fact in facts]
            writer.writerow([key, run.subject, *known, *numbers, "; ".join(marked.get(key, []))])
    return stream.getvalue()


def _cohort_facts(store: Store, runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    def kinds(values: Sequence[str]) -> str:
        return ", ".join(f"{value} ({values.count(value)})" for value in sorted(set(values)))

    grid = store.grid
    return (
        ("runs", str(len(runs))),
        ("subjects", str(len({run.subject for run in runs}))),
        ("hours", f"{sum(run.frames * run.tr for run in runs) / 3600:.2f}"),
        ("TR (s)", kinds([f"{run.tr:g}" for run in runs])),
        ("space", kinds([run.space for run in runs])),
        ("axes of the files", kinds([run.source_orientation for run in runs])),
        ("grid", f"{' x '.join(map(str, grid.shape))} of {grid.voxel_mm[0]:g} mm, stored {grid.orientation}"),
        ("values", kinds([run.values for run in runs])),
        ("brain by", kinds([run.brain_rule for run in runs])),
        ("cleaned, resampled", f"{sum(run.cleaned for run in runs)}, {sum(run.resampled for run in runs)}"),
        ("with confounds", str(sum(bool(run.confounds) for run in runs))),
        ("store", f"version {store.version}{', generated data' if store.generated else ''}"),
    )


def _run_sheet(store: Store, index: int) -> RunSheet:
    run, brain = store.runs[index], store.brain(index)
    mean, tsnr = _maps(store, index)
    signal, histogram, edges = _frames(store, index, brain)
    censored = store.frame_values("censored", index)
    measures = _measures(store, index, tsnr)
    labels = [run.cohort, *(f"{name} {value}" for name in ("session", "task", "run") if (value := getattr(run, name)))]
    facts = (
        ("of", ", ".join(labels)),
        ("subject", run.subject),
        ("frames", f"{run.frames} of {run.tr:g} s"),
        ("steady from", str(run.steady_from)),
        ("space", run.space),
        ("axes of the file", run.source_orientation),
        ("values", run.values if run.values == "exact" else f"{run.values}, error up to {run.max_error:.3g}"),
        ("cleaned", "yes" if run.cleaned else "no"),
        ("resampled", "yes" if run.resampled else "no"),
        ("brain", f"{run.brain_voxels:,} voxels by {run.brain_rule}"),
        ("coverage", f"{run.coverage:.1%}"),
        ("median tSNR", f"{measures['tsnr_median']:.1f}"),
        ("mean displacement", f"{measures['displacement_mean']:.3f} mm"),
    )
    return RunSheet(
        title=run.key,
        facts=tuple((what, "not known" if "nan" in value.split() else value) for what, value in facts),
        mean=cut(store.grid, store.voxels, mean, brain),
        tsnr=None if tsnr is None else cut(store.grid, store.voxels, tsnr, brain),
        displacement=store.frame_values("framewise_displacement", index),
        censored=None if censored is None else censored == 1,
        global_signal=signal,
        histogram=histogram,
        edges=edges,
        seconds=np.arange(run.frames) * run.tr,
    )


def _frames(store: Store, index: int, brain: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Global signal (frames,), and counts and edges of the brain's values in some frames, in source units."""
    run = store.runs[index]
    low, high = run.statistics[2], run.statistics[3]
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    counted = set(np.linspace(0, run.frames - 1, min(_HISTOGRAM_FRAMES, run.frames)).astype(int).tolist())
    signal, histogram = np.zeros(run.frames), np.zeros(_BINS, dtype=np.int64)
    for first in range(0, run.frames, _BLOCK_FRAMES):
        block = store.read_bold(index, first, min(_BLOCK_FRAMES, run.frames - first))
        for place, volume in enumerate(block):
            values = volume[brain].astype(np.float64) * run.slope + run.intercept
            signal[first + place] = values.mean()
            if first + place in counted:
                histogram += np.histogram(values, edges)[0]
    return signal, histogram, edges
