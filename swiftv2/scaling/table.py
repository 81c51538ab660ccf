"""Tables of finished runs, as CSV or JSON: read, and refused with the place of what is wrong."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swiftv2.errors import UsageError
from swiftv2.scaling.law import Floats

NAMES = ("name", "run", "model")
"""Columns that may name a run, the first that is there."""
_SHOWN = 12
MOST_RUNS = 5000
"""Runs of a table at most: every run is compared with every other."""
_LEAST, _MOST = 1e-30, 1e60
"""Numbers between which products of two, and powers by any exponent that is searched, are still numbers."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        parameters, loss: of every run.
        tokens: seen in training; without it they are FLOPs / (6 parameters).
        flops: of the whole training; without it they are 6 parameters x tokens.
        unique: tokens that differ, where some were seen more than once.
    """

    parameters: str
    loss: str
    tokens: str | None = None
    flops: str | None = None
    unique: str | None = None

    def named(self) -> list[str]:
        """Those that must be there."""
        return [one for one in (self.parameters, self.tokens, self.flops, self.loss, self.unique) if one is not None]


@dataclass(frozen=True)
class Table:
    """Columns of numbers of finished runs, all finite and above zero.

    Attributes:
        path: where it was read.
        columns: which columns those are.
        rows: number of each run, counted from 1 without the line of titles: (n,).
        names: of the runs, or None where there is no such column.
        parameters, tokens, flops, loss: (n,) each.
        unique: (n,), or None.
    """

    path: Path
    columns: Columns
    rows: tuple[int, ...]
    names: tuple[str, ...] | None
    parameters: Floats
    tokens: Floats
    flops: Floats
    loss: Floats
    unique: Floats | None

    def take(self, indices: Sequence[int]) -> "Table":
        """The same with these runs alone, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Table(
            path=self.path,
            columns=self.columns,
            rows=tuple(self.rows[i] for i in chosen),
            names=None if self.names is None else tuple(self.names[i] for i in chosen),
            parameters=self.parameters[chosen],
            tokens=self.tokens[chosen],
            flops=self.flops[chosen],
            loss=self.loss[chosen],
            unique=None if self.unique is None else self.unique[chosen],
        )

    def label(self, index: int) -> str:
        """What a message calls a run."""
        row = f"row {self.rows[index]}"
        return row if self.names is None or not self.names[index] else f"{self.names[index]} ({row})"


def read_table(path: Path, columns: Columns) -> Table:
    """Read a table.

    Args:
        path: CSV with a line of titles, or JSON: a list of objects, or an object whose `rows` is one.
        columns: titles of the columns; tokens or flops, or both, must be given.

    Raises:
        UsageError: it cannot be read, a column is missing or twice there, or a cell is no finite number above zero.
    """
    records = _json_records(path) if path.suffix.lower() == ".json" else _csv_records(path)
    if not records:
        raise UsageError(f"{path}: no runs in it; a table has a line of titles and one line a finished run")
    if len(records) > MOST_RUNS:
        raise UsageError(f"{path}: {len(records)} runs, and at most {MOST_RUNS} are fitted: give one line a finished run")
    if columns.named().count(columns.loss) > 1:
        raise UsageError(f"the column {columns.loss!r} is named for losses and for something else: name two columns")
    titles = list(dict.fromkeys(title for record in records for title in record))
    for column in columns.named():
        if column not in titles:
            shown = ", ".join(repr(title) for title in titles[:_SHOWN]) + (", ..." if len(titles) > _SHOWN else "")
            raise UsageError(f"{path}: no column {column!r}; there are {shown}")
    numbers = {
        column: np.array([_number(path, row, column, record.get(column)) for row, record in enumerate(records, start=1)])
        for column in columns.named()
    }
    parameters, loss = numbers[columns.parameters], numbers[columns.loss]
    if columns.tokens is not None:
        tokens = numbers[columns.tokens]
        flops = 6.0 * parameters * tokens if columns.flops is None else numbers[columns.flops]
    elif columns.flops is not None:
        flops = numbers[columns.flops]
        tokens = flops / (6.0 * parameters)
    else:
        raise UsageError(f"{path}: which column holds tokens, or FLOPs?")
    named = next((title for title in NAMES if title in titles and title not in columns.named()), None)
    return Table(
        path=path,
        columns=columns,
        rows=tuple(range(1, len(records) + 1)),
        names=None if named is None else tuple(str(record.get(named) or "") for record in records),
        parameters=parameters,
        tokens=tokens,
        flops=flops,
        loss=loss,
        unique=None if columns.unique is None else numbers[columns.unique],
    )


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except IsADirectoryError as error:
        raise UsageError(f"{path}: a folder; give the table itself, such as {path / 'table.csv'}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a table as `swiftv2 sweep collect` writes it") from error
    if not content.strip():
        raise UsageError(f"{path}: empty; a table has a line of titles and one line a finished run")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file; give a table as CSV or JSON") from error
    if "\0" in text:
        raise UsageError(f"{path}: not a text file; give a table as CSV or JSON")
    return text


def _csv_records(path: Path) -> list[Mapping[str, Any]]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num}: {error}; the file is damaged or no CSV") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if not lines:
        raise UsageError(f"{path}: empty; a table has a line of titles and one line a finished run")
    titles = lines[0][1]
    other = next((mark for mark in (";", "\t") if len(titles) == 1 and mark in titles[0]), None)
    if other is not None:
        raise UsageError(f"{path}: cells are separated by {other!r}; separate them by commas")
    twice = [title for title, count in Counter(titles).items() if count > 1 and title]
    if twice:
        raise UsageError(f"{path}: the column {twice[0]!r} is there {titles.count(twice[0])} times; rename all but one")
    for number, cells in lines[1:]:
        if len(cells) != len(titles):
            raise UsageError(f"{path}: line {number} has {len(cells)} cells, the titles are {len(titles)}: is the file whole?")
    return [dict(zip(titles, cells, strict=True)) for _, cells in lines[1:]]


def _json_records(path: Path) -> list[Mapping[str, Any]]:
    try:
        tree = json.loads(_text(path), object_pairs_hook=lambda pairs: _object(path, pairs))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: the file is damaged") from error
    records = tree.get("rows") if isinstance(tree, dict) else tree
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UsageError(f"{path}: expected a list of objects, one a run, or an object whose 'rows' is one")
    return records


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise UsageError(f"{path}: the key {twice!r} is twice in one object; rename one")
    return made


def _number(path: Path, row: int, column: str, cell: object) -> float:
    where = f"{path}: row {row}, column {column!r}"
    if cell is None or cell == "":
        raise UsageError(f"{where}: empty; fill it, or take the run out of the table")
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        raise UsageError(f"{where}: {str(cell)[:40]!r} is not a number")
    if isinstance(cell, str) and ("_" in cell or not cell.isascii()):
        raise UsageError(f"{where}: {cell[:40]!r} is not a number; write it plainly, such as 1.5e9")
    try:
        number = float(cell)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: {str(cell)[:40]!r} is not a number; write it plainly, such as 1.5e9") from error
    if not math.isfinite(number):
        raise UsageError(f"{where}: {cell} is not a finite number; take the run out of the table")
    if number <= 0.0:
        raise UsageError(f"{where}: {cell} is not above zero, and the fit takes logarithms; take the run out of the table")
    if not _LEAST < number < _MOST:
        raise UsageError(f"{where}: {cell} is no size, token count, FLOPs or loss of a run; write it in another unit")
    return number
