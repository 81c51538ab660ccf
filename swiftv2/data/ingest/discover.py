"""Finding the runs: a BIDS-derivatives tree, or a glob of NIfTI files with a label table."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swiftv2.data import labels as label_tables
from swiftv2.data.ingest.sidecars import SUFFIXES, Folders, Levels, entities_of, stem_of
from swiftv2.data.keys import bare_subject
from swiftv2.data.labels import PARTICIPANTS, LabelRow, LabelTable, RunName
from swiftv2.errors import UsageError

_PREPROCESSED = "_desc-preproc_bold"
_NOT_OF_THE_RUN = ("sub", "ses", "task", "space", "res", "desc", "den", "cohort", "hemi")
_TR_COLUMNS = ("tr", "repetitiontime")
NATIVE_SPACES = frozenset({"t1w", "t2w", "anat", "func", "bold", "boldref", "epi", "native", "orig", "scanner", "individual"})


@dataclass(frozen=True)
class Source:
    """One BOLD file and what stands beside it.

    Attributes:
        path: the file.
        relative: its path below the source folder: personal data, since it names the subject.
        size: bytes; 0 where a link leads nowhere.
        subject: id without `sub-`; empty where nothing tells it.
        session, task, run: entities, empty where there are none; `run` joins all others that tell runs apart.
        space: template space by the name, or None.
        tr: seconds by the label table (NaN where it says no number), or None.
        mask, confounds: files beside it, or None.
        sidecars: JSON files that hold for it, the nearest level first.
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
    confounds: Path | None
    sidecars: Levels

    @property
    def name(self) -> RunName:
        """What labels join on."""
        return RunName(self.subject, self.session, self.task, self.run)


@dataclass(frozen=True)
class Discovery:
    """Runs (by relative path), label rows, and whether the tree says that swiftv2 generated it."""

    sources: tuple[Source, ...]
    labels: tuple[LabelRow, ...]
    generated: bool


def discover(source: str | Path, labels: Path | Sequence[Path] | None = None) -> Discovery:
    """List the BOLD files of a BIDS-derivatives folder or of a glob.

    Args:
        source: a folder (`*_desc-preproc_bold.nii[.gz]` below it are taken), or a glob of NIfTI files.
        labels: TSV or CSV tables with a subject column (participant_id, subject, ...), and, where files do not carry
            `sub-`, a file column; session, task, run and tr columns join where they are there. A folder's own
            participants.tsv and sub-*_sessions.tsv count when this is None.

    Raises:
        UsageError: nothing is found, a folder cannot be read, or the tables cannot be read or do not fit what is found.
    """
    root, paths = _listed(str(source))
    if not paths:
        raise UsageError(f"no BOLD file found by {source}: a folder needs *_desc-preproc_bold.nii.gz, else give a glob")
    table = _tables(root, labels)
    folders = Folders()
    sources = sorted((_describe(path, root, folders) for path in paths), key=lambda one: one.relative)
    sources, rows = _with_labels(sources, table)
    return Discovery(tuple(sources), rows, _is_generated(root))


def _listed(source: str) -> tuple[Path, list[Path]]:
    """The root of a folder or glob, and the BOLD files there; links that lead nowhere count, linked folders do not."""
    closed: set[Path] = set()
    if any(mark in source for mark in "*?["):
        fixed = source[: min(source.find(mark) for mark in "*?[" if mark in source)]
        fixed = fixed[: fixed.rfind("/") + 1]
        root = Path(fixed)
        found = _globbed(root, source[len(fixed) :], closed) if root.is_dir() else []
    else:
        root = Path(source)
        if not root.is_dir():
            raise UsageError(f"{source} is no folder: give a BIDS-derivatives folder or a quoted glob of NIfTI files")
        found = _walked(root, closed)
    if closed:
        count = "1 folder" if len(closed) == 1 else f"{len(closed)} folders"
        raise UsageError(f"{count} of {source} cannot be read, so runs would be missing unseen: ask for the right to read them")
    return root, [path for path in found if path.name.endswith(SUFFIXES) and (path.is_symlink() or path.is_file())]


def _walked(root: Path, closed: set[Path]) -> list[Path]:
    """Preprocessed files below a folder; folders that do not let them be found go into `closed`."""
    found = []
    for folder, _, names in os.walk(root, onerror=lambda error: closed.add(Path(error.filename))):
        named = [name for name in names if stem_of(name).endswith(_PREPROCESSED)]
        if named and not _opens(Path(folder)):
            closed.add(Path(folder))
        else:
            found += [Path(folder) / name for name in named]
    return found


def _globbed(root: Path, pattern: str, closed: set[Path]) -> list[Path]:
    """Files of a glob below a folder; folders that it passes over because they cannot be read go into `closed`."""
    parts = Path(pattern).parts
    folders = {root}
    for length in range(1, len(parts)):
        folders.update(root.glob("/".join(parts[:length])))
    closed |= {folder for folder in folders if _is_folder(folder) and not _opens(folder)}
    return [] if closed else list(root.glob(pattern))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # The folder above is closed, and counted.
        return False


def _opens(folder: Path) -> bool:
    """Whether a folder can be listed, and what it holds be reached: two rights."""
    try:
        with os.scandir(folder):
            return os.access(folder, os.X_OK)
    except OSError:
        return False


def _tables(root: Path, labels: Path | Sequence[Path] | None) -> LabelTable:
    if labels is not None:
        return label_tables.read_labels([labels] if isinstance(labels, Path) else labels)
    own = root / PARTICIPANTS
    table = label_tables.read_labels([own]) if own.is_file() else LabelTable()
    visits = [(bare_subject(path.parent.name), path) for path in sorted(root.glob("sub-*/sub-*_sessions.tsv"))]
    return replace(table, rows=table.rows + label_tables.read_sessions(visits))


def _describe(path: Path, root: Path, folders: Folders) -> Source:
    stem = stem_of(path.name)
    entities = entities_of(stem)
    others = {name: value for name, value in entities.items() if name not in _NOT_OF_THE_RUN}
    joined = others["run"] if set(others) == {"run"} else "_".join(f"{name}-{value}" for name, value in others.items())
    prefix = stem.removesuffix(_PREPROCESSED) if stem.endswith(_PREPROCESSED) else None
    masks = [f"{prefix}_desc-brain_mask{end}" for end in SUFFIXES] if prefix else []
    bare = re.sub(r"_(space|res|den|cohort)-[a-zA-Z0-9+.]+", "", prefix or "")
    tables = [f"{bare}_desc-confounds_{kind}.tsv" for kind in ("timeseries", "regressors")] if bare else []
    return Source(
        path=path,
        relative=path.relative_to(root).as_posix(),
        size=path.stat().st_size if path.exists() else 0,
        subject=bare_subject(entities.get("sub", "")),
        session=entities.get("ses", ""),
        task=entities.get("task", ""),
        run=joined,
        space=entities.get("space"),
        tr=None,
        mask=folders.first(path.parent, masks),
        confounds=folders.first(path.parent, tables),
        sidecars=folders.sidecars(path, root),
    )


def _with_labels(sources: list[Source], table: LabelTable) -> tuple[list[Source], tuple[LabelRow, ...]]:
    """Let label lines that name a file say whose it is; join repetition times; merge the lines."""
    by_file: dict[str, LabelRow] = {}
    for row in table.rows:
        if row.file and by_file.setdefault(row.file, row).name != row.name:
            raise UsageError(
                "the label tables give one file to several subjects, sessions, tasks or runs: keep one line a file"
            )
    named: dict[str, RunName] = {}
    for place, source in enumerate(sources):
        named_by = [name for name in (source.relative, str(source.path), source.path.name) if name in by_file]
        if named_by:
            owner = by_file[named_by[0]]
            sources[place] = replace(
                source,
                subject=owner.subject,
                session=owner.session or source.session,
                task=owner.task or source.task,
                run=owner.run or source.run,
            )
            named[owner.file] = sources[place].name
    bound = replace(table, rows=label_tables.bind_files(table.rows, named))
    names = [source.name for source in sources]
    label_tables.check_labels(bound, names)
    rows = label_tables.merge(bound.rows)
    times = [_stated_tr(values) for values in label_tables.join_labels(rows, names)]
    return [replace(source, tr=tr) for source, tr in zip(sources, times, strict=True)], rows


def _stated_tr(values: dict[str, str | None]) -> float | None:
    lower = {name.lower(): value for name, value in values.items()}
    text = next((lower[name] for name in _TR_COLUMNS if lower.get(name)), None)
    try:
        return None if text is None else float(text)
    except ValueError:
        return math.nan


def _is_generated(root: Path) -> bool:
    try:
        description = json.loads((root / "dataset_description.json").read_text(encoding="utf-8"))
        makers = [str(maker.get("Name", "")) for maker in description.get("GeneratedBy", [])]
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return any(maker.startswith("swiftv2") for maker in makers)
