"""The command that writes the page of a run, or of several side by side."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from swiftv2.cluster.standing import stand
from swiftv2.cluster.traces import read_traces
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file
from swiftv2.terminal import add_command, add_json, answer

NAME = "report.html"


def add(nouns: Any) -> None:
    """The command `report`."""
    text = (
        "write the page of a run. One HTML file that needs no network: a verdict, held-out losses, reconstructions, curves, "
        "throughput, data, faults and what ran; several runs side by side. Nothing else in the run directory is touched, "
        "and the run may go on (docs/report.md)."
    )
    examples = (
        "swiftv2 report runs/first",
        "swiftv2 report runs/first runs/second --out both.html",
        "swiftv2 report runs/first --share --out for-others.html",
    )
    parser = add_command(nouns, "report", _report, text, examples)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory")
    where = f"the page; RUN_DIR/{NAME} by default, ./{NAME} for several runs"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    hides = "leave out names of hosts and users, and all of paths but their last part"
    parser.add_argument("--share", action="store_true", help=hides)
    add_json(parser)


def _report(arguments: argparse.Namespace) -> int:
    from swiftv2.report.run.page import page
    from swiftv2.report.run.reading import read_run
    from swiftv2.report.run.verdict import verdicts

    began = time.perf_counter()
    paths = list(dict.fromkeys(path.resolve() for path in arguments.run_dirs))
    now = time.time()
    read = [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    runs = [replace(run, standing=_standing(run.path, now)) for run in read]
    out = arguments.out or (paths[0] / NAME if len(paths) == 1 else Path(NAME))
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: give the name of a file")
    content = page(runs, now, share=arguments.share)
    write_file(out, content)
    answers = [{"run": str(run.path), "verdicts": [one.__dict__ for one in verdicts(run)]} for run in runs]
    seconds = time.perf_counter() - began
    lines = [f"{run.name}: {one.question} {one.word}" for run in runs for one in verdicts(run)]
    size = f"{len(content) / 1e6:.1f} MB"
    values = {"page": str(out), "bytes": len(content), "seconds": seconds, "runs": answers}
    answer(values, *lines, f"{out} ({size})", as_json=arguments.json)
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """Names that differ: of the folders, with as many of those above as it takes."""
    names = [path.name or str(path) for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=1) + 1):
        twice = {name for name, count in Counter(names).items() if count > 1}
        names = ["/".join(path.parts[-depth:]) if name in twice else name for path, name in zip(paths, names, strict=True)]
    return names


def _standing(path: Path, now: float) -> dict[str, Any]:
    """How a run stands by its directory alone: Slurm is not asked, since a page is read later; empty where none can tell."""
    try:
        return stand(read_traces(path), None, now, "Slurm was not asked").to_dict()
    except (SwiftError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}
