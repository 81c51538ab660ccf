"""The versions of a store: what the newest one holds, and removing from the folder whatever it does not.

One file, the group's zarr.json, says which version the folder holds. It is replaced by a rename after all that the new
version needs is on the disk, and before anything goes that the old one needs.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftv2.data.grid import Grid
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, read_index
from swiftv2.errors import SwiftError
from swiftv2.files import sync, write_file


@dataclass(frozen=True)
class Base:
    """The newest version of a store.

    Attributes:
        store: the folder.
        attributes: those of the store.
        runs: the lines of the index.
        listed: keys of subjects whom a list of withdrawals named and of whom no run was there.
        rows, frames: extent of its arrays.
    """

    store: Path
    attributes: dict[str, Any]
    runs: tuple[Run, ...]
    listed: frozenset[str] = frozenset()

    @property
    def version(self) -> int:
        """Counts the changes of the store, from 1."""
        return int(self.attributes["version"])

    @property
    def rows(self) -> int:
        """Rows of every array; those of refused runs are empty."""
        return int(self.attributes["rows"])

    @property
    def frames(self) -> int:
        """Extent of the arrays' axis of frames."""
        return int(self.attributes["frames"])

    @property
    def grid(self) -> Grid:
        """The window that all runs share."""
        return Grid.from_json(self.attributes["grid"])

    @property
    def dtypes(self) -> frozenset[str]:
        """Number types that have a bold array."""
        return frozenset(run.dtype for run in self.runs)

    @property
    def subjects(self) -> frozenset[str]:
        """Keys of the subjects of which any run is there."""
        return frozenset(run.subject for run in self.runs if run.present)

    @property
    def withdrawn(self) -> frozenset[str]:
        """Keys of the subjects who withdrew consent and of whom runs were there."""
        return frozenset(run.subject for run in self.runs if run.withdrawn)

    @property
    def cohorts(self) -> tuple[str, ...]:
        """Names of all cohorts that ever were in the store, sorted."""
        changes = (str(change["cohort"]) for change in self.attributes["history"] if "cohort" in change)
        return tuple(sorted({*(run.cohort for run in self.runs), *changes}))

    def history(self, digest: str) -> dict[str, Any] | None:
        """The entry of the change that took these source files by these options, or None."""
        entries: list[dict[str, Any]] = self.attributes["history"]
        return next((one for one in entries if one.get("sources") == digest), None)


def read_base(store: Path) -> Base:
    """Read what the newest version holds.

    Raises:
        SwiftError: no store, an unfinished build, another format, or a damaged index.
    """
    lines = read_lines(store / layout.WITHDRAWALS_FILE)
    return Base(store, *read_index(store), frozenset(key for line in lines for key in line.get("listed", ())))


def check_unchanged(base: Base) -> None:
    """See that a version is the newest still; whoever is alone in the folder calls this before changing anything.

    Raises:
        SwiftError: another process has changed the store since the version was read.
    """
    now = layout.read_attributes(base.store)
    if any(now[name] != base.attributes[name] for name in ("version", "runs_sha256")):
        raise changed(base.store)


def changed(store: Path) -> SwiftError:
    """The error of a change that was planned on what the store no longer is."""
    return SwiftError(f"{store} was changed meanwhile by another process: give the command again")


def encode_runs(runs: tuple[Run, ...]) -> bytes:
    """The bytes of a run index."""
    return "".join(json.dumps(run.to_json()) + "\n" for run in runs).encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, each of which names a version; none where its owner has removed it.

    Raises:
        SwiftError: a line is no such object; told by its number.
    """
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        try:
            line = json.loads(text)
            int(line["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise SwiftError(f"{path}, line {number} is damaged: restore the file from a copy, or mend this line") from error
        lines.append(line)
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a private file of JSON lines whole."""
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines), layout.PRIVATE)


def read_subjects(store: Path) -> dict[str, Any]:
    """The file of ids: salt, subjects, labels.

    Raises:
        SwiftError: it is missing, damaged, or of another user.
    """
    path = store / layout.SUBJECTS_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        str(content["salt"]), dict(content["subjects"]), list(content["labels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SwiftError(
            f"{path} cannot be read: it holds salt, ids and labels: restore it from a copy, or ask the store's owner"
        ) from error
    return content


def write_subjects(store: Path, content: dict[str, Any]) -> None:
    """Write the file of ids whole."""
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_file(store / layout.SUBJECTS_FILE, text, layout.PRIVATE)


@contextlib.contextmanager
def alone_in(store: Path, staging: str) -> Iterator[None]:
    """Keep other changes of the same kind out of the folder; file systems without locks leave that to the user."""
    descriptor = os.open(store / staging / "lock", os.O_RDWR | os.O_CREAT, layout.PRIVATE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SwiftError(f"{store} is being changed by another process: let it end, or stop it first") from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise
        _check_own(descriptor, store, staging)
        yield
    finally:
        os.close(descriptor)


def _check_own(descriptor: int, store: Path, staging: str) -> None:
    """Refuse a lock whose file another process removed with its folder: it keeps nobody out."""
    try:
        same = os.path.samestat(os.fstat(descriptor), (store / staging / "lock").stat())
    except FileNotFoundError:
        same = False
    if not same:
        raise changed(store)


@contextlib.contextmanager
def writing(store: Path, command: str) -> Iterator[None]:
    """Make a failure to write an error that names the place (a context, or what wraps an action)."""
    try:
        yield
    except OSError as error:
        place = error.filename or f"store {store} cannot be written"
        reason = error.strerror or type(error).__name__
        raise SwiftError(f"{place}: {reason}; mend that and give `swiftv2 store {command}` again, it goes on") from error


def make_staging(store: Path, staging: str) -> None:
    """Make a staging folder that only the owner may enter."""
    folder = store / staging
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(layout.PRIVATE_FOLDER)
    except OSError as error:
        raise SwiftError(f"{store} cannot be made or changed ({error.strerror}): choose a folder you may write to") from error


def remove_staging(store: Path, staging: str) -> None:
    """Remove a staging folder, its plan last: as long as that is there, the folder tells what is left to do."""
    folder = store / staging
    if not folder.is_dir():
        return
    last = [folder / layout.PLAN_FILE, folder / "lock"]
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in last:
            path.unlink()
    for path in last:
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # Another process has made its lock there: the folder is its own by now.
            raise
    sync(store)


def finish_append(store: Path) -> None:
    """Remove what a build or append leaves when it was killed behind its commit; an unfinished one is left as it is.

    Raises:
        SwiftError: another process is at work there.
    """
    if (store / layout.STAGING).is_dir() and layout.is_complete(store) and layout.unfinished(store) != "append":
        with alone_in(store, layout.STAGING):
            remove_former(store, layout.STAGING)


def remove_former(store: Path, staging: str) -> None:
    """Remove the indices of former versions, then a staging folder."""
    _remove_old_indices(read_base(store))
    remove_staging(store, staging)


def _remove_old_indices(base: Base) -> None:
    for path in base.store.glob("runs*.jsonl"):
        if path.name != base.attributes["index"]:
            path.unlink()
    sync(base.store)


def settle(store: Path) -> int:
    """Remove all that the newest version does not hold, such as what a withdrawal or an append that was given up left.

    That is: half-written files, indices of other versions, bold shards, rows of small arrays, ids, labels and lines of the
    report whose runs are not present. It may be interrupted, and done again. Memory: one shard of a small array. Files that
    the format does not know stay.

    Returns:
        Bold shards of runs that the index does not name, which went.
    """
    base = read_base(store)
    for partial in store.rglob("*.partial"):
        partial.unlink()
    _remove_old_indices(base)
    leftovers = _settle_bold(base)
    content = read_subjects(store)
    kept = {
        "salt": content["salt"],
        "subjects": {key: one for key, one in content["subjects"].items() if key in base.subjects},
        "labels": [one for one in content["labels"] if one["subject"] in base.subjects],
    }
    if kept != content:
        write_subjects(store, kept)
    prune_report(store, base.withdrawn | base.listed)
    _settle_small(base)
    return leftovers


def prune_report(store: Path, subjects: frozenset[str], names: frozenset[str] = frozenset()) -> None:
    """Remove the lines of subjects from the report of builds.

    Args:
        store: folder of the store.
        subjects: their keys.
        names: their ids: a line without a subject goes where its file's name has one of them between its marks.
    """
    path = store / layout.REPORT_FILE
    lines = read_lines(path)
    kept = [line for line in lines if line.get("subject") not in subjects and not named_in(line, names)]
    if len(kept) < len(lines):
        write_lines(path, kept)


def named_in(line: dict[str, Any], names: frozenset[str]) -> bool:
    """Whether a line of the report tells no subject, and its file's name has one of these ids, whole, in it."""
    if line.get("subject"):
        return False
    file = str(line.get("file", ""))
    return any(re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", file) for name in names)


def _settle_bold(base: Base) -> int:
    present = {(run.dtype, run.row) for run in base.runs if run.present}
    named, leftovers = {(run.dtype, run.row) for run in base.runs}, 0
    for folder in (base.store / "bold" / dtype for dtype in layout.BOLD_TYPES):
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            place = (folder.name, _numbers(path, 3)[0])
            if place[1] >= 0 and place not in present:
                path.unlink()
                leftovers += place not in named
        sync(folder)
        if folder.name in base.dtypes:
            layout.set_shape(folder, (base.rows, base.frames, _width(folder)))
            continue
        (folder / "zarr.json").unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    return leftovers


def _settle_small(base: Base) -> None:
    """Raise at the end: a damaged shard does not keep the others' rows from going."""
    present = {run.row for run in base.runs if run.present}
    damage: SwiftError | None = None
    for small in layout.SMALL_ARRAYS:
        folder = base.store / small.name
        extent = base.frames if small.axis == "frame" else _width(folder)
        width, chunk = json.loads((folder / "zarr.json").read_bytes())["chunk_grid"]["configuration"]["chunk_shape"]
        for path in sorted(folder.iterdir()):
            shard, column = _numbers(path, 2)
            if shard < 0:
                continue
            first, there = shard * int(width), column * int(chunk) < extent
            kept = {row for row in range(int(width)) if there and first + row in present}
            try:
                layout.keep_rows(path, kept)
            except SwiftError as error:
                damage = damage or error
        sync(folder)
        layout.set_shape(folder, (base.rows, extent))
    if damage is not None:
        raise damage


def _numbers(path: Path, count: int) -> tuple[int, ...]:
    """The numbers in the name of a shard, as `c.3.0`; negative ones for a file that is none."""
    match = re.fullmatch("c" + r"\.(0|[1-9]\d*)" * count, path.name)
    return tuple(map(int, match.groups())) if match else (-1,) * count


def foreign_files(base: Base) -> tuple[str, ...]:
    """Files in the folder that the format does not know, such as copies of shards that somebody made; sorted paths below it."""
    own = {"zarr.json", base.attributes["index"], layout.SUBJECTS_FILE, layout.REPORT_FILE, layout.WITHDRAWALS_FILE}
    own |= {"voxels/zarr.json", "voxels/c.0", "bold/zarr.json"}
    shards = {f"bold/{dtype}": 3 for dtype in layout.BOLD_TYPES} | {small.name: 2 for small in layout.SMALL_ARRAYS}
    found = []
    for path in base.store.rglob("*"):
        relative = path.relative_to(base.store)
        count, name = shards.get(relative.parent.as_posix(), 0), relative.as_posix()
        known = name in own or (count and (path.name == "zarr.json" or _numbers(path, count)[0] >= 0))
        if not known and not path.is_dir() and relative.parts[0] not in (layout.STAGING, layout.DROPPING):
            found.append(name)
    return tuple(sorted(found))


def _width(array: Path) -> int:
    return int(json.loads((array / "zarr.json").read_bytes())["shape"][-1])
