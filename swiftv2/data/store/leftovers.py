"""What should not be in a store: data of withdrawn runs, staging folders, files that the format does not know."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import zarr
from zarr.storage import LocalStore

from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store

_PRIVATE = (layout.SUBJECTS_FILE, layout.REPORT_FILE, layout.WITHDRAWALS_FILE)
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SHOWN = 5


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


def folder_problems(store: Store) -> Iterator[tuple[str, str]]:
    """What the folder holds that it should not: (pseudonymous key of a run, or `store`; what is wrong)."""
    withdrawn = {run.row: run for run in store.runs if run.withdrawn}
    lengths = {dtype: _open(store, f"bold/{dtype}").shards[1] for dtype in {run.dtype for run in store.runs if run.present}}
    shards_of = {(run.dtype, run.row): -(-run.frames // lengths[run.dtype]) for run in store.runs if run.present}
    unknown: dict[str, list[str]] = {}
    staging = set()
    shards = -(-int(_open(store, layout.SMALL_ARRAYS[0].name).shape[0]) // layout.ROWS_PER_SHARD)
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
    yield from _private_problems(store, withdrawn)


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


def _private_problems(store: Store, withdrawn: dict[int, Run]) -> Iterator[tuple[str, str]]:
    """The files of ids: open to others, or naming withdrawn subjects; not looked into by who may not read them."""
    for name in _PRIVATE:
        path = store.path / name
        if path.exists() and path.stat().st_mode & 0o077:
            yield "store", f"{name} holds ids and is open to others: chmod 600"
    present = {run.subject for run in store.runs if run.present}
    gone = {run.subject for run in withdrawn.values()} - present
    with contextlib.suppress(OSError):
        content = (store.path / layout.SUBJECTS_FILE).read_text(encoding="utf-8")
        for run in withdrawn.values():
            if run.subject in gone and f'"{run.subject}"' in content:
                yield run.key, _named(layout.SUBJECTS_FILE)
    with contextlib.suppress(OSError):
        content = (store.path / layout.REPORT_FILE).read_text(encoding="utf-8")
        for run in withdrawn.values():
            if f'"{run.key}"' in content:
                yield run.key, _named(layout.REPORT_FILE)


def _named(name: str) -> str:
    return f"withdrawn, but {name} still tells its subject: give `swiftv2 store drop` again"
