"""Commands that look into a store."""

import argparse
from pathlib import Path
from typing import Any

from swiftv2.terminal import Shown, add_command, add_json, answer, table

FAILED = 1
COUNTS = ("subjects", "runs", "frames", "hours", "resampled", "cleaned", "confounds")
KINDS = {"TR (s)": "tr", "space": "spaces", "numbers": "dtypes", "brain by": "brain_rules", "axes of the files": "orientations"}


def add(verbs: Any) -> None:
    """The verbs of `store` that look into one."""
    text = "tell cohorts, runs, frames, hours, repetition times, bytes."
    parser = add_command(verbs, "info", _store_info, text, ["swiftv2 store info cohort.zarr"])
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")
    text = "read every chunk and check it. Exit status 1 where anything is damaged; each problem is named by run key."
    parser = add_command(verbs, "verify", _store_verify, text, ["swiftv2 store verify cohort.zarr"])
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")


def _store_info(arguments: argparse.Namespace) -> int:
    from swiftv2.data.verify import info

    values = info(arguments.store)
    grid, generated = values["grid"], ", generated data" if values["generated"] else ""
    shape, edges = " x ".join(map(str, grid["shape"])), " x ".join(f"{x:g}" for x in grid["voxel_mm"])
    disk = f"{values['files']} files, {values['bytes'] / 1e6:.1f} MB; {values['withdrawn']} runs withdrawn"
    place = f"{grid['orientation']}, {grid['space']}; {values['voxels']:,} voxels kept"
    head = [
        f"{arguments.store}: format {values['format']}, version {values['version']}{generated}; {disk}",
        f"grid {grid['kind']}: {shape} voxels of {edges} mm, {place}\n",
    ]
    groups = values["cohorts"] | ({"all": values} if len(values["cohorts"]) > 1 else {})
    facts = [(name.replace("_", " "), [f"{group[name]:,}" for group in groups.values()]) for name in COUNTS]
    facts += [(title, [_counts(group[name]) for group in groups.values()]) for title, name in KINDS.items()]
    rows = [[title, *cells] for title, cells in facts]
    answer(values, *head, table(["cohort", *groups], rows), as_json=arguments.json)
    return 0


def _counts(values: dict[str, int]) -> str:
    return ", ".join(values) if len(values) == 1 else ", ".join(f"{key} ({count})" for key, count in values.items())


def _store_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.data.verify import verify

    with Shown("runs") as shown:
        report = verify(arguments.store, shown.update)
    values = {"ok": report.ok, "runs": report.runs, "bytes": report.bytes, "bad": [list(pair) for pair in report.bad]}
    head = f"{arguments.store}: {report.runs} runs, {report.bytes / 1e6:.1f} MB read, {len(report.bad)} problems"
    answer(values, head, *(f"{key}: {problem}" for key, problem in report.bad), as_json=arguments.json)
    return 0 if report.ok else FAILED
