"""Commands on sweeps: runs that differ in a few settings, as Slurm arrays."""

import argparse
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swiftv2.cluster.book import OTHER_JOB, read_book
from swiftv2.cluster.elements import ElementState, ask_slurm, element_states
from swiftv2.cluster.slurm import Job
from swiftv2.cluster.sweep import Request, Submission, rehearse, submit
from swiftv2.config.sweep import load_sweep
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import add_command, add_json, answer, warn

FILE = "YAML file of the sweep, such as scaling/sweeps/learning_rate_5M.yaml"
_TITLES = ("element", "index", "state", "job", "step", "loss", "why")


def add(verbs: Any) -> None:
    """The verbs of `sweep`."""
    text = (
        "queue the elements of a sweep as Slurm arrays. What is finished, queued or running is passed over, what failed is "
        "queued again; all configurations are checked before anything is queued."
    )
    examples = (
        "swiftv2 sweep submit scaling/sweeps/learning_rate_5M.yaml data.store=$SCRATCH/cohort.zarr --dry-run",
        "swiftv2 sweep submit scaling/sweeps/learning_rate_5M.yaml data.store=$SCRATCH/cohort.zarr",
        "swiftv2 sweep submit scaling/sweeps/learning_rate_5M.yaml data.store=$SCRATCH/cohort.zarr --failed",
    )
    parser = add_command(verbs, "submit", _submit, text, examples)
    add_json(parser)
    parser.add_argument("file", type=Path, help=FILE)
    words = "words that change single settings of all elements, such as train.max_steps=1000"
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=words)
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME", help="queue these elements alone")
    parser.add_argument("--failed", action="store_true", help="queue only elements that failed")
    parser.add_argument(
        "--after", metavar="JOB", help="start when this Slurm job has ended well, such as one that builds the store"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch commands, and queue nothing")
    text = "show how the elements of a sweep stand: state, job, step, loss."
    parser = add_command(verbs, "status", _status, text, ["swiftv2 sweep status scaling/sweeps/learning_rate_5M.yaml"])
    add_json(parser)
    parser.add_argument("file", type=Path, help=FILE)


def _submit(arguments: argparse.Namespace) -> int:
    # `--only a b train.max_steps=3`: no name has an equals sign in it, so what has one is a setting.
    only = tuple(word for word in arguments.only if "=" not in word)
    words = (*arguments.overrides, *(word for word in arguments.only if "=" in word))
    if arguments.only and not only:
        raise UsageError("--only: give the names of elements")
    sweep = load_sweep(arguments.file)
    request = Request(words=words, only=only, failed=arguments.failed, after=arguments.after)
    done = (rehearse if arguments.dry_run else submit)(sweep, arguments.file.stem, request)
    values = {
        "sweep": str(arguments.file),
        "folder": str(sweep.folder),
        "dry_run": arguments.dry_run,
        "arrays": [
            {
                "job": None if arguments.dry_run else array.job,
                "elements": [
                    {"name": name, "index": index, "job": None if arguments.dry_run else f"{array.job}_{index}"}
                    for name, index in zip(array.names, array.indices, strict=True)
                ],
                "after": dict(array.after),
                "command": list(array.command),
            }
            for array in done.arrays
        ],
        "passed_over": dict(done.passed_over),
    }
    answer(values, *_lines(done, dry_run=arguments.dry_run), as_json=arguments.json)
    return 0


def _lines(done: Submission, *, dry_run: bool) -> list[str]:
    lines = []
    for array in done.arrays:
        waits = [f"job {job}" if name == OTHER_JOB else f"{name} (job {job})" for name, job in array.after.items()]
        behind = f", after {', '.join(waits)}" if waits else ""
        lines.append(f"{'would queue' if dry_run else f'job {array.job}:'} {', '.join(array.names)}{behind}")
        if dry_run:
            lines.append(f"  {shlex.join(array.command)}")
    lines += [f"passed over: {name} ({why})" for name, why in done.passed_over.items()]
    return lines if done.arrays else [*lines, "nothing is left to be queued"]


def _status(arguments: argparse.Namespace) -> int:
    sweep = load_sweep(arguments.file)
    states = element_states(sweep, read_book(sweep.folder), _ask)
    counts = Counter(one.state for one in states)
    values = {
        "sweep": str(arguments.file),
        "folder": str(sweep.folder),
        "counts": dict(counts),
        "elements": [_values(one) for one in states],
    }
    shown = ", ".join(f"{count} {state}" for state, count in counts.items())
    answer(values, *_aligned([_TITLES, *(_row(one) for one in states)]), shown, as_json=arguments.json)
    return 0


def _ask(numbers: list[str]) -> Mapping[str, Job] | None:
    try:
        return ask_slurm(numbers)
    except SwiftError as error:
        warn(f"{error}; states are told by the run directories alone")
        return None


def _values(one: ElementState) -> dict[str, Any]:
    return {**vars(one), "run_dir": str(one.run_dir)}


def _row(one: ElementState) -> tuple[str, ...]:
    step = "-" if one.step is None else f"{one.step} of {one.steps}" if one.steps is not None else str(one.step)
    return (
        one.name,
        "-" if one.index is None else str(one.index),
        one.state,
        one.job or "-",
        step,
        "-" if one.loss is None else f"{one.loss:.4g}",
        one.reason,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, however long its last cell is."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
