"""Task states: from BIDS events.tsv files to a label of each volume, and of each clip."""

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from swiftv2.data.samples.clips import ClipIndex
from swiftv2.data.samples.sources import RunInfo
from swiftv2.data.samples.tempo import clip_duration
from swiftv2.errors import UsageError

MISSING = {"", "n/a"}


class Named(Protocol):
    """What tells a run apart in BIDS; session, task and run are empty where nothing names them."""

    @property
    def subject(self) -> str:
        """Id without `sub-`."""
        ...

    @property
    def session(self) -> str:
        """Label without `ses-`."""
        ...

    @property
    def task(self) -> str:
        """Label without `task-`."""
        ...

    @property
    def run(self) -> str:
        """Label without `run-`."""
        ...


class Event(NamedTuple):
    """A stretch of time with a label; seconds from the run's first volume."""

    onset: float
    duration: float
    label: str


def read_events(folder: Path, runs: Mapping[int, Named], keys: Mapping[int, str], column: str) -> dict[int, list[Event]]:
    """Events of each run, from the file whose entities are the run's, or of which the run's are more special.

    Of several files that fit, the one that names most entities wins (BIDS' inheritance), wherever in the folder it lies.

    Args:
        folder: of a BIDS data set.
        runs: names of each run, by its index.
        keys: pseudonymous key of each run, for messages.
        column: of the label, such as trial_type; lines of which it is missing are no events.

    Returns:
        By run index, in the order of their onsets.

    Raises:
        UsageError: the folder or a run's file is missing, a column is missing, a value is no number, or events of two labels
            overlap; files are named by their place below the folder without subjects.
    """
    if not folder.is_dir():
        raise UsageError(f"task.events.folder={folder} is no folder: give the BIDS folder that holds *_events.tsv")
    found = {path: _entities(path.name) for path in sorted(folder.rglob("*events.tsv"))}
    if not found:
        raise UsageError(f"task.events.folder={folder} holds no *_events.tsv: give the BIDS folder that does")
    read: dict[Path, list[Event]] = {}
    events: dict[int, list[Event]] = {}
    for index, run in runs.items():
        own = {"sub": run.subject, "ses": run.session, "task": run.task, "run": run.run}
        fitting = [path for path, names in found.items() if _fits(names, own)]
        if not fitting:
            raise UsageError(
                f"task.events.folder: no events.tsv fits run {keys[index]} (subject, session, task and run as in BIDS)"
            )
        most = max(len(found[path]) for path in fitting)
        best = [path for path in fitting if len(found[path]) == most]
        if len(best) > 1:
            raise UsageError(f"task.events.folder: {len(best)} events.tsv fit run {keys[index]} equally: keep one")
        if best[0] not in read:
            read[best[0]] = _read(best[0], f"events of run {keys[index]}", column)
        events[index] = read[best[0]]
    return events


def frame_labels(
    events: Sequence[Event], frames: int, tr: float, delay_seconds: float, between: str | None
) -> list[str | None]:
    """Label of each volume: that of the event in which its middle, less the haemodynamic delay, lies.

    Args:
        events: of the run, not overlapping.
        frames: volumes.
        tr: seconds between them.
        delay_seconds: of the response after the event.
        between: label of volumes in no event; None leaves them without.
    """
    times = (np.arange(frames) + 0.5) * tr - delay_seconds
    labels: list[str | None] = [between] * frames
    for event in events:
        for frame in np.flatnonzero((times >= event.onset) & (times < event.onset + event.duration)).tolist():
            labels[frame] = event.label
    return labels


def label_clips(
    clips: ClipIndex, runs: Sequence[RunInfo], states: Mapping[int, Sequence[str | None]], purity: float
) -> tuple[NDArray[np.int64], list[str]]:
    """Clips of which enough volumes have one label.

    Args:
        clips: of the runs.
        runs: of the store.
        states: label of each volume, by run index.
        purity: share of a clip's volumes that must agree.

    Returns:
        Places of the clips that are kept, ascending, and their labels.
    """
    places, labels = [], []
    for place, (run, start) in enumerate(zip(clips.run.tolist(), clips.start.tolist(), strict=True)):
        covered = list(states[run][start : start + clip_duration(clips.config, runs[run].tr)])
        known = [label for label in covered if label is not None]
        if not known:
            continue
        common = max(sorted(set(known)), key=known.count)
        if known.count(common) >= purity * len(covered) - 1e-9:
            places.append(place)
            labels.append(common)
    return np.array(places, dtype=np.int64), labels


def _entities(name: str) -> dict[str, str]:
    """Entities of a BIDS file name that tell runs apart."""
    return dict(re.findall(r"(?:^|_)(sub|ses|task|run)-([A-Za-z0-9+]+)", name))


def _fits(names: Mapping[str, str], own: Mapping[str, str]) -> bool:
    return all(_same(key, value, own[key]) for key, value in names.items())


def _same(key: str, one: str, other: str) -> bool:
    """Whether two labels are equal; runs are numbers, and 1 is 01."""
    if key == "run" and one.isdigit() and other.isdigit():
        return int(one) == int(other)
    return one == other


def _read(path: Path, what: str, column: str) -> list[Event]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what}: the file cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    rows = list(csv.reader(text.splitlines(), delimiter="\t"))
    header = rows[0] if rows else []
    missing = [name for name in ("onset", "duration", column) if name not in header]
    if missing:
        raise UsageError(f"{what}: no column {missing[0]!r}; there are: {', '.join(header) or 'none'}")
    places = [header.index(name) for name in ("onset", "duration", column)]
    found: list[tuple[Event, int]] = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise UsageError(f"{what}, line {number}: {len(row)} cells where the header has {len(header)}")
        onset, duration, label = (row[place].strip() for place in places)
        if label not in MISSING:
            found.append((_event(onset, duration, label, f"{what}, line {number}"), number))
    found.sort()
    for (before, _), (after, number) in itertools.pairwise(found):
        if before.onset + before.duration > after.onset + 1e-6 and before.label != after.label:
            raise UsageError(f"{what}, line {number}: overlaps an event of another label: a volume can have one only")
    return [event for event, _ in found]


def _event(onset: str, duration: str, label: str, where: str) -> Event:
    try:
        event = Event(float(onset), float(duration), label)
    except ValueError:
        event = Event(np.nan, np.nan, label)
    if not np.isfinite(event[:2]).all() or event.duration < 0:
        raise UsageError(f"{where}: onset {onset!r} and duration {duration!r} must be seconds")
    return event
