"""Verbs of `sweep` on ladders: what they cost before they run, and the table of what has finished."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.ladder import LadderConfig, is_ladder, load_ladder
from swiftv2.config.sweep import SweepConfig, load_sweep
from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, add_json, answer, table, warn

if TYPE_CHECKING:
    from rich.table import Table

    from swiftv2.recipes.ladder import LadderPlan, Line

LADDER = "YAML file of the ladder, such as scaling/ladders/family.yaml"
_TITLES = (
    "element",
    "parameters",
    "tokens",
    "brain tokens",
    "epochs",
    "steps",
    "FLOPs",
    "own FLOPs",
    "rate",
    "hours",
    "node-h",
)


def add(verbs: Any) -> None:
    """The verbs `plan` and `collect`."""
    text = (
        "tell what the elements of a ladder hold and cost before anything is queued. It tells parameters, tokens, steps, FLOPs "
        "by stages, epochs, node-hours, and what these rest on (docs/ladders.md)."
    )
    examples = (
        "swiftv2 sweep plan scaling/ladders/family.yaml data.store=$SCRATCH/cohort.zarr",
        "swiftv2 sweep plan scaling/ladders/family.yaml --gpu a100-80 --mfu 0.2",
        "swiftv2 sweep plan scaling/ladders/tiny_mup.yaml data.store=tiny/cohort.zarr --flops-per-second 2e10 --json",
    )
    parser = add_command(verbs, "plan", _plan, text, examples)
    add_json(parser)
    parser.add_argument("file", type=Path, help=LADDER)
    words = "words that change single settings of all elements, such as data.store=PATH"
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=words)
    add_pace(parser)
    text = (
        "write one tidy table of the finished runs of a ladder or a sweep, for `sweep fit`. It is written as table.csv and "
        "table.json; runs that are not finished are named with the reason."
    )
    lines = [
        "swiftv2 sweep collect scaling/ladders/family.yaml --out laws/family",
        "swiftv2 sweep collect scaling/ladders/transfer.yaml --out tables/mup --where parametrisation=mup",
    ]
    parser = add_command(verbs, "collect", _collect, text, lines)
    add_json(parser)
    parser.add_argument("file", type=Path, help=f"{LADDER}, or of a sweep")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the table is written")
    parser.add_argument(
        "--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help="take only rows that hold these values"
    )


def add_pace(parser: argparse.ArgumentParser) -> None:
    """Options that tell how fast elements go, for verbs that tell what a ladder costs."""
    parser.add_argument("--gpu", metavar="NAME", help="plan for this GPU: a100-40, a100-80, h200, mi250x-gcd or max1550-tile")
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="share of the GPU's peak that passes reach; 0.35 is assumed")
    parser.add_argument(
        "--flops-per-second", type=float, metavar="X", help="what a node does of the models' own products, as measured"
    )


def open_ladder(path: Path, words: Sequence[str], arguments: argparse.Namespace) -> "tuple[LadderConfig, LadderPlan]":
    """A ladder with the plan of its elements.

    Args:
        path: its file.
        words: `section.key=value` words for all elements.
        arguments: what was parsed by `add_pace`.

    Raises:
        UsageError: the ladder, a word or a number is wrong.
    """
    from swiftv2.plan.run import MFU
    from swiftv2.recipes.ladder import Pace, plan_ladder

    ladder = load_ladder(path)
    mfu = MFU if arguments.mfu is None else arguments.mfu
    made = plan_ladder(ladder, words, Pace(arguments.flops_per_second, arguments.gpu, mfu))
    for line in made.warnings:
        warn(line)
    return ladder, made


def read_sweep(path: Path) -> SweepConfig:
    """A sweep, or the outline of a ladder: names, folders and order of its elements, without their settings."""
    return load_ladder(path).outline() if is_ladder(path) else load_sweep(path)


def cost(plan: "LadderPlan") -> dict[str, Any]:
    """What the elements that are not finished cost, as plain values."""
    left = [line for line in plan.lines if not line.done]
    return {
        "elements": len(plan.lines),
        "left": len(left),
        "own_flops": sum(line.own_flops for line in left),
        "node_hours": plan.node_hours,
        "basis": sorted({line.basis for line in left if line.basis is not None}),
    }


def cost_line(plan: "LadderPlan") -> str:
    """The same in one line."""
    told = cost(plan)
    of = f"{told['left']} of {told['elements']} elements are left: {told['own_flops']:.3g} FLOPs"
    if told["node_hours"] is None:
        return f"{of}; hours are not known: give --gpu or --flops-per-second, or let one element finish"
    rest = "; evaluation, saves, loading and waiting not counted"
    return f"{of}, {_hours(told['node_hours'])} node-hours by {', and by '.join(told['basis']) or 'nothing'}{rest}"


def _plan(arguments: argparse.Namespace) -> int:
    if not is_ladder(arguments.file):
        raise UsageError(f"{arguments.file} is a plain sweep: a ladder has sizes and budgets (docs/ladders.md)")
    ladder, made = open_ladder(arguments.file, arguments.overrides, arguments)
    values = {
        "ladder": str(arguments.file),
        "folder": str(ladder.folder),
        "window": made.window,
        "elements": [asdict(line) for line in made.lines],
        "cost": cost(made),
        "warnings": list(made.warnings),
    }
    voxels = f"\nVoxels of a clip: {made.window}. Tokens and FLOPs are of training from its very beginning; own FLOPs, hours"
    text = f"{voxels} and node-hours are what the element does itself."
    answer(values, _shown(made.lines), text, cost_line(made), as_json=arguments.json)
    return 0


def _shown(lines: "Sequence[Line]") -> "Table":
    rows = []
    for line in lines:
        brain = "-" if line.brain_tokens is None else f"{line.brain_tokens:.3g}"
        epochs = "-" if line.epochs is None else f"{line.epochs:.2f}"
        own = f"{line.own_steps:,} of {line.steps:,}" if line.own_steps != line.steps else f"{line.steps:,}"
        costs = [f"{line.flops:.3g}", f"{line.own_flops:.3g}", f"{line.learning_rate:g}", _hours(line.hours)]
        name = f"{line.name} (done)" if line.done else line.name
        rows.append([name, f"{line.parameters:,}", f"{line.tokens:.3g}", brain, epochs, own, *costs, _hours(line.node_hours)])
    return table(_TITLES, rows)


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        column, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--where {word}: write it as COLUMN=VALUE, such as parametrisation=mup")
        pairs[column] = value
    return pairs


def _collect(arguments: argparse.Namespace) -> int:
    from swiftv2.recipes.collect import collect, write_table

    trunks: set[str] = set()
    if is_ladder(arguments.file):
        ladder = load_ladder(arguments.file)
        sweep, trunks = ladder.outline(), ladder.trunks()
    else:
        sweep = load_sweep(arguments.file)
    made = collect(sweep, trunks, _pairs(arguments.where))
    for line in made.warnings:
        warn(line)
    paths = write_table(made, arguments.out, str(arguments.file))
    values = {
        "table": str(paths[0]),
        "json": str(paths[1]),
        "rows": len(made.rows),
        "left_out": dict(made.left_out),
        "warnings": list(made.warnings),
    }
    said = [f"{paths[0]}: {len(made.rows)} finished runs; the same in {paths[1]}"]
    said += [f"left out: {name} ({why})" for name, why in made.left_out.items()]
    answer(values, *said, as_json=arguments.json)
    return 0
