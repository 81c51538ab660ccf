"""Commands that look into a store."""

import argparse
from pathlib import Path
from typing import Any

from swiftv2.commands.ranks import communicator
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import Shown, add_command, add_json, answer, table

FAILED = 1
COUNTS = {
    "subjects": "subjects",
    "sessions": "sessions",
    "runs": "runs",
    "withdrawn runs": "withdrawn",
    "runs without labels": "unlabelled",
    "frames": "frames",
    "hours": "hours",
    "MB of frames": "bytes",
    "runs resampled": "resampled",
    "runs cleaned": "cleaned",
    "runs with confounds": "confounds",
    "frames censored": "censored",
    "mean displacement (mm)": "framewise_displacement",
}
KINDS = {"TR (s)": "tr", "space": "spaces", "numbers": "dtypes", "brain by": "brain_rules", "axes of the files": "orientations"}


def add(verbs: Any) -> None:
    """The verbs of `store` that look into one."""
    text = "tell cohorts, runs, frames, hours, repetition times, motion, bytes; with --plot draw quality sheets."
    examples = ("swiftv2 store info cohort.zarr", "swiftv2 store info cohort.zarr --plot quality")
    parser = add_command(verbs, "info", _store_info, text, examples)
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")
    text = "folder that takes quality.pdf and quality.csv: sheets of each cohort and, of generated data, of each run"
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help=text)
    text = "draw the runs of real subjects one by one too; brains are personal data, so the files are then for you alone"
    parser.add_argument("--individuals", action="store_true", help=text)
    text = (
        "read every chunk and check it. Under mpirun or srun the ranks share the runs. Exit status 1 where anything is "
        "damaged or does not belong there; each problem is named by run key. Files of ids that you may not read are noted, and "
        "are no problem."
    )
    examples = ("swiftv2 store verify cohort.zarr", "mpirun -n 16 swiftv2 store verify cohort.zarr")
    parser = add_command(verbs, "verify", _store_verify, text, examples)
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")
    text = "processes on this machine; by default one a core, but fewer where starting them would take longer"
    parser.add_argument("--workers", type=int, metavar="N", help=text)


def _store_info(arguments: argparse.Namespace) -> int:
    if arguments.individuals and arguments.plot is None:
        raise UsageError("--individuals goes with --plot FOLDER")
    from swiftv2.data.store.contents import info

    values = info(arguments.store)
    grid, generated = values["grid"], ", generated data" if values["generated"] else ""
    shape, edges = " x ".join(map(str, grid["shape"])), " x ".join(f"{x:g}" for x in grid["voxel_mm"])
    disk = f"{values['files']} files, {values['bytes'] / 1e6:.1f} MB, {values['files_per_run']:.2f} files a run"
    place = f"{grid['orientation']}, {grid['space']}; {values['voxels']:,} voxels kept"
    head = [
        f"{arguments.store}: format {values['format']}, version {values['version']}{generated}; {disk}",
        f"grid {grid['kind']}: {shape} voxels of {edges} mm, {place}\n",
    ]
    changes = [f"version {one['version']}: {one['change']}, {one['runs']} runs" for one in values["history"]]
    head[1:1] = changes if len(changes) > 1 else []
    if values["unfinished"]:
        head.insert(1, f"{values['unfinished']} unfinished: give the same `swiftv2 store {values['unfinished']}` again")
    groups = values["cohorts"] | ({"all": values} if len(values["cohorts"]) > 1 else {})
    facts = [(title, [_number(name, group[name]) for group in groups.values()]) for title, name in COUNTS.items()]
    facts += [(title, [_counts(group[name]) for group in groups.values()]) for title, name in KINDS.items()]
    rows = [[title, *cells] for title, cells in facts]
    tail = [] if arguments.plot is None else _plot(arguments, values)
    answer(values, *head, table(["cohort", *groups], rows), *tail, as_json=arguments.json)
    return 0


def _plot(arguments: argparse.Namespace, values: dict[str, Any]) -> list[str]:
    from swiftv2.recipes.sheets import draw_sheets

    with Shown("runs") as shown:
        drawn = draw_sheets(arguments.store, arguments.plot, individuals=arguments.individuals, progress=shown.update)
    values["sheets"] = {"pdf": str(drawn.pdf), "csv": str(drawn.csv), "pages": drawn.pages, "individuals": drawn.individuals}
    values["outliers"] = [{"run": key, "measure": measure, "z": z} for key, measure, z in drawn.outliers]
    lines = [f"\n{drawn.pdf}: {drawn.pages} pages; {drawn.csv}: a line a run"]
    if not drawn.individuals:
        lines.append("no pages of single runs: the data are not generated (--individuals draws them, for you alone)")
    return lines + [f"outlier {key}: {measure} (robust z {z:+.1f})" for key, measure, z in drawn.outliers]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "not readable" if name == "unlabelled" else "not known"
    if name == "censored":
        return f"{value:.1%}"
    if name == "bytes":
        return f"{value / 1e6:,.1f}"
    return f"{value:.3f}" if name == "framewise_displacement" else f"{value:,}"


def _counts(values: dict[str, int]) -> str:
    return ", ".join(values) if len(values) == 1 else ", ".join(f"{key} ({count})" for key, count in values.items())


def _store_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.data.store.verify import verify

    ranks = communicator("store verify")
    with Shown("runs", shown=ranks.rank == 0) as shown:
        try:
            report = verify(arguments.store, shown.update, workers=arguments.workers, comm=ranks)
        except SwiftError as error:
            if ranks.rank:  # It is the same on all ranks: the first one says it.
                return error.exit_status
            raise
    if ranks.rank == 0:
        values = {"ok": report.ok, "runs": report.runs, "bytes": report.bytes, "bad": [list(pair) for pair in report.bad]}
        values["notes"] = list(report.notes)
        head = f"{arguments.store}: {report.runs} runs, {report.bytes / 1e6:.1f} MB read, {len(report.bad)} problems"
        lines = [*(f"{key}: {problem}" for key, problem in report.bad), *(f"note: {note}" for note in report.notes)]
        answer(values, head, *lines, as_json=arguments.json)
    return 0 if report.ok else FAILED
