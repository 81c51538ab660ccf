"""What trackers cost a step: lines of a real run are logged with none and with all of them, in turn, in one process.

Of a finished run it takes the lines of `metrics.jsonl` and the median time of a step. Each round logs every line to a run
directory without trackers and to one with TensorBoard, Neptune offline and Weights & Biases offline; what training waits is
timed for each line, and the processor time of the trackers' processes is read from the system, since on few cores it is taken
from the ranks.

    python benchmarks/trackers.py --run RUN_DIR --out benchmarks/results/YYYY-MM-DD-trackers.md
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch

from swiftv2.config.load import presets_root, read_yaml
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.tracking import TrackingConfig
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.trackers.desk import DOCUMENT, Trackers
from swiftv2.errors import SwiftError
from swiftv2.files import read_json
from swiftv2.records import METRICS, read_metrics

TARGET = 0.01
ALL = TrackingConfig(neptune="offline", wandb="offline", queue=100_000, close_seconds=120)
NONE = TrackingConfig(tensorboard=False)
PACE = 0.01
"""Seconds between lines: faster than any run logs, so that a round ends soon."""
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Round(NamedTuple):
    """Seconds of one round, each over its lines."""

    without: float
    """The median line takes without trackers."""
    beside: float
    """The median line takes with all of them."""
    longest: float
    """The longest line with them."""
    processors: float
    """Processor time of the trackers' processes a line."""
    start: float
    """Until all are asked to begin, which stands before the first step."""
    close: float
    """Until all have ended, after the last."""


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file to be written instead of the screen")
    arguments = parser.parse_args()
    rows = [
        {key: value for key, value in row.items() if key not in {"step", "attempt", "time"}} | {"step": row["step"]}
        for row in read_metrics(arguments.run / METRICS)
    ]
    step = statistics.median(row["step_seconds"] for row in rows if "step_seconds" in row)
    rounds = [_round(rows) for _ in range(arguments.rounds)]
    machine.write_page(_page(rounds, len(rows), step), arguments.out)


def _round(rows: list[dict[str, Any]]) -> Round:
    with tempfile.TemporaryDirectory() as folder:
        before, _, _, _ = _log(Path(folder) / "none", rows, NONE)
        after, start, close, processors = _log(Path(folder) / "all", rows, ALL)
    return Round(statistics.median(before), statistics.median(after), max(after), processors / len(rows), start, close)


def _log(folder: Path, rows: list[dict[str, Any]], tracking: TrackingConfig) -> tuple[list[float], float, float, float]:
    """Seconds of each line, of beginning and of ending, and the processor time that child processes took."""
    model = read_yaml(presets_root() / "model" / "tiny.yaml")
    values = {"run": {"dir": folder}, "data": {"store": folder}, "clip": {"frames": 4}, "model": model}
    values |= {"mask": {"patch_size": model["patch_size"]}, "train": {"max_steps": 1, "global_batch": 1}}
    config = PretrainConfig.model_validate(values)
    used = sum(os.times()[2:4])
    with RunDirectory.open(folder, "run: {}\n", ALONE) as run:
        began = time.perf_counter()
        trackers = Trackers(tracking, config, run, ALONE)
        start = time.perf_counter() - began
        seconds = []
        for row in rows:
            began = time.perf_counter()
            run.metrics(row["step"], row)
            seconds.append(time.perf_counter() - began)
            time.sleep(PACE)
        began = time.perf_counter()
        trackers.close()
        close = time.perf_counter() - began
    told = read_json(folder / DOCUMENT)["trackers"] if tracking.wanted else {}
    lost = {name: one for name, one in told.items() if one["sent"] != len(rows)}
    if lost:
        raise SwiftError(f"trackers did not take all {len(rows)} lines, so their cost is not known: {lost}")
    return seconds, start, close, sum(os.times()[2:4]) - used


def _page(rounds: list[Round], lines: int, step: float) -> str:
    waits = statistics.median(one.beside - one.without for one in rounds)
    processors = statistics.median(one.processors for one in rounds)
    cores = os.cpu_count() or 1
    text = (
        f"{lines} lines of a run whose median step takes {1000 * step:.0f} ms, logged every {1000 * PACE:.0f} ms; medians over "
        f"{len(rounds)} rounds, lowest to highest in brackets. Processor time holds the imports of the trackers' libraries, "
        "and for Weights & Biases not that of its service, which is no child of ours."
    )
    rows = [
        ("a line without trackers, us", _range([1e6 * one.without for one in rounds])),
        ("a line with all three, us", _range([1e6 * one.beside for one in rounds])),
        ("the longest line with them, us", _range([1e6 * one.longest for one in rounds])),
        ("training waits longer, us a line", _range([1e6 * (one.beside - one.without) for one in rounds])),
        ("processor time of their processes, ms a line", _range([1e3 * one.processors for one in rounds])),
        ("begun in, ms, before the first step", _range([1e3 * one.start for one in rounds])),
        ("ended in, s, after the last", _range([one.close for one in rounds])),
    ]
    share, taken = waits / step, processors / (step * cores)
    verdict = (
        f"With a line every step, training waits {share:.3%} of a step longer: the target is {TARGET:.0%}, "
        f"{'met' if share < TARGET else 'MISSED'}. Their processes take {taken:.2%} of the {cores} cores' time."
    )
    body = [*machine.prose(text), *machine.table(("what", "measured"), rows), *machine.prose(verdict)]
    return machine.page("What trackers cost a step", ("tensorboard", "neptune", "wandb"), body)


def _range(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
