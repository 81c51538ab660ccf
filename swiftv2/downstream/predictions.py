"""What a model or baseline predicts: one row a clip, joined over ranks, averaged over subjects, kept as CSV."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from swiftv2.errors import SwiftError
from swiftv2.files import write_file

Floats = NDArray[np.float64]
Parts = Mapping[str, Mapping[str, "Predictions"]]
"""Predictions by part (train, val, test) and target."""

_KEYS = ["part", "target", "unit", "run", "clip", "truth"]


@dataclass(frozen=True)
class Predictions:
    """Predictions of one target, one row a clip, or one a unit.

    Attributes:
        unit: (n,) key of what is judged: a subject, or a run or clip where these are.
        run: (n,) key of the clip's run; empty where rows are means over runs.
        clip: (n,) first frame of the clip in its run; -1 where rows are means over clips.
        truth: (n,) number of the class, or the label in its own units.
        score: (n, K) probabilities of the K classes, or (n, 1) predictions in the label's units.
    """

    unit: NDArray[np.str_]
    run: NDArray[np.str_]
    clip: NDArray[np.int64]
    truth: Floats
    score: Floats

    def __post_init__(self) -> None:
        n = len(self.unit)
        if any(column.shape != (n,) for column in (self.unit, self.run, self.clip, self.truth)) or self.score.shape[:1] != (n,):
            raise ValueError("columns of predictions are not equally long")
        if self.score.ndim != 2:
            raise ValueError("scores are no table")

    def __len__(self) -> int:
        return len(self.unit)

    def rows(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> "Predictions":
        """Some of the rows, in this order."""
        return Predictions(self.unit[index], self.run[index], self.clip[index], self.truth[index], self.score[index])


def gather(parts: Sequence[Predictions]) -> Predictions:
    """Join what the ranks predicted, in an order that does not depend on who predicted what.

    Rows of one (unit, run, clip) come once: of copies that differ in rounding, the smallest.

    Args:
        parts: one a rank, of the same number of scores; some may be empty.
    """
    joined = Predictions(
        np.concatenate([part.unit for part in parts]),
        np.concatenate([part.run for part in parts]),
        np.concatenate([part.clip for part in parts]),
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.score for part in parts]),
    )
    joined = joined.rows(np.lexsort((*joined.score.T[::-1], joined.clip, joined.run, joined.unit)))
    first = np.ones(len(joined), dtype=np.bool_)
    first[1:] = (
        (joined.unit[1:] != joined.unit[:-1]) | (joined.run[1:] != joined.run[:-1]) | (joined.clip[1:] != joined.clip[:-1])
    )
    return joined.rows(first)


def by_subject(predictions: Predictions) -> Predictions:
    """One row a unit, by its key: the mean over its runs of the means over their clips. Rows without a truth are left out.

    Raises:
        SwiftError: a score is not finite, or a unit has two truths.
    """
    p = gather([predictions])
    p = p.rows(~np.isnan(p.truth))
    if not np.isfinite(p.score).all():
        raise SwiftError(f"{np.sum(~np.isfinite(p.score).all(1))} of {len(p)} clips have predictions that are not finite")
    # Rows are in order of unit, then run: each run, then each unit, is a stretch of them.
    run_starts = _starts([p.unit, p.run])
    runs = p.rows(run_starts)
    means = np.add.reduceat(p.score, run_starts) / np.diff(run_starts, append=len(p))[:, None] if len(p) else p.score
    starts = _starts([runs.unit])
    units = runs.rows(starts)
    score = np.add.reduceat(means, starts) / np.diff(starts, append=len(runs))[:, None] if len(p) else means
    several = np.repeat(units.truth, np.diff(starts, append=len(runs))) != runs.truth
    if several.any() or (np.repeat(runs.truth, np.diff(run_starts, append=len(p))) != p.truth).any():
        raise SwiftError("the clips of a subject have different truths: labels that change with the run are for split.unit=run")
    return Predictions(units.unit, np.full(len(units), "", dtype=np.str_), np.full(len(units), -1), units.truth, score)


def whole_runs(predictions: Predictions) -> dict[str, str]:
    """Run of each unit, where every unit lies in one run: clips of a run are alike, and are drawn together for intervals.

    Args:
        predictions: one row a clip.

    Returns:
        Run by unit; nothing where units have several runs or unknown ones, and so are drawn on their own.
    """
    pairs = set(zip(predictions.unit.tolist(), predictions.run.tolist(), strict=True))
    runs: dict[str, str] = dict(pairs)
    return runs if len(pairs) == len(runs) and all(runs.values()) else {}


def write(path: Path, parts: Parts) -> None:
    """Write `part,target,unit,run,clip,truth,score_0,...`: numbers as they are read again to the last bit.

    Labels are personal data: the file is its owner's alone.
    """
    tables = [
        pd.DataFrame(
            {"part": part, "target": target, "unit": p.unit, "run": p.run, "clip": p.clip, "truth": p.truth}
            | {f"score_{k}": p.score[:, k] for k in range(p.score.shape[1])}
        )
        for part, targets in parts.items()
        for target, p in targets.items()
    ]
    stream = io.StringIO()
    pd.concat(tables, ignore_index=True).to_csv(stream, index=False, lineterminator="\n")
    write_file(path, stream.getvalue(), mode=0o600)


def read(path: Path) -> dict[str, dict[str, Predictions]]:
    """Predictions by part and target.

    Raises:
        SwiftError: the file cannot be read, or is not one of `write`.
    """
    damaged = f"{path}: not a table of predictions: the file is damaged"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SwiftError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SwiftError(damaged) from error
    columns = text.partition("\n")[0].split(",")
    if columns[: len(_KEYS)] != _KEYS:
        raise SwiftError(damaged)
    try:
        table = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        clip = table["clip"].to_numpy(np.int64)
        # Python's reading of a number is exact to the last bit; pandas' own need not be.
        numbers = table[["truth", *columns[len(_KEYS) :]]].replace("", "nan").to_numpy(np.str_).astype(np.float64)
    except ValueError as error:
        raise SwiftError(damaged) from error
    found: dict[str, dict[str, Predictions]] = {}
    for (part, target), rows in table.groupby(["part", "target"], sort=False).indices.items():
        score = numbers[rows, 1:]
        found.setdefault(part, {})[target] = Predictions(
            table["unit"].to_numpy(np.str_)[rows],
            table["run"].to_numpy(np.str_)[rows],
            clip[rows],
            numbers[rows, 0],
            score[:, ~np.isnan(score).all(0)],
        )
    return found


def _starts(keys: Sequence[NDArray[np.str_]]) -> NDArray[np.int64]:
    """First rows of stretches of equal keys."""
    if not len(keys[0]):
        return np.empty(0, dtype=np.int64)
    new = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return np.concatenate([[0], np.flatnonzero(new) + 1]).astype(np.int64)
