"""Checking a store byte by byte, and telling what is in it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swiftv2.data import layout
from swiftv2.data.statistics import run_statistics, voxel_statistics
from swiftv2.data.store import Run, Store
from swiftv2.errors import SwiftError

_TOLERANCE = 1e-6
"""Relative difference of statistics computed again: other processors add in another order."""


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of a check: runs and bytes read, and (pseudonymous key of the run, or `store`; what is wrong) pairs."""

    runs: int
    bytes: int
    bad: tuple[tuple[str, str], ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad


def verify(store: str | Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read every chunk of a store: checksums, index, numbers that are not finite, statistics that do not fit the data.

    Memory: one run.

    Args:
        store: folder of the store.
        progress: called with runs done and runs in all.

    Raises:
        SwiftError: no store, an unfinished one, or an index that does not match its checksum.
    """
    opened = Store.open(store)
    bad = [("store", problem) for problem in _check_store(opened)]
    size = 0
    for index, run in enumerate(opened.runs):
        if not run.withdrawn:
            bad += [(run.key, problem) for problem in _check_run(opened, index)]
            size += sum(path.stat().st_size for path in layout.bold_shards(opened.path, run.dtype, run.row))
        if progress is not None:
            progress(index + 1, len(opened.runs))
    return VerifyReport(len(opened.runs), size, tuple(bad))


def _check_store(store: Store) -> list[str]:
    problems = []
    rows = [run.row for run in store.runs]
    if rows != sorted(set(rows)):
        problems.append("rows of the index are not ascending or not unique")
    if len({run.key for run in store.runs}) != len(store.runs):
        problems.append("run keys are not unique")
    voxels = store.voxels
    if not len(voxels) or (np.diff(voxels) <= 0).any() or voxels[0] < 0 or voxels[-1] >= store.grid.size:
        problems.append("voxels are not ascending or not in the grid")
    private = store.path / layout.SUBJECTS_FILE
    if private.exists() and private.stat().st_mode & 0o077:
        problems.append(f"{layout.SUBJECTS_FILE} holds ids and is open to others: chmod 600")
    return problems


def _check_run(store: Store, index: int) -> list[str]:
    run = store.runs[index]
    try:
        bold = store.read_bold(index, 0, run.frames)
        brain, mean, std = store.brain(index), store.voxel_mean(index), store.voxel_std(index)
        displacement = store.frame_values("framewise_displacement", index)
        for name in ("censored", "non_steady_state"):
            store.frame_values(name, index)
    except SwiftError as error:
        return [str(error)]
    problems = []
    if sum(path.stat().st_size for path in layout.bold_shards(store.path, run.dtype, run.row)) != run.bytes:
        problems.append("its shards have another size than the index states")
    if bold.dtype.kind == "f" and not np.isfinite(bold).all():
        problems.append("its frames hold NaN or infinity")
    if int(brain.sum()) != run.brain_voxels or not brain.any():
        problems.append("its brain mask has another size than the index states")
        return problems
    statistics = run_statistics(bold[run.steady_from :], brain, run.slope, run.intercept).as_tuple()
    scale = abs(run.slope) + max(abs(value) for value in run.statistics)
    if not np.allclose(statistics, run.statistics, rtol=_TOLERANCE, atol=_TOLERANCE * scale):
        problems.append("its statistics do not fit its frames")
    again = voxel_statistics(bold[run.steady_from :], brain, run.slope, run.intercept)
    if not all(np.allclose(a, b, rtol=1e-5, atol=_TOLERANCE * scale) for a, b in zip(again, (mean, std), strict=True)):
        problems.append("its voxel statistics do not fit its frames")
    if displacement is not None and (displacement < 0).any():
        problems.append("its framewise displacement is negative")
    return problems


def info(store: str | Path) -> dict[str, Any]:
    """What a store holds, as plain values: cohorts, runs, subjects, frames, hours, TRs, spaces, types, bytes, files, grid."""
    opened = Store.open(store)
    present = [run for run in opened.runs if not run.withdrawn]
    files = [path for path in opened.path.rglob("*") if path.is_file()]
    return {
        "path": str(opened.path),
        "format": opened.attributes["format"],
        "version": opened.version,
        "generated": opened.generated,
        "grid": opened.grid.to_json(),
        "voxels": len(opened.voxels),
        "cohorts": {name: _summary([run for run in present if run.cohort == name]) for name in opened.cohorts},
        **_summary(present),
        "withdrawn": len(opened.runs) - len(present),
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
    }


def _summary(runs: list[Run]) -> dict[str, Any]:
    def counts(values: list[str]) -> dict[str, int]:
        return dict(sorted(Counter(values).items()))

    return {
        "runs": len(runs),
        "subjects": len({run.subject for run in runs}),
        "frames": sum(run.frames for run in runs),
        "hours": round(sum(run.frames * run.tr for run in runs) / 3600, 4),
        "tr": counts([f"{run.tr:g}" for run in runs]),
        "spaces": counts([run.space for run in runs]),
        "dtypes": counts([run.dtype for run in runs]),
        "values": counts([run.values for run in runs]),
        "brain_rules": counts([run.brain_rule for run in runs]),
        "orientations": counts([run.source_orientation for run in runs]),
        "resampled": sum(run.resampled for run in runs),
        "cleaned": sum(run.cleaned for run in runs),
        "confounds": sum(run.confounds for run in runs),
    }
