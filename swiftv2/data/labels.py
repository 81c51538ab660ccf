"""Label tables: read, checked, merged, and joined to runs by subject, session, task and run."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from swiftv2.data.keys import bare_subject
from swiftv2.errors import UsageError

SUBJECT_COLUMNS = (
    "participant_id",
    "subject",
    "subject_id",
    "sub",
    "src_subject_id",
    "subjectkey",
    "eid",
    "id",
)
SESSION_COLUMNS = ("session", "session_id", "ses", "eventname")
_FILE_COLUMNS = ("file", "filename", "path")
_MISSING = ("", "n/a", "na", "nan", "none", "null", "#n/a")
PARTICIPANTS = "participants.tsv"
"""BIDS' table of what holds for a participant at every visit."""


class RunName(NamedTuple):
    """What labels join on; session, task and run are empty where nothing names them."""

    subject: str
    session: str
    task: str
    run: str


@dataclass(frozen=True)
class LabelRow:
    """One line of a label table; session, task and run are empty where the table has no such column or no entry."""

    subject: str
    session: str
    task: str
    run: str
    file: str
    values: tuple[tuple[str, str | None], ...]

    @property
    def name(self) -> RunName:
        """What the line joins on."""
        return RunName(self.subject, self.session, self.task, self.run)


@dataclass(frozen=True)
class LabelTable:
    """Lines of one or several tables, and whether a table of many subjects says nothing of visits."""

    rows: tuple[LabelRow, ...] = ()
    without_sessions: bool = False


def read_labels(paths: Sequence[Path]) -> LabelTable:
    """Read label tables: text in UTF-8, one header line, one line a subject, or a subject's session, task, run or file.

    Cells stand between tabs (`.tsv`, or a header that has any), else between commas, or semicolons where the header has
    these only. Columns, in any case of letters: the subject's id is the first of `SUBJECT_COLUMNS` that is there, its session
    the first of `SESSION_COLUMNS`; then task, run, file. All others are labels. Empty, n/a, na, nan,
    none, null and #n/a are no value.

    Raises:
        UsageError: a table cannot be read, has no subject column, or a line does not fit the header.
    """
    rows: list[LabelRow] = []
    without = False
    for path in paths:
        found, sessions = _read_table(path, f"label table {path}", "")
        rows += found
        without |= not sessions and path.name != PARTICIPANTS and any(not row.file for row in found)
    return LabelTable(tuple(rows), without)


def read_sessions(tables: Sequence[tuple[str, Path]]) -> tuple[LabelRow, ...]:
    """Read BIDS' `sub-*_sessions.tsv`, of which each subject may have one.

    Args:
        tables: subject id and file, by subject.

    Raises:
        UsageError: see `read_labels`; the table is named by its place among all, since its name tells the subject.
    """
    rows: list[LabelRow] = []
    for number, (subject, path) in enumerate(tables, start=1):
        what = f"table {number} of the {len(tables)} sub-*_sessions.tsv by name"
        found, sessions = _read_table(path, what, subject)
        if not sessions:
            raise UsageError(f"{what} has no column session_id: add it or remove the table")
        rows += found
    return tuple(rows)


def _read_table(path: Path, what: str, subject: str) -> tuple[list[LabelRow], bool]:
    text = _text(path, what)
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix == ".tsv" or "\t" in head else ";" if ";" in head and "," not in head else ","
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    lines = []
    try:
        lines += [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise UsageError(f"{what}, line {reader.line_num}: {error}: mend the quotes") from error
    if len(lines) < 2:
        raise UsageError(f"{what} has no line below its header: give a table with one line a subject or run")
    header = [name.strip() for name in lines[0][1]]
    twice = sorted(name for name, count in Counter(header).items() if count > 1 and name)
    if twice:
        raise UsageError(f"{what} has several columns {', '.join(twice)}: give each its own name")
    columns = {name.lower(): place for place, name in reversed(list(enumerate(header))) if name}
    subject_column = None if subject else _first(columns, SUBJECT_COLUMNS)
    if not subject and subject_column is None:
        raise UsageError(f"{what} has no subject column: name one of {', '.join(SUBJECT_COLUMNS)}")
    session_column, file_column = _first(columns, SESSION_COLUMNS), _first(columns, _FILE_COLUMNS)
    places = {subject_column, session_column, file_column, columns.get("task"), columns.get("run")}
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise UsageError(f"{what}, line {number}: {len(cells)} cells where the header has {len(header)}: mend this line")
        row = LabelRow(
            subject=subject if subject_column is None else bare_subject(cells[subject_column]),
            session=_key(cells, session_column, "ses-"),
            task=_key(cells, columns.get("task"), "task-"),
            run=_key(cells, columns.get("run"), "run-"),
            file="" if file_column is None else cells[file_column].strip(),
            values=tuple((name, _value(cells[place])) for place, name in enumerate(header) if name and place not in places),
        )
        if _value(row.subject) is not None:
            rows.append(row)
    return rows, session_column is not None


def _text(path: Path, what: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{what}, line {line}: no UTF-8 text: save the table as UTF-8") from error
    if "\0" in text:
        raise UsageError(f"{what} is no text: give a TSV or CSV file in UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _first(columns: dict[str, int], names: Sequence[str]) -> int | None:
    return next((columns[name] for name in names if name in columns), None)


def _key(cells: list[str], place: int | None, prefix: str) -> str:
    value = None if place is None else _value(cells[place])
    return "" if value is None else value.removeprefix(prefix)


def _value(text: str) -> str | None:
    return None if text.strip().lower() in _MISSING else text.strip()


def bind_files(rows: Iterable[LabelRow], files: dict[str, RunName]) -> tuple[LabelRow, ...]:
    """Give the lines that name a file the run that the file is; lines of files that are not there fall away.

    Args:
        rows: lines of label tables.
        files: the run of every file that a line named.
    """
    bound = (
        replace(row, **files[row.file]._asdict()) if row.file else row for row in rows if not row.file or row.file in files
    )
    return tuple(bound)


def merge(rows: Iterable[LabelRow]) -> tuple[LabelRow, ...]:
    """One line for each (subject, session, task, run); a value fills a gap.

    Raises:
        UsageError: lines of one key have different values.
    """
    merged: dict[RunName, dict[str, str | None]] = {}
    files: dict[RunName, str] = {}
    columns: Counter[str] = Counter()
    keys = set()
    for row in rows:
        values = merged.setdefault(row.name, {})
        files.setdefault(row.name, row.file)
        for column, value in row.values:
            known = values.get(column)
            if known is not None and value is not None and known != value:
                columns[column] += 1
                keys.add(row.name)
            values[column] = known if value is None else value
    if keys:
        listed = ", ".join(name for name, _ in columns.most_common(5)) + (", ..." if len(columns) > 5 else "")
        raise UsageError(
            f"the label tables have lines of one subject, session, task and run that differ, for {len(keys)} of these in the "
            f"column(s) {listed}: keep one line each, or name what tells them apart in a column session, task or run"
        )
    return tuple(LabelRow(*name, files[name], tuple(values.items())) for name, values in merged.items())


def check_labels(table: LabelTable, runs: Sequence[RunName]) -> None:
    """Refuse tables of which nobody but the user can say how they belong to the runs.

    Args:
        table: all lines, files bound to runs.
        runs: the runs found; those without a subject do not count.

    Raises:
        UsageError: no id is that of a run; sessions that no run has; or several visits and a table that tells none.
    """
    known = [run for run in runs if run.subject]
    subjects = {run.subject for run in known}
    ids = {row.subject for row in table.rows}
    if not known or not table.rows:
        return
    if not subjects & ids:
        raise UsageError(
            f"none of the {len(ids)} subject ids in the label table is one of the {len(subjects)} subjects found. Table: "
            f"{_shape(ids)}; files: {_shape(subjects)}. Ids must be equal but for sub-: change the table's"
        )
    sessions = {run.session for run in known if run.subject in ids}
    named = {row.session for row in table.rows if row.session and row.subject in subjects}
    if named and not named & sessions:
        theirs, ours = _some(named), _some(sessions - {""})
        if sessions == {""}:
            raise UsageError(
                f"the label table names sessions ({theirs}), the files name none: keep the lines of the visit that was scanned "
                "and drop the session column, or give a file column"
            )
        raise UsageError(f"no session of the label table ({theirs}) is one of the files' ({ours}): write them as the files do")
    if table.without_sessions:
        visits = Counter(subject for subject, _ in {(run.subject, run.session) for run in known if run.subject in ids})
        several = sum(count > 1 for count in visits.values())
        if several:
            raise UsageError(
                f"{several} subjects have files of several sessions and the label table has no session column: add one "
                "(n/a in it: the line holds for every session)"
            )


def _shape(ids: set[str]) -> str:
    """How most of some ids look, without telling any."""

    def form(text: str) -> str:
        kinds = [name for name, found in (("letters", r"[A-Za-z]"), ("digits", r"[0-9]")) if re.search(found, text)]
        kinds += sorted({f"'{mark}'" for mark in re.sub(r"[A-Za-z0-9]", "", text)})
        return f"{len(text)} characters, {' and '.join(kinds)}" + (", beginning with 0" if text.startswith("0") else "")

    return Counter(form(text) for text in sorted(ids)).most_common(1)[0][0]


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def join_labels(rows: Iterable[LabelRow], runs: Sequence[RunName]) -> list[dict[str, str | None]]:
    """Columns of the label tables for each run; of the lines that fit, the one that names more wins.

    A line fits where the subject is the run's and its session, task and run are the run's or empty.
    """
    by_subject: dict[str, list[LabelRow]] = {}
    for row in sorted(rows, key=lambda row: sum(bool(part) for part in row.name[1:])):
        by_subject.setdefault(row.subject, []).append(row)
    joined = []
    for run in runs:
        values: dict[str, str | None] = {}
        for row in by_subject.get(run.subject, []):
            if all(have in ("", want) for have, want in zip(row.name, run, strict=True)):
                values.update(row.values)
        joined.append(values)
    return joined
