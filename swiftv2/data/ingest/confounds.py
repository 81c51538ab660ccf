"""Reading fMRIPrep's confound tables: how far the head moved, and which volumes are marked."""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swiftv2.data.ingest.nifti import RefusedError
from swiftv2.data.store.layout import UNKNOWN

_MISSING = ("", "n/a", "nan")
_THRESHOLDS = {"framewise_displacement": 0.5, "std_dvars": 1.5}
"""fMRIPrep's own thresholds: a volume above one of them has a motion_outlier column."""


@dataclass(frozen=True)
class Confounds:
    """What a confound table says of each volume.

    Attributes:
        framewise_displacement: (frames,) float32 in mm, NaN where unknown.
        censored, non_steady_state: (frames,) uint8, 0, 1, or 255 where the table does not tell.
    """

    framewise_displacement: npt.NDArray[np.float32]
    censored: npt.NDArray[np.uint8]
    non_steady_state: npt.NDArray[np.uint8]


def read_confounds(path: Path, frames: int) -> Confounds:
    """Read a table `desc-confounds_timeseries.tsv` (`regressors` before fMRIPrep 20.2).

    A table without framewise_displacement tells nothing of motion. fMRIPrep writes a column for each volume that it marks,
    so a table with framewise_displacement and without such columns marks none; but where that or std_dvars exceeds fMRIPrep's
    thresholds, the table comes from a version that marked nothing, and `censored` is unknown.

    Args:
        path: the table.
        frames: volumes of the run.

    Raises:
        RefusedError: unreadable, no table with a header, not one line a frame, or values that make no sense.
    """
    columns = _read_columns(path, frames)
    displacement = _numbers(columns, "framewise_displacement")
    if (displacement < 0).any():
        raise RefusedError(f"framewise_displacement is negative in line {_line(displacement < 0)} of the confound table")
    known = "framewise_displacement" in columns
    loud = np.zeros(frames, dtype=bool)
    for name, threshold in _THRESHOLDS.items():
        loud |= _numbers(columns, name) > threshold
    return Confounds(
        framewise_displacement=displacement.astype(np.float32),
        censored=_marks(columns, "motion_outlier", frames, absent=0 if known and not loud.any() else UNKNOWN),
        non_steady_state=_marks(columns, "non_steady_state_outlier", frames, absent=0 if known else UNKNOWN),
    )


def leading_non_steady(non_steady: npt.NDArray[np.uint8]) -> int:
    """How many volumes at the start of a run are marked as non-steady.

    Raises:
        RefusedError: all but one of them are.
    """
    steady = np.flatnonzero(non_steady != 1)
    if len(steady) < 2:
        raise RefusedError("the confound table calls all its frames non-steady")
    return int(steady[0])


def _read_columns(path: Path, frames: int) -> dict[str, list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            header, *lines = [line for line in csv.reader(stream, delimiter="\t") if line] or [[]]
    except OSError as error:
        raise RefusedError(f"the confound table cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RefusedError("the confound table is no text in UTF-8 with cells between tabs") from error
    names = [name.strip() for name in header]
    if len(names) == 1 and "," in names[0]:
        raise RefusedError("the confound table has commas between its cells: tabs are expected")
    if not names or "\0" in "".join(names) or all(_is_number(cell) for name in names for cell in name.split()):
        raise RefusedError("the confound table has no header line with names of columns")
    if len(set(names)) < len(names):
        raise RefusedError("the confound table has two columns of one name")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(names):
            raise RefusedError(f"line {number} of the confound table has {len(line)} cells for {len(names)} columns")
    if len(lines) != frames:
        raise RefusedError(f"the confound table has {len(lines)} lines for {frames} frames")
    return {name: [line[place].strip() for line in lines] for place, name in enumerate(names)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _numbers(columns: dict[str, list[str]], name: str) -> npt.NDArray[np.float64]:
    """A column, (lines,) float64, NaN where it has no entry or where there is no such column."""
    cells = columns.get(name)
    if cells is None:
        length = len(next(iter(columns.values())))
        return np.full(length, np.nan)
    wrong = [not _is_number(cell) and cell.lower() not in _MISSING for cell in cells]
    if any(wrong):
        raise RefusedError(f"{name} is no number in line {_line(wrong)} of the confound table")
    values = np.asarray([math.nan if cell.lower() in _MISSING else float(cell) for cell in cells])
    if np.isinf(values).any():
        raise RefusedError(f"{name} is infinite in line {_line(np.isinf(values))} of the confound table")
    return values


def _line(wrong: Sequence[bool] | npt.NDArray[np.bool_]) -> int:
    """Line of the file, the header being the first, where something is wrong for the first time."""
    return int(np.flatnonzero(np.asarray(wrong))[0]) + 2


def _marks(columns: dict[str, list[str]], prefix: str, frames: int, *, absent: int) -> npt.NDArray[np.uint8]:
    names = [name for name in columns if re.fullmatch(rf"{prefix}_?\d+", name)]
    if not names:
        return np.full(frames, absent, dtype=np.uint8)
    marked = np.zeros(frames, dtype=np.uint8)
    for name in names:
        values = _numbers(columns, name)
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            raise RefusedError(f"{name} is neither 0 nor 1 in line {_line(wrong)} of the confound table")
        marked |= values.astype(np.uint8)
    return marked
