"""Telling what a store holds, from its index and small arrays; no frame is read."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store
from swiftv2.errors import SwiftError


def info(store: str | Path) -> dict[str, Any]:
    """What a store holds, as plain values that JSON takes.

    Returns:
        Path, format, version and history, the change that is `unfinished` (or None), grid, voxels; counts over all runs
        and by cohort (`cohorts`): runs, subjects,
        sessions, frames, hours, TRs, spaces, number types, brain rules, orientations, resampled, cleaned and withdrawn
        runs, runs with confounds, `censored` (share of the frames whose confounds are known; None where none are) and
        `framewise_displacement` (their mean, mm), `unlabelled` (runs without any label; None where subjects.json cannot be
        read), `bytes` of frames; and for the whole store `bytes`, `files`, `files_per_run`.

    Raises:
        SwiftError: no store, an unfinished one, or an index that does not match its checksum.
    """
    opened = Store.open(store)
    described = _Described(opened)
    everything = range(len(opened.runs))
    cohorts = {name: [i for i in everything if opened.runs[i].cohort == name] for name in opened.cohorts}
    files, size = _files(opened.path)
    return {
        "path": str(opened.path),
        "format": opened.attributes["format"],
        "version": opened.version,
        "history": opened.attributes.get("history", []),
        "unfinished": layout.unfinished(opened.path),
        "generated": opened.generated,
        "grid": opened.grid.to_json(),
        "voxels": len(opened.voxels),
        "cohorts": {name: described.summary(indices) for name, indices in cohorts.items()},
        **described.summary(everything),
        "bytes": size,
        "files": files,
        "files_per_run": round(files / max(1, sum(run.present for run in opened.runs)), 3),
    }


def _files(folder: Path) -> tuple[int, int]:
    count = size = 0
    for place, _, names in os.walk(folder):
        count += len(names)
        size += sum((Path(place) / name).stat().st_size for name in names)
    return count, size


class _Described:
    """What is looked up once for all summaries."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._motion = {index: _motion(store, index) for index, run in enumerate(store.runs) if _tells_motion(run)}
        try:
            self._labels: Sequence[dict[str, str | None]] | None = store.labels()
        except SwiftError:
            self._labels = None

    def summary(self, indices: Sequence[int]) -> dict[str, Any]:
        """Counts over some of the runs."""
        here = [i for i in indices if self._store.runs[i].present]
        runs = [self._store.runs[i] for i in here]
        motion = np.array([self._motion[i] for i in here if i in self._motion]).reshape(-1, 4).sum(axis=0)
        labels = self._labels
        bare = None if labels is None else sum(not any(value is not None for value in labels[i].values()) for i in here)
        return {
            "runs": len(runs),
            "subjects": len({run.subject for run in runs}),
            "sessions": len({(run.subject, run.session) for run in runs}),
            "frames": sum(run.frames for run in runs),
            "hours": round(sum(run.frames * run.tr for run in runs) / 3600, 4),
            "tr": _counts([f"{run.tr:g}" for run in runs]),
            "spaces": _counts([run.space for run in runs]),
            "dtypes": _counts([run.dtype for run in runs]),
            "values": _counts([run.values for run in runs]),
            "brain_rules": _counts([run.brain_rule for run in runs]),
            "orientations": _counts([run.source_orientation for run in runs]),
            "resampled": sum(run.resampled for run in runs),
            "cleaned": sum(run.cleaned for run in runs),
            "confounds": sum(bool(run.confounds) for run in runs),
            "censored": round(float(motion[0] / motion[1]), 6) if motion[1] else None,
            "framewise_displacement": round(float(motion[2] / motion[3]), 6) if motion[3] else None,
            "unlabelled": bare,
            "withdrawn": len(indices) - len(here),
            "bytes": sum(run.bytes for run in runs),
        }


def _tells_motion(run: Run) -> bool:
    return bool(run.confounds) and run.present


def _motion(store: Store, index: int) -> tuple[float, float, float, float]:
    """Of one run: frames censored, frames whose flag is known, sum of framewise displacement (mm), frames where it is known."""
    censored = store.frame_values("censored", index)
    displacement = store.frame_values("framewise_displacement", index)
    known = np.zeros(0) if censored is None else censored[censored != layout.UNKNOWN]
    measured = np.zeros(0) if displacement is None else displacement[np.isfinite(displacement)]
    return float(known.sum()), float(len(known)), float(measured.sum(dtype=np.float64)), float(len(measured))


def _counts(values: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
