"""Finding the runs: a BIDS-derivatives tree, or a glob of NIfTI files with a label table."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swiftv2.data.keys import bare_subject
from swiftv2.data.nifti import RefusedError
from swiftv2.errors import UsageError

_SUFFIXES = (".nii.gz", ".nii")
_PREPROCESSED = "_desc-preproc_bold"
_NOT_OF_THE_RUN = ("sub", "ses", "task", "space", "res", "desc", "den", "cohort", "hemi")
_SUBJECT_COLUMNS = ("participant_id", "subject", "subject_id", "sub", "eid", "id")
_FILE_COLUMNS = ("file", "filename", "path")
_MISSING = ("", "n/a", "na", "nan", "none")
NATIVE_SPACES = frozenset({"t1w", "t2w", "anat", "func", "bold", "boldref", "epi", "native", "orig", "scanner", "individual"})


@dataclass(frozen=True)
class LabelRow:
    """One line of a label table; session, task and run are empty where the table has no such column or no entry."""

    subject: str
    session: str
    task: str
    run: str
    file: str
    values: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Source:
    """One BOLD file and what stands beside it.

    Attributes:
        path: the file.
        relative: its path below the source folder: personal data, since it names the subject.
        size: bytes.
        subject: id without `sub-`; empty where nothing tells it.
        session, task, run: entities, empty where there are none; `run` joins all others that tell runs apart.
        space: template space by the name, or None.
        tr: seconds by the label table, or None.
        mask, sidecar, confounds: files beside it, or None.
    """

    path: Path
    relative: str
    size: int
    subject: str
    session: str
    task: str
    run: str
    space: str | None
    tr: float | None
    mask: Path | None
    sidecar: Path | None
    confounds: Path | None


@dataclass(frozen=True)
class Discovery:
    """Runs (by relative path), label rows, and whether the tree says that swiftv2 generated it."""

    sources: tuple[Source, ...]
    labels: tuple[LabelRow, ...]
    generated: bool


def discover(source: str | Path, labels: Path | None = None) -> Discovery:
    """List the BOLD files of a BIDS-derivatives folder or of a glob.

    Args:
        source: a folder (`*_desc-preproc_bold.nii[.gz]` below it are taken), or a glob of NIfTI files.
        labels: TSV or CSV table with a subject column (participant_id, subject, ...), and, where files do not carry
            `sub-`, a file column; session, task, run and tr columns join where they are there. A folder's own
            participants.tsv counts when this is None.

    Raises:
        UsageError: nothing is found, or the table cannot be read.
    """
    text = str(source)
    if any(mark in text for mark in "*?["):
        fixed = text[: min(text.find(mark) for mark in "*?[" if mark in text)]
        fixed = fixed[: fixed.rfind("/") + 1]
        root = Path(fixed)
        paths = list(root.glob(text[len(fixed) :])) if root.is_dir() else []
    else:
        root = Path(source)
        if not root.is_dir():
            raise UsageError(f"{source} is no folder: give a BIDS-derivatives folder or a quoted glob of NIfTI files")
        paths = [path for path in root.rglob("*_bold.nii*") if _stem(path).endswith(_PREPROCESSED)]
    paths = sorted(path for path in paths if path.is_file() and path.name.endswith(_SUFFIXES))
    if not paths:
        raise UsageError(f"no BOLD file found by {source}: a folder needs *_desc-preproc_bold.nii.gz, else give a glob")
    table = labels
    if table is None and (root / "participants.tsv").is_file():
        table = root / "participants.tsv"
    rows = _read_labels(table) if table is not None else ()
    by_file = {row.file: row for row in rows if row.file}
    found = (_describe(path, root, by_file) for path in paths)
    return Discovery(tuple(sorted(found, key=lambda one: one.relative)), rows, _is_generated(root))


def _stem(path: Path) -> str:
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def _entities(stem: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9+.]+)", stem))


def _describe(path: Path, root: Path, by_file: dict[str, LabelRow]) -> Source:
    relative = path.relative_to(root).as_posix()
    stem = _stem(path)
    entities = _entities(stem)
    row = by_file.get(relative) or by_file.get(path.name)
    others = {name: value for name, value in entities.items() if name not in _NOT_OF_THE_RUN}
    joined = others["run"] if set(others) == {"run"} else "_".join(f"{name}-{value}" for name, value in others.items())
    prefix = stem.removesuffix(_PREPROCESSED) if stem.endswith(_PREPROCESSED) else None
    mask = None if prefix is None else _first(path.parent, [f"{prefix}_desc-brain_mask{end}" for end in _SUFFIXES])
    bare = re.sub(r"_(space|res|den|cohort)-[a-zA-Z0-9+.]+", "", prefix or "")
    tables = [f"{bare}_desc-confounds_{kind}.tsv" for kind in ("timeseries", "regressors")] if bare else []
    return Source(
        path=path,
        relative=relative,
        size=path.stat().st_size,
        subject=row.subject if row else bare_subject(entities.get("sub", "")),
        session=(row.session if row else "") or entities.get("ses", ""),
        task=(row.task if row else "") or entities.get("task", ""),
        run=(row.run if row else "") or joined,
        space=entities.get("space"),
        tr=_stated_tr(row) if row else None,
        mask=mask,
        sidecar=_first(path.parent, [f"{stem}.json"]),
        confounds=_first(path.parent, tables),
    )


def _first(folder: Path, names: list[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _stated_tr(row: LabelRow) -> float | None:
    values = {name.lower(): value for name, value in row.values}
    text = values.get("tr") or values.get("repetitiontime")
    return None if text is None else _number(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _read_labels(path: Path) -> tuple[LabelRow, ...]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            table = list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"label table {path} cannot be read ({type(error).__name__}): give a TSV or CSV file") from error
    columns = {name.strip().lower(): name for name in (table[0] if table else {}) if name}
    subject = next((columns[name] for name in _SUBJECT_COLUMNS if name in columns), None)
    if subject is None:
        raise UsageError(f"label table {path} has no subject column: name one of {', '.join(_SUBJECT_COLUMNS)}")
    file = next((columns[name] for name in _FILE_COLUMNS if name in columns), None)
    keys = [columns.get(name) for name in ("session", "task", "run")]
    joined = {subject, file, *keys}
    rows = []
    for line in table:
        session, task, run = ((line[key] or "").strip() if key else "" for key in keys)
        rows.append(
            LabelRow(
                subject=bare_subject(line[subject] or ""),
                session="" if session.lower() in _MISSING else session.removeprefix("ses-"),
                task="" if task.lower() in _MISSING else task.removeprefix("task-"),
                run="" if run.lower() in _MISSING else run.removeprefix("run-"),
                file=(line[file] or "").strip() if file else "",
                values=tuple((name, _value(line[name])) for name in line if name and name not in joined),
            )
        )
    return tuple(row for row in rows if row.subject)


def _value(text: str | None) -> str | None:
    return None if text is None or text.strip().lower() in _MISSING else text.strip()


def _is_generated(root: Path) -> bool:
    try:
        description = json.loads((root / "dataset_description.json").read_text(encoding="utf-8"))
        makers = [str(maker.get("Name", "")) for maker in description.get("GeneratedBy", [])]
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return any(maker.startswith("swiftv2") for maker in makers)


def sidecar_facts(path: Path | None) -> tuple[float | None, str | None]:
    """Repetition time in seconds and template space that a JSON side-car states, None each where it states none.

    Raises:
        RefusedError: the side-car is no JSON object or its RepetitionTime is no number.
    """
    if path is None:
        return None, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError("the JSON side-car cannot be read") from error
    if not isinstance(content, dict):
        raise RefusedError("the JSON side-car is no JSON object")
    tr, space = content.get("RepetitionTime"), content.get("Space", content.get("SpatialReference"))
    if tr is not None and (isinstance(tr, bool) or not isinstance(tr, int | float)):
        raise RefusedError("RepetitionTime in the JSON side-car is no number")
    named = isinstance(space, str) and re.fullmatch(r"[A-Za-z0-9]+", space)
    return (None if tr is None else float(tr)), (str(space) if named else None)


@dataclass(frozen=True)
class Confounds:
    """Per frame: framewise displacement in mm (float32, NaN where unknown), censored and non-steady-state (uint8, 0 or 1)."""

    framewise_displacement: npt.NDArray[np.float32]
    censored: npt.NDArray[np.uint8]
    non_steady_state: npt.NDArray[np.uint8]


def read_confounds(path: Path, frames: int) -> Confounds:
    """Read fMRIPrep's confound table.

    Raises:
        RefusedError: unreadable, or not one line a frame.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RefusedError("the confound table cannot be read") from error
    if len(lines) != frames:
        raise RefusedError(f"the confound table has {len(lines)} lines for {frames} frames")
    displacement = [_number(line.get("framewise_displacement") or "nan") for line in lines]
    return Confounds(
        framewise_displacement=np.asarray(displacement, dtype=np.float32),
        censored=_any_of(lines, "motion_outlier"),
        non_steady_state=_any_of(lines, "non_steady_state_outlier"),
    )


def _any_of(lines: list[dict[str, str]], prefix: str) -> npt.NDArray[np.uint8]:
    columns = [name for name in lines[0] if name and name.startswith(prefix)]
    return np.asarray([any(_number(line[name] or "0") > 0 for name in columns) for line in lines], dtype=np.uint8)
