"""The command that tells how runs stand: in the queue, in their directories, and what is wrong with them."""

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.cluster import slurm
from swiftv2.cluster.alarms import Alarm
from swiftv2.cluster.standing import GOING, Standing, stand
from swiftv2.cluster.traces import Traces, find_runs, read_traces
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import LOG_WIDTH, add_command, add_json, answer, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WATCH_SECONDS = 10.0
_ALARMS = 10
"""Alarms that are shown; all are in the answer for machines."""
_NONE = "-"
_FOREIGN = "the run belongs to another user, and Slurm is asked for one's own jobs"
_TITLES = ("run", "state", "queue", "step", "loss", "held-out", "clips/s", "MFU", "wait", "left", "saved", "starts", "alarms")
_WORDS = 3
_FIRST_TO_GO = ("wait", "starts", "MFU", "saved", "held-out", "clips/s", "left", "loss", "queue")
"""Columns that are left out where a terminal is too narrow for all, in this order."""
_BETWEEN = 3
"""Blanks between columns."""


def add(nouns: Any) -> None:
    """The command `status`."""
    text = (
        "tell how runs stand. State, queue, step, losses, speed, time left, checkpoints and alarms are read from the run "
        "directories and from Slurm, where there is one; no run notices (docs/status.md)."
    )
    examples = (
        "swiftv2 status runs/first",
        "swiftv2 status sweeps/lr --watch",
        "swiftv2 status runs/* --json",
    )
    parser = add_command(nouns, "status", _status, text, examples)
    add_json(parser)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run directory, or a folder of some")
    waits = f"show it again every so many seconds ({WATCH_SECONDS:g} by default), until Ctrl-C or all runs have ended"
    parser.add_argument("--watch", nargs="?", type=_seconds, const=WATCH_SECONDS, metavar="SECONDS", help=waits)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        # A run directory may have been given behind the option, which takes the next word.
        raise UsageError(f"--watch {text}: give seconds, more than 0, and run directories before the option")
    return value


def _status(arguments: argparse.Namespace) -> int:
    if arguments.watch is None:
        runs = _look(find_runs(arguments.run_dirs))
        answer({"runs": [run.to_dict() for run in runs]}, *_parts(runs), as_json=arguments.json)
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # How a person ends it.
        _watch(arguments.run_dirs, arguments.watch, as_json=arguments.json)
    return 0


def _look(paths: Sequence[Path]) -> list[Standing]:
    """How runs stand; Slurm is asked once for all of them, and only where some run has a job."""
    found = [read_traces(path) for path in paths]
    jobs: dict[str, slurm.Job] = {}
    silent: str | None = None
    own = [traces.job for traces in found if traces.job is not None and _is_own(traces)]
    try:
        jobs = slurm.jobs(own)
    except SwiftError as error:
        silent = str(error)
    now = time.time()
    return [stand(one, jobs.get(one.job or ""), now, silent if _is_own(one) else _FOREIGN) for one in found]


def _is_own(traces: Traces) -> bool:
    try:
        return traces.path.stat().st_uid == os.getuid()
    except FileNotFoundError:  # Queued, not begun.
        return True


def _watch(paths: Sequence[Path], every: float, *, as_json: bool) -> None:
    live = sys.stdout.isatty() and not as_json
    if live:
        _watch_terminal(paths, every)
        return
    while True:
        runs = _look(find_runs(paths))
        answer({"runs": [run.to_dict() for run in runs]}, *map(_line, runs), as_json=as_json)
        if all(run.over for run in runs):
            return
        time.sleep(every)


def _watch_terminal(paths: Sequence[Path], every: float) -> None:
    """Refresh in place; what was shown last stays there."""
    from rich.console import Group
    from rich.live import Live

    runs = _look(find_runs(paths))
    with Live(auto_refresh=False) as live:
        while True:
            stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}, every {every:g} s until all have ended; Ctrl-C ends this"
            live.update(Group(*map(_shown, (*_parts(runs), "", stamp))), refresh=True)
            if all(run.over for run in runs):
                return
            time.sleep(every)
            runs = _look(find_runs(paths))


def _shown(part: "RenderableType") -> "RenderableType":
    """Text as it is: what runs say of themselves may hold square brackets."""
    from rich.text import Text

    return Text(part) if isinstance(part, str) else part


def _parts(runs: Sequence[Standing]) -> list[Any]:
    """A block for one run, a table for several; then the alarms."""
    folder, names = _names(runs)
    if len(runs) == 1:
        shown: list[Any] = _block(runs[0])
    else:
        shown = [_table([[name, *_cells(run)] for name, run in zip(names, runs, strict=True)])]
    alarms = _alarm_lines(runs, names)
    return [*([f"{folder}:"] if folder else []), *shown, *(["", *alarms] if alarms else [])]


def _table(rows: Sequence[Sequence[str]]) -> "Table":
    """As many columns as a terminal has room for: half a number tells nothing."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else LOG_WIDTH
    widths = {title: max(map(len, (title, *cells))) for title, *cells in zip(_TITLES, *rows, strict=True)}
    gone: set[str] = set()
    for title in _FIRST_TO_GO:
        if sum(width + _BETWEEN for name, width in widths.items() if name not in gone) <= room:
            break
        gone.add(title)
    kept = [[cell for title, cell in zip(_TITLES, row, strict=True) if title not in gone] for row in (_TITLES, *rows)]
    return table(kept[0], kept[1:], words=_WORDS - ("queue" in gone))


def _names(runs: Sequence[Standing]) -> tuple[str, list[str]]:
    """The folder that several runs share, and their names below it: whole paths would fill a table."""
    names = [run.run for run in runs]
    try:
        folder = os.path.commonpath([os.path.dirname(name) for name in names]) if len(runs) > 1 else ""  # noqa: PTH120 (as given)
    except ValueError:  # Some paths are absolute, others are not.
        folder = ""
    return folder, [os.path.relpath(name, folder) for name in names] if folder else names


def _alarm_lines(runs: Sequence[Standing], names: Sequence[str]) -> list[str]:
    """The present first, then the newest; those of a kind in one attempt of a run together, and what is true of all once."""
    counts: Counter[tuple[str, str, int | None]] = Counter()
    first: dict[tuple[str, str, int | None], Alarm] = {}
    for run, name in zip(runs, names, strict=True):
        for one in run.alarms:
            same = (name, one.kind if not one.present else one.text, one.attempt)
            counts[same] += 1
            first.setdefault(same, one)
    ranked = sorted(first.items(), key=lambda item: (not item[1].present, item[1].age_seconds or 0.0))
    lines = []
    for same, one in ranked[:_ALARMS]:
        when = f"{_span(one.age_seconds)} ago" if one.age_seconds is not None else "now"
        if one.present and one.age_seconds is not None:
            when = f"for {_span(one.age_seconds)}"
        whose = f"{same[0]}: " if len(runs) > 1 else ""
        more = f" ({counts[same]} times in attempt {one.attempt})" if counts[same] > 1 else ""
        lines.append(f"! {when:>14}  {whose}{one.kind}: {one.text}{more}")
    if len(ranked) > _ALARMS:
        lines.append(f"  and {len(ranked) - _ALARMS} more: see --json")
    return lines


def _cells(run: Standing) -> list[str]:
    saved = _NONE if run.checkpoint is None else f"{run.checkpoint.step} ({_span(run.checkpoint.age_seconds)})"
    left = _span(run.seconds_left) if run.state not in {"finished", "failed"} else _NONE
    return [
        run.state,
        _queue_cell(run),
        _steps(run),
        _number(run.loss, ".4f"),
        _number(run.heldout_best, ".4f"),
        _number(run.clips_per_second, ".1f"),
        _number(run.mfu, ".1%"),
        _number(run.data_wait, ".0%"),
        left,
        saved,
        str(run.attempts),
        str(len(run.alarms)) if run.alarms else "",
    ]


def _queue_cell(run: Standing) -> str:
    if run.job is None:
        return _NONE
    left = f" {_span(run.job.seconds_left)}" if run.job.seconds_left is not None and run.job.state == "RUNNING" else ""
    return f"{run.job.name or run.job.number} {run.job.state or '?'}{left}"


def _steps(run: Standing) -> str:
    if run.step is None:
        return _NONE if run.max_steps is None else f"0/{run.max_steps}"
    share = f" ({run.step / run.max_steps:.0%})" if run.max_steps else ""
    return f"{run.step}/{run.max_steps or '?'}{share}"


def _line(run: Standing) -> str:
    """A run in one line of a log."""
    stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
    facts = [run.state, *([run.why] if run.why else []), f"step {_steps(run)}", f"loss {_number(run.loss, '.4f')}"]
    facts += [f"{_number(run.clips_per_second, '.1f')} clips/s", f"left {_span(run.seconds_left)}"]
    if run.job is not None:
        facts.append(f"job {_queue_cell(run)}")
    if run.alarms:
        newest = run.alarms[0]
        facts.append(f"{len(run.alarms)} alarm{'s' * (len(run.alarms) > 1)}: {newest.kind}: {newest.text}")
    return f"{stamp} {run.run}: {'; '.join(facts)}"


def _block(run: Standing) -> list[str]:
    """All that is known of one run."""
    best = "" if run.heldout_best_step is None else f", best {_number(run.heldout_best, '.4f')} at step {run.heldout_best_step}"
    ranks = "" if run.world_size is None else f", {run.world_size} rank{'s' * (run.world_size > 1)}"
    facts = [
        ("state", f"{run.state}{f': {run.why}' if run.why else ''}"),
        ("queue", _queue(run)),
        ("step", _steps(run)),
        ("loss", f"{_number(run.loss, '.4f')}; held-out {_number(run.heldout_loss, '.4f')}{best}"),
        ("speed", _speed(run)),
        ("left", _left(run)),
        ("attempts", f"{run.attempts}{ranks}; queued again {run.requeues} times"),
        ("lease", _lease(run)),
        ("checkpoint", _checkpoint(run)),
    ]
    return [run.run, *(f"  {name:<11} {text}" for name, text in facts)]


def _speed(run: Standing) -> str:
    clips, step = _number(run.clips_per_second, ".1f"), _number(run.step_seconds, ".2f")
    return f"{clips} clips/s, {step} s a step, MFU {_number(run.mfu, '.1%')}, waiting for data {_number(run.data_wait, '.0%')}"


def _queue(run: Standing) -> str:
    job = run.job
    if job is None:
        return "no Slurm job"
    if job.state is None:
        return f"job {job.number}: not known to Slurm any more, or not asked"
    where = f" on {job.nodes}" if job.nodes else f", {job.node_count} node{'s' * ((job.node_count or 0) > 1)}"
    lasts = job.seconds_left is not None and job.state in GOING
    left = f", {_span(job.seconds_left)} of its limit left" if lasts else ""
    return f"job {job.name}: {job.state}{where}{left}"


def _left(run: Standing) -> str:
    """Time to the end against the time that the allocation lasts."""
    if run.seconds_left is None or run.state == "finished":
        return _NONE
    text = f"{_span(run.seconds_left)} of training"
    limit = run.job.seconds_left if run.job is not None and run.job.state == "RUNNING" else None
    if limit is None:
        return text
    if run.seconds_left <= limit:
        return f"{text}, within the job's limit"
    return f"{text}, {_span(run.seconds_left - limit)} more than the job's limit leaves"


def _lease(run: Standing) -> str:
    if run.holder is None:
        return "free"
    return f"{run.holder}, heartbeat {_span(run.heartbeat_seconds)} ago"


def _checkpoint(run: Standing) -> str:
    one = run.checkpoint
    if one is None:
        return "none"
    since = "" if one.steps_since is None else f", {one.steps_since} steps since"
    whole = "whole" if one.whole else "damaged"
    return (
        f"step {one.step}, {_span(one.age_seconds)} ago, {one.kind or 'unknown kind'}, {one.bytes / 1e9:.2f} GB, {whole}{since}"
    )


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _span(seconds: float | None) -> str:
    return _NONE if seconds is None else str(timedelta(seconds=round(seconds)))
