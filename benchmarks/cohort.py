"""What 50,000 runs cost before the first clip is read: opening, splitting, indexing, ordering, in one rank.

    python benchmarks/cohort.py --folder FOLDER --out benchmarks/results/2026-11-22-cohort.md

The index is fabricated: the lines of a small generated store again and again under new keys, with rows for all of them in
the arrays' metadata and no BOLD. Every rank of a training does all of this by itself.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cohorts import cohort, index_path, read_json, rewrite_index, store
from machine import cpu_seconds, memory, page, parser, prose, table, write_page

from swiftv2.config.data import ClipConfig, SplitConfig
from swiftv2.data.samples.batch import RunTable
from swiftv2.data.samples.clips import check_repetition_times, index_clips, select_runs
from swiftv2.data.samples.order import SampleOrder, rank_positions
from swiftv2.data.samples.splits import split_subjects
from swiftv2.data.store.reader import Store
from swiftv2.files import write_file

SLOW = 2.0
"""Seconds above which a step is marked."""
VOXEL_MM, FRAMES = 6.0, 40
"""The small cohort whose lines are multiplied."""
STATED_FRAMES = 490
"""Frames that the fabricated runs say they have."""
Result = TypeVar("Result")


class Clock:
    """Times steps and notes what memory each added."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.seconds = 0.0

    def __call__(self, what: str, action: Callable[[], Result], *, counted: bool = True) -> Result:
        """Do a step and note it; `counted` ones are part of the sum."""
        before, busy, begun = memory("VmRSS"), cpu_seconds(), time.perf_counter()
        result = action()
        seconds = time.perf_counter() - begun
        if counted:
            self.seconds += seconds
        grown = max(memory("VmRSS") - before, 0) / 2**20
        mark = "SLOW" if seconds > SLOW else ""
        self.rows.append([what, f"{seconds:.3f}", f"{cpu_seconds() - busy:.3f}", f"{grown:.0f}", mark])
        return result


def fabricate(folder: Path, runs: int) -> Path:
    """A store that says that it has `runs` runs, each of a subject of its own."""
    place = folder / f"index-of-{runs}.zarr"
    small = store(cohort(folder, 8, FRAMES, VOXEL_MM), VOXEL_MM)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(small, place)
    lines = [json.loads(line) for line in index_path(small).read_text(encoding="utf-8").splitlines()]
    subjects = read_json(small / "subjects.json")
    table_rows = {row["subject"]: row for row in subjects["labels"]}
    known = [subjects["subjects"][line["subject"]] for line in lines]
    made, people, labels = [], {}, []
    for row in range(runs):
        line, origin = dict(lines[row % len(lines)]), known[row % len(lines)]
        key = f"{row:016x}"
        if line["subject"] in table_rows:
            labels.append({**table_rows[line["subject"]], "subject": key})
        people[key] = {**origin, "id": f"{row:07d}"}
        line |= {"key": f"run-{key}", "subject": key, "row": row, "frames": STATED_FRAMES}
        made.append(line)
    rewrite_index(place, made)
    write_file(place / "subjects.json", json.dumps({**subjects, "subjects": people, "labels": labels}).encode(), 0o600)
    for metadata in place.rglob("zarr.json"):
        content = read_json(metadata)
        if content["node_type"] == "array" and len(content["shape"]) > 1:
            content["shape"][0] = runs
            write_file(metadata, json.dumps(content).encode())
    return place


def families(opened: Store) -> dict[str, str]:
    """Family of every subject, as the pretraining recipe finds it."""
    pairs: Any = zip(opened.runs, opened.labels(), strict=True)
    return {run.subject: f"{run.cohort}/{row['family_id']}" for run, row in pairs if row.get("family_id")}


def measure(path: Path, options: argparse.Namespace) -> Iterator[str]:
    """Lines: every step from the folder to the positions of a step."""
    clock, before = Clock(), memory("VmRSS")
    opened = clock("open the store", lambda: Store.open(path))
    found = clock("read labels and families", lambda: families(opened))
    subjects = clock("sort the subjects", lambda: opened.subject_keys)
    parts = clock("split subjects by seed", lambda: split_subjects(SplitConfig(), subjects, families=found))
    chosen = clock("choose the training runs", lambda: select_runs(opened.runs, parts.train))
    clock("check repetition times", lambda: check_repetition_times([opened.runs[i].tr for i in chosen], allow_mixed=False))
    clips = clock("index the clips", lambda: index_clips(opened.runs, ClipConfig(), chosen))
    runs = clock("table of the runs", lambda: RunTable(opened.runs))
    order = SampleOrder(0, len(clips))
    clock("order of the first epoch", lambda: order.clips_at(np.array([0])))
    batch = options.world * options.micro_batch
    rank = options.world - 1
    positions = clock(
        "positions of a step", lambda: next(rank_positions(batch, options.micro_batch, 1, rank, options.world)), counted=False
    )
    clock("clips of a step", lambda: order.clips_at(positions), counted=False)
    clock("order of the next epoch, at its first step", lambda: order.clips_at(np.array([len(clips)])), counted=False)
    grown = memory("VmRSS") - before
    size = index_path(path).stat().st_size
    yield from prose(
        f"{len(opened):,} runs of {STATED_FRAMES} frames ({len(runs.subject_keys):,} subjects, {len(clips):,} training clips "
        f"of {clips.frames} frames); the index is {size / 1e6:.0f} MB. One rank of {options.world}, micro-batch "
        f"{options.micro_batch}."
    )
    yield from table(["step", "seconds", "CPU seconds", "MiB added", f"over {SLOW:.0f} s"], clock.rows)
    yield from prose(
        f"Up to the first step: {clock.seconds:.1f} s and {grown / 2**20:.0f} MiB a rank; the process held "
        f"{memory('VmHWM') / 2**20:.0f} MiB at most, of which {before / 2**20:.0f} MiB are Python and libraries. Four ranks "
        f"of a node hold {4 * grown / 2**20:.0f} MiB of it. Order of an epoch: "
        f"{np.dtype(np.int64).itemsize * len(clips) / 2**20:.0f} MiB, two epochs at most."
    )


def main() -> None:
    """Fabricate, measure, print."""
    made = parser(__doc__)
    made.add_argument("--runs", type=int, default=50_000, help="runs of the index")
    made.add_argument("--world", type=int, default=256, help="ranks of the training")
    made.add_argument("--micro-batch", type=int, default=4, help="clips of a rank's batch")
    options = made.parse_args()
    path = fabricate(options.folder, options.runs)
    title = f"{options.runs:,} runs in one rank"
    write_page(page(title, ("numpy", "torch"), measure(path, options)), options.out)


if __name__ == "__main__":
    main()
