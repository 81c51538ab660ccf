"""Commands on sweeps and ladders: runs that differ in a few settings, as Slurm arrays or on this machine."""

import argparse
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from swiftv2.cluster.book import OTHER_JOB, read_book
from swiftv2.cluster.elements import ElementState, ask_slurm, element_states
from swiftv2.cluster.local import Outcome, local_commands, run_here
from swiftv2.cluster.slurm import Job
from swiftv2.cluster.sweep import Request, Submission, rehearse, submit
from swiftv2.commands import sweep_coordinates, sweep_fit, sweep_ladder, sweep_predict, sweep_transfer
from swiftv2.config.ladder import is_ladder
from swiftv2.config.sweep import SweepConfig, load_sweep
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import add_command, add_json, answer, say, warn

FILE = "YAML file of the sweep or ladder, such as scaling/sweeps/learning_rate_5M.yaml"
_TITLES = ("element", "index", "state", "job", "step", "loss", "why")


def add(verbs: Any) -> None:
    """The verbs of `sweep`."""
    text = (
        "queue the elements of a sweep or ladder as Slurm arrays, or run them on this machine. What is finished, queued or "
        "running is passed over, what failed is queued again; all configurations are checked before anything is queued. Of a "
        "ladder the cost is told first."
    )
    examples = (
        "swiftv2 sweep submit scaling/sweeps/learning_rate_5M.yaml data.store=$SCRATCH/cohort.zarr --dry-run",
        "swiftv2 sweep submit scaling/sweeps/learning_rate_5M.yaml data.store=$SCRATCH/cohort.zarr",
        "swiftv2 sweep submit scaling/sweeps/learning_rate_5M.yaml data.store=$SCRATCH/cohort.zarr --failed",
        "swiftv2 sweep submit scaling/ladders/tiny_mup.yaml data.store=tiny/cohort.zarr --local 2",
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
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and queue or run nothing")
    parser.add_argument("--local", type=int, metavar="N", help="run elements on this machine, N at a time, without Slurm")
    parser.add_argument(
        "--at-most-node-hours", type=float, metavar="H", help="refuse a ladder that is planned to take more than this"
    )
    sweep_ladder.add_pace(parser)
    text = "show how the elements of a sweep or ladder stand: state, job, step, loss."
    parser = add_command(verbs, "status", _status, text, ["swiftv2 sweep status scaling/sweeps/learning_rate_5M.yaml"])
    add_json(parser)
    parser.add_argument("file", type=Path, help=FILE)
    for module in (sweep_ladder, sweep_fit, sweep_predict, sweep_transfer, sweep_coordinates):
        module.add(verbs)


def _submit(arguments: argparse.Namespace) -> int:
    # `--only a b train.max_steps=3`: no name has an equals sign in it, so what has one is a setting.
    only = tuple(word for word in arguments.only if "=" not in word)
    words = (*arguments.overrides, *(word for word in arguments.only if "=" in word))
    if arguments.only and not only:
        raise UsageError("--only: give the names of elements")
    sweep, cost = _sweep(arguments, words)
    request = Request(words=words, only=only, failed=arguments.failed, after=arguments.after)
    if arguments.local is not None:
        return _here(sweep, request, arguments, cost)
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
        **cost,
    }
    answer(values, *_lines(done, dry_run=arguments.dry_run), as_json=arguments.json)
    return 0


def _sweep(arguments: argparse.Namespace, words: Sequence[str]) -> tuple[SweepConfig, dict[str, Any]]:
    """The sweep, and of a ladder what it costs, which is told and held against what it may cost."""
    if not is_ladder(arguments.file):
        if arguments.at_most_node_hours is not None:
            raise UsageError("--at-most-node-hours is for ladders, whose cost is planned; a plain sweep's is not")
        return load_sweep(arguments.file), {}
    ladder, made = sweep_ladder.open_ladder(arguments.file, words, arguments)
    sweep = ladder.sweep(made.rungs)
    most = ladder.most_node_hours if arguments.at_most_node_hours is None else arguments.at_most_node_hours
    if most is not None and made.node_hours is None:
        raise UsageError(
            f"whether the ladder takes at most {most:g} node-hours cannot be told: give --gpu or --flops-per-second"
        )
    if most is not None and (made.node_hours or 0.0) > most:
        raise UsageError(
            f"{sweep_ladder.cost_line(made)}: more than the {most:g} node-hours that it may take; take sizes or budgets out, "
            "or raise --at-most-node-hours"
        )
    if not arguments.json:
        say(sweep_ladder.cost_line(made))
    return sweep, {"cost": sweep_ladder.cost(made)}


def _here(sweep: SweepConfig, request: Request, arguments: argparse.Namespace, cost: Mapping[str, Any]) -> int:
    """Run elements on this machine."""
    if arguments.dry_run:
        commands, passed_over = local_commands(sweep, request, _ask)
        values = {"folder": str(sweep.folder), "dry_run": True, "commands": commands, "passed_over": passed_over, **cost}
        lines = [f"would run {name}\n  {shlex.join(words)}" for name, words in commands.items()]
        lines += [f"passed over: {name} ({why})" for name, why in passed_over.items()]
        answer(values, *lines, as_json=arguments.json)
        return 0
    done = run_here(sweep, request, arguments.local, _ask, _stamp)
    values = {"folder": str(sweep.folder), "dry_run": False, **asdict(done), **cost}
    answer(values, *_outcome(done), as_json=arguments.json)
    return done.exit_status


def _stamp(text: str) -> None:
    warn(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}")


def _outcome(done: Outcome) -> list[str]:
    kinds = (("passed over", done.passed_over), ("failed", done.failed), ("stopped", done.stopped))
    lines = [f"{kind}: {name} ({why})" for kind, found in kinds for name, why in found.items()]
    counts = f"{len(done.done)} done, {len(done.failed)} failed, {len(done.stopped)} stopped"
    again = "; the same command goes on" if done.failed or done.stopped else ""
    return [*lines, f"{counts}, {len(done.passed_over)} passed over{again}"]


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
    sweep = sweep_ladder.read_sweep(arguments.file)
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
