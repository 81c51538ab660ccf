"""The data sheet of a run: what it was trained on, told in counts, so that the run directory says it without the store."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swiftv2.config.base import Config
from swiftv2.data.samples.clips import ClipIndex
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.files import write_file

FILE = "datasheet.json"
LOOKED_AT = 200
"""Runs of a cohort, spread evenly, whose displacement and temporal SNR are read: they are one small read each."""


@dataclass(frozen=True)
class Part:
    """A part of the subjects.

    Attributes:
        name: train, val or test.
        subjects: pseudonymous keys.
        clips: cut from their runs; None where the run uses none.
    """

    name: str
    subjects: Sequence[str]
    clips: ClipIndex | None


def data_sheet(
    store: Store, parts: Sequence[Part], families: Mapping[str, str], clip: Config, unit: str = "subject"
) -> dict[str, Any]:
    """What a run takes from a store, as plain values without any subject's key, name or file.

    Args:
        store: opened.
        parts: of the subjects.
        families: of subjects, by pseudonymous keys, as far as they are known.
        clip: how clips are cut.
        unit: what the split divides: subject, or run.

    Returns:
        `store`, `version`, `generated`, `grid`, `voxels`; `cohorts`: for each that a part takes runs from, counts, hours, TR,
        space, orientation, framewise displacement (mm) and temporal SNR, and how many
        of the runs looked at are unreadable; `refused`: files that the store refused, by reason,
        None where its report cannot be read; `withdrawn` runs; `too_short` runs; `leakage`: what parts have in common.
    """
    used = sorted({int(run) for part in parts if part.clips is not None for run in part.clips.run})
    clips = {part.name: Counter(part.clips.run.tolist()) for part in parts if part.clips is not None}
    names = sorted({store.runs[index].cohort for index in used})
    return {
        "store": store.attributes["store_id"],
        "version": store.version,
        "generated": store.generated,
        "grid": store.grid.to_json(),
        "voxels": len(store.voxels),
        "clip": clip.model_dump(mode="json"),
        "unit": unit,
        "cohorts": {name: _cohort(store, [i for i in used if store.runs[i].cohort == name], clips) for name in names},
        "runs_in_store": sum(run.present for run in store.runs),
        "refused": _refused(store.path),
        "withdrawn": sum(not run.present for run in store.runs),
        "too_short": sum(len(part.clips.too_short) for part in parts if part.clips is not None),
        "leakage": _leakage(store, clips, parts, families),
    }


def write_data_sheet(run_dir: Path, sheet: Mapping[str, Any]) -> None:
    """Write `datasheet.json` into a run directory."""
    write_file(run_dir / FILE, json.dumps(sheet, indent=1, allow_nan=False) + "\n")


def _cohort(store: Store, indices: Sequence[int], clips: Mapping[str, Counter[int]]) -> dict[str, Any]:
    runs = [store.runs[index] for index in indices]
    # By the runs of a part: a split of runs has one subject in several parts.
    subjects = {part: len({store.runs[index].subject for index in indices if counts[index]}) for part, counts in clips.items()}
    looked_at = [indices[i] for i in np.unique(np.linspace(0, len(indices) - 1, LOOKED_AT).astype(int))]
    return {
        "runs": len(runs),
        "subjects": {part: number for part, number in sorted(subjects.items()) if number},
        "clips": {part: sum(counts[index] for index in indices) for part, counts in clips.items()},
        "frames": sum(run.frames for run in runs),
        "hours": round(sum(run.frames * run.tr for run in runs) / 3600, 3),
        "tr": _counts(f"{run.tr:g}" for run in runs),
        "spaces": _counts(run.space for run in runs),
        "orientations": _counts(run.source_orientation for run in runs),
        "resampled": sum(run.resampled for run in runs),
        "cleaned": sum(run.cleaned for run in runs),
        "looked_at": len(looked_at),
        **_read(store, looked_at),
    }


def _read(store: Store, indices: Sequence[int]) -> dict[str, Any]:
    """What is read of runs themselves; what is damaged there, training may not need, and is counted."""
    moved, ratios, unreadable = [], [], 0
    for index in indices:
        try:
            moved.append(_displacement(store, index))
            ratios += [] if store.runs[index].cleaned else [_temporal_snr(store, index)]
        except SwiftError:
            unreadable += 1
    return {"unreadable": unreadable, "framewise_displacement_mm": _quantiles(moved), "temporal_snr": _quantiles(ratios)}


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _quantiles(values: Iterable[float]) -> dict[str, float] | None:
    """Median and 90th percentile over runs of what is known of them."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return None
    middle, high = np.quantile(known, (0.5, 0.9))
    return {"median": round(float(middle), 4), "percentile_90": round(float(high), 4), "runs": len(known)}


def _displacement(store: Store, index: int) -> float:
    """Mean framewise displacement of a run, mm; NaN where it is not known."""
    if not store.runs[index].present or "framewise_displacement" not in store.runs[index].confounds:
        return float("nan")
    values = store.frame_values("framewise_displacement", index)
    known = np.zeros(0) if values is None else values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _temporal_snr(store: Store, index: int) -> float:
    """Median over brain voxels of mean over standard deviation in time; NaN where nothing varies."""
    if not store.runs[index].present:
        return float("nan")
    brain = store.brain(index)
    mean, deviation = store.voxel_mean(index)[brain], store.voxel_std(index)[brain]
    varying = deviation > 0
    return float(np.median(mean[varying] / deviation[varying])) if varying.any() else float("nan")


def _refused(store: Path) -> dict[str, int] | None:
    """Files that the builds of a store refused, by the kind of their reason."""
    try:
        lines = (store / layout.REPORT_FILE).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return _counts(_kind(row["reason"]) for row in rows if row["status"] == "refused")
    except (OSError, ValueError, KeyError):
        return None


def _kind(reason: str) -> str:
    """A reason without the numbers and names of its file."""
    words = [word for word in reason.split() if "/" not in word and "sub-" not in word]
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "\u2026", " ".join(words))


def _leakage(
    store: Store, clips: Mapping[str, Iterable[int]], parts: Sequence[Part], families: Mapping[str, str]
) -> dict[str, int | None]:
    """What two parts share: subjects, families, and files of equal content; None where that cannot be known."""
    held = [set(part.subjects) for part in parts]
    shared_families = None
    if families:
        own = [{families[key] for key in keys if key in families} for keys in held]
        shared_families = _in_two(own)
    content = [{store.runs[index].source_sha256 for index in indices} - {""} for indices in clips.values()]
    return {
        "subjects": _in_two(held),
        "families": shared_families,
        "files": _in_two(content),
        "families_known": sum(key in families for keys in held for key in keys),
    }


def _in_two(groups: Sequence[set[str]]) -> int:
    """How many are in more than one group."""
    counted = Counter(one for group in groups for one in group)
    return sum(number > 1 for number in counted.values())
