"""What should not be in a store: data of withdrawn runs, staging folders, unknown files, ids that fit no run."""

import json
import math
import re
from collections.abc import Iterator, Set
from typing import Any

import zarr
from zarr.storage import LocalStore

from swiftv2.data.keys import salt_id, subject_key
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store

_PRIVATE = (layout.SUBJECTS_FILE, layout.REPORT_FILE, layout.WITHDRAWALS_FILE)
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SHOWN = 5
Problem = tuple[str, str]
"""Pseudonymous key of a run, or `store`; what is wrong."""


def index_problems(run: Run, version: int) -> Iterator[str]:
    """What is wrong with a run's line of the index, whatever its data are.

    Args:
        run: the line.
        version: of the store.
    """
    if run.withdrawn:
        computed = (*run.statistics, run.brain_voxels, run.max_error, run.bytes, run.coverage)
        if any(computed) or run.source_sha256 or any(run.source_shape) or any(any(line) for line in run.source_affine):
            yield "withdrawn, but its line of the index holds what its data gave: give `swiftv2 store drop` again"
        return
    numbers = (*run.statistics, run.slope, run.intercept, run.max_error, run.tr, run.coverage)
    if len(run.statistics) != 6 or not all(math.isfinite(number) for number in numbers) or run.slope == 0:
        yield "its statistics in the index are missing or not finite: build the store again"
    if run.frames < 1 or not 0 <= run.steady_from < run.frames or run.tr <= 0:
        yield "its frames or repetition time in the index make no sense: build the store again"
    if run.since > version:
        yield "its line of the index is of a later version than the store"


def folder_problems(store: Store) -> Iterator[Problem]:
    """What the folder holds that it should not: (pseudonymous key of a run, or `store`; what is wrong)."""
    withdrawn = {run.row: run for run in store.runs if run.withdrawn}
    lengths = {dtype: _open(store, f"bold/{dtype}").shards[1] for dtype in {run.dtype for run in store.runs if run.present}}
    shards_of = {(run.dtype, run.row): -(-run.frames // lengths[run.dtype]) for run in store.runs if run.present}
    unknown: dict[str, list[str]] = {}
    staging = set()
    name = layout.SMALL_ARRAYS[0].name
    shards = -(-int(_open(store, name).shape[0]) // layout.rows_of_shard(store.path / name))
    for path in sorted(store.path.rglob("*")):
        relative = path.relative_to(store.path)
        top = relative.parts[0]
        if re.fullmatch(r"\.[a-z]+", top) and (store.path / top).is_dir():
            staging.add(top)
            continue
        shard = re.fullmatch(r"bold/(\w+)/c\.(\d+)\.(\d+)\.0", relative.as_posix())
        if shard is not None and int(shard[2]) in withdrawn:
            text = f"withdrawn, but its data are there ({relative.as_posix()}): give `swiftv2 store drop` again"
            yield withdrawn[int(shard[2])].key, text
        elif not (
            path.is_dir()
            or (shard is not None and int(shard[3]) < shards_of.get((shard[1], int(shard[2])), 0))
            or _known(store, relative.as_posix(), shards)
        ):
            unknown.setdefault(relative.parent.as_posix(), []).append(_SUBJECT.sub("sub-*", relative.name))
    for name in sorted(staging):
        command = "append" if name == layout.STAGING else name[1:]
        yield "store", f"{name}/ is left of a change that was interrupted: give the same `swiftv2 store {command}` again"
    for folder, names in unknown.items():
        shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
        where = "" if folder == "." else f" in {folder}"
        yield "store", f"{len(names)} files{where} are no part of the store ({shown}): move them away"


def _open(store: Store, name: str) -> Any:
    return zarr.open_array(LocalStore(store.path / name, read_only=True), mode="r")


def _known(store: Store, relative: str, shards: int) -> bool:
    """Whether the format has such a file, the bold shards aside."""
    if relative in {
        "zarr.json",
        str(store.attributes.get("index", layout.RUNS_FILE)),
        *_PRIVATE,
        "voxels/zarr.json",
        "voxels/c.0",
    }:
        return True
    if re.fullmatch(rf"bold/(({'|'.join(layout.BOLD_TYPES)})/)?zarr\.json", relative):
        return True
    small = re.fullmatch(rf"({'|'.join(small.name for small in layout.SMALL_ARRAYS)})/(zarr\.json|c\.(\d+)\.\d+)", relative)
    if small is None:
        return False
    return small[3] is None or int(small[3]) < shards


def private_problems(store: Store) -> tuple[list[Problem], list[str]]:
    """What is wrong with the files of ids, and which of them this user may not read: that is no fault of theirs.

    Returns:
        (Pseudonymous key of a run, or `store`; what is wrong), and a line for each file that was not looked into.
    """
    problems: list[Problem] = []
    notes = []
    for name in _PRIVATE:
        path = store.path / name
        try:
            if path.stat().st_mode & 0o077:
                problems.append(("store", f"{name} holds ids and is open to others: chmod 600"))
            content = path.read_bytes()
        except FileNotFoundError:
            if name == layout.SUBJECTS_FILE:  # The others may be removed, or were never needed.
                problems.append(
                    ("store", f"{name} is missing: restore it from a copy, nothing else tells ids, labels and salt")
                )
            continue
        except PermissionError:
            notes.append(f"{name} was not checked: only the store's owner may read it")
            continue
        problems += _still_named(store, name, content)
        found = _subject_problems(store, content) if name == layout.SUBJECTS_FILE else _line_problems(content)
        problems += [("store", f"{name}: {problem}") for problem in found]
    return problems, notes


def _still_named(store: Store, name: str, content: bytes) -> Iterator[Problem]:
    """Withdrawn runs that a file of ids tells of; the list of withdrawals is there to do so."""
    if name == layout.WITHDRAWALS_FILE:
        return
    present = set(store.subject_keys)
    for run in store.runs:
        key = run.key if name == layout.REPORT_FILE else run.subject
        named = run.withdrawn and (name == layout.REPORT_FILE or run.subject not in present)
        if named and f'"{key}"'.encode() in content:
            yield run.key, f"withdrawn, but {name} still tells its subject: give `swiftv2 store drop` again"


def _line_problems(content: bytes) -> Iterator[str]:
    try:
        sound = all(isinstance(json.loads(line), dict) for line in content.splitlines())
    except ValueError:
        sound = False
    if not sound:
        yield "a line of it is no JSON object: restore it from a copy"


def _subject_problems(store: Store, content: bytes) -> Iterator[str]:
    """What in the file of ids is damaged or does not fit the index."""
    try:
        told = json.loads(content)
        salt = str(told["salt"])
        ids = {str(key): (str(one["cohort"]), str(one["id"])) for key, one in told["subjects"].items()}
        labelled = [str(one["subject"]) for one in told["labels"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        yield "no salt, subjects and labels can be read from it: restore it from a copy"
        return
    if salt_id(salt) != store.attributes["salt_id"]:
        yield "its salt is not the one of the store's keys: restore it from a copy"
        return
    present = set(store.subject_keys)
    # Of withdrawn subjects their runs tell; an append that is not finished has its new subjects here already.
    known = present | {run.subject for run in store.runs}
    foreign = set() if layout.unfinished(store.path) == "append" else (ids.keys() | set(labelled)) - known
    yield from _told("have no id in it", present - ids.keys())
    yield from _told("have an id that does not give their key", {key for key in ids if subject_key(salt, *ids[key]) != key})
    yield from _told("are named in it and have no run", foreign)


def _told(what: str, keys: Set[str]) -> Iterator[str]:
    if keys:
        shown = ", ".join(sorted(keys)[:_SHOWN]) + (" ..." if len(keys) > _SHOWN else "")
        yield f"{len(keys)} subjects {what} ({shown}): restore it from a copy"
