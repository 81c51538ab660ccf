"""Small sources whose stores take milliseconds, and processes that die at the n-th change of the file system."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_files import SPACE, bold_values, save_run

from swiftv2.config.data import GridConfig
from swiftv2.data.changes.append import append
from swiftv2.data.changes.build import build
from swiftv2.data.changes.drop import DropReport, drop, read_withdrawals
from swiftv2.data.changes.publish import BuildReport
from swiftv2.data.store.reader import Store

TINY = (7, 8, 6)
BOX = GridConfig(kind="source", mask="box", space=SPACE)
SALT = "0123456789abcdef"
CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir")


def save_cohort(root: Path, names: Sequence[str], first: int = 0, frames: int = 12, **options: Any) -> Path:
    """A run for each name; the table of ages and one confound table go with them."""
    for number, name in enumerate(names):
        path = save_run(root, name, bold_values(first + number, frames + number, TINY), **options)
    lines = ["participant_id\tage", *(f"sub-{name}\t{20 + first + number}" for number, name in enumerate(names))]
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    rows = ["framewise_displacement\tmotion_outlier00", "n/a\t0"]
    rows += [f"0.{frame + first}\t{int(frame == 4)}" for frame in range(1, frames + len(names) - 1)]
    path.with_name(f"{path.name.split('_space')[0]}_desc-confounds_timeseries.tsv").write_text("\n".join(rows) + "\n")
    return root


def build_tiny(source: Path, store: Path, **options: Any) -> BuildReport:
    """Build with the fixed salt on the first run's grid."""
    return build(source, store, BOX, options.pop("cohort", "one"), salt=SALT, **options)


def append_tiny(source: Path | str, store: Path, **options: Any) -> BuildReport:
    """Append, to cohort `two` unless another is named."""
    return append(source, store, options.pop("cohort", "two"), **options)


def drop_tiny(store: Path, *names: str, **options: Any) -> DropReport:
    """Drop subjects that a list beside the store names."""
    listed = store.with_name("withdrawn.txt")
    listed.write_text("\n".join(["participant_id", *names]) + "\n")
    return drop(store, read_withdrawals(store, listed), **options)


def everything(store: Path) -> dict[str, Any]:
    """All that readers can have of the newest version, by run key."""
    opened = Store.open(store)
    return {
        run.key: [
            opened.read_bold(index, 0, run.frames),
            opened.brain(index),
            opened.voxel_mean(index),
            opened.voxel_std(index),
            opened.frame_values("framewise_displacement", index),
            opened.frame_values("censored", index),
            labels,
        ]
        for index, (run, labels) in enumerate(zip(opened.runs, opened.labels(), strict=True))
        if run.present
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Whether readers have the same of the same runs."""
    assert found.keys() == expected.keys()
    for key, parts in expected.items():
        for one, other in zip(found[key], parts, strict=True):
            np.testing.assert_equal(one, other)


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the code catches."""


@contextlib.contextmanager
def dies_at(change: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Die just before the n-th call that renames, removes or makes a file or folder, in whatever thread."""
    count, lock = 0, threading.Lock()

    def watched(call: Any) -> Any:
        def one(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                if count >= change:  # Nothing more happens: later calls are those of handlers that a kill would not run.
                    raise Killed
            return call(*arguments, **options)

        return one

    with monkeypatch.context() as patched:
        for name in CHANGES:
            patched.setattr(os, name, watched(getattr(os, name)))
        yield
