"""Opening a downstream task: its runs, who is judged, what is known of them, the split, and the clips of each part."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.task import TargetConfig, TaskConfig
from swiftv2.data.labels import RunName
from swiftv2.data.samples.batch import RunTable
from swiftv2.data.samples.clips import ClipIndex, check_repetition_times, index_clips, select_runs, spread_clips
from swiftv2.data.samples.events import frame_labels, label_clips, read_events
from swiftv2.data.samples.folds import Unit, check_leak, split_units
from swiftv2.data.samples.patience import Absence
from swiftv2.data.samples.splits import Part, Splits
from swiftv2.data.store.reader import Store
from swiftv2.downstream.residuals import residualise
from swiftv2.downstream.targets import Encoded, encode
from swiftv2.engine.place import find_place
from swiftv2.errors import UsageError
from swiftv2.recipes.data import begun, check_cleaned

Floats = NDArray[np.float64]
MOTION = "motion"
"""Covariate that the store knows by itself: a unit's mean framewise displacement in mm."""


@dataclass(frozen=True, eq=False)
class TaskClips:
    """Clips of one part, and what is to be predicted of each.

    Attributes:
        clips: their places in the store.
        truth: (clips, targets) class numbers, or values in the label's units; NaN where missing.
        unit: (clips,) key of whom a prediction is about: a unit of the split, or the clip itself where states are decoded.
        left_out: clips whose data were withdrawn since the run was begun.
    """

    clips: ClipIndex
    truth: Floats
    unit: NDArray[np.str_]
    left_out: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TaskData:
    """An opened task.

    Attributes:
        config: of the task.
        store: as it is now.
        version: of the store that the run was begun on.
        units: what the split divides, by key: subjects, or runs.
        splits: keys of the units of each part.
        encoded: values of each target by its column, aligned with `units`; all missing where labels are of clips.
        labels: every label of each unit, aligned with `units`; None where it has none.
        runs_of: indices of the store's runs of each unit.
        states: label of each volume by run index, where clips have labels of their own.
        begun: clips of each run, by key, when the run directory was begun; None where it was not.
        absence: what this rank says while the store cannot be reached.
    """

    config: TaskConfig
    store: Store
    version: int
    units: tuple[Unit, ...]
    splits: Splits
    encoded: dict[str, Encoded]
    labels: tuple[dict[str, str | None], ...]
    runs_of: dict[str, list[int]]
    states: dict[int, list[str | None]]
    begun: dict[str, int] | None
    absence: Absence

    @cached_property
    def table(self) -> RunTable:
        """What batches say of runs."""
        return RunTable(self.store.runs)

    @cached_property
    def place(self) -> dict[str, int]:
        """Place of each unit in `units`, by its key."""
        return {unit.key: i for i, unit in enumerate(self.units)}

    def classes(self, target: TargetConfig) -> tuple[str, ...]:
        """Classes of a target in order; none for numbers."""
        return self.encoded[target.column].classes

    def judged(self, target: TargetConfig) -> Floats:
        """(units,) values of a target as they are learned and judged, in the label's units; NaN where missing.

        Numbers are without what the task's covariates explain of them, by coefficients of the training units.
        """
        numbers = self.encoded[target.column].numbers
        if target.kind == "classification" or not self.config.covariates:
            return numbers
        train = np.isin([unit.key for unit in self.units], self.splits.train)
        return residualise(numbers, self.covariates, train)

    def values_of(self, clips: TaskClips) -> Floats:
        """(n, targets) truths of the subjects of some clips, each once; of states each clip's own."""
        if self.config.events is not None:
            return clips.truth
        _, first = np.unique(clips.unit, return_index=True)
        return clips.truth[first]

    def together(self, clips: TaskClips) -> dict[str, str]:
        """What intervals draw as a whole, by the key that is judged: relatives; of runs and states those of a subject.

        Where there is one subject only, runs are drawn.
        """
        if self.config.split.unit == "subject" and self.config.events is None:
            return {unit.key: unit.family for unit in self.units if unit.family}
        runs = [self.store.runs[run] for run in clips.clips.run.tolist()]
        alone = len({unit.subject for unit in self.units}) == 1
        return {key: run.key if alone else run.subject for key, run in zip(clips.unit.tolist(), runs, strict=True)}

    def cut(self, part: Part) -> TaskClips:
        """Clips of one part of the split.

        Args:
            part: train, val or test.

        Raises:
            UsageError: the part has no run, or no clip of it has a label.
        """
        owner = {run: key for key in self.splits.part(part) for run in self.runs_of[key]}
        if not owner:
            raise UsageError(f"task {self.config.name}: the part {part} has no runs: check split")
        runs, clip = self.store.runs, self.config.clip
        clips = index_clips(
            runs,
            clip,
            sorted(owner),
            allow_mixed_tr=True,
            censored=lambda run: self.store.censored(run, clip.displacement_mm),
            counts=self.begun,
        )
        if self.config.clips_per_run is not None:
            clips = choose(clips, _spread(clips.run, self.config.clips_per_run))
        if self.config.events is None:
            place = np.array([self.place[owner[run]] for run in clips.run.tolist()])
            truth = np.stack([self.judged(target)[place] for target in self.config.targets], axis=1)
            # Whoever is in a part had a label when the run began; the clips of those who withdrew since keep their numbers.
            unit = np.array([owner[run] for run in clips.run.tolist()])
        else:
            kept, labels = label_clips(clips, runs, self.states, self.config.events.purity)
            clips = choose(clips, kept)
            unit = np.array([f"{runs[r].key}@{s}" for r, s in zip(clips.run.tolist(), clips.start.tolist(), strict=True)])
            truth = encode_as(self.encoded[self.config.targets[0].column], labels)[:, None]
            known = np.flatnonzero(~np.isnan(truth[:, 0]))
            clips, truth, unit = choose(clips, known), truth[known], unit[known]
        if not len(clips):
            raise UsageError(f"task {self.config.name}: no clip of the part {part} has a label: check targets and split")
        gone = tuple(i for i, run in enumerate(clips.run.tolist()) if runs[run].withdrawn)
        return TaskClips(clips, truth, unit, gone)

    def counts(self) -> dict[str, int]:
        """Clips of each run of the split before any are left out, by key."""
        chosen = [run for part in ("train", "val", "test") for key in self._part(part) for run in self.runs_of[key]]
        clips = index_clips(
            self.store.runs,
            self.config.clip,
            chosen,
            allow_mixed_tr=True,
            censored=lambda run: self.store.censored(run, self.config.clip.displacement_mm),
        )
        runs, counts = np.unique(clips.run, return_counts=True)
        return {self.store.runs[run].key: int(count) for run, count in zip(runs, counts, strict=True)}

    def _part(self, part: str) -> tuple[str, ...]:
        parts: dict[str, tuple[str, ...]] = dataclasses.asdict(self.splits)
        return parts[part]

    @cached_property
    def covariates(self) -> Floats:
        """(units, columns) of `config.covariates`: numbers, and an indicator for each name but the first.

        A missing number is the mean of the training units; of a missing name all indicators are 0.

        Raises:
            UsageError: the labels have no such column, or no training unit a value.
        """
        train = [self.place[key] for key in self.splits.train]
        columns = [column for term in self.config.covariates for column in self._covariate(term, train)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.units), 0))

    def _covariate(self, term: str, train: list[int]) -> list[Floats]:
        """Columns of one term: a name, or C(name) for numbers that stand for names, such as codes of sites."""
        name = term[2:-1] if term.startswith("C(") and term.endswith(")") else term
        if name == MOTION and not any(MOTION in row for row in self.labels):
            return [_filled(np.array([self._displacement(unit.key) for unit in self.units]), train, name)]
        values = [row.get(name) for row in self.labels]
        if CONFLICT in values:
            raise UsageError(
                f"task.covariates: {name} differs between a subject's runs: choose task.sessions or task.scan_tasks"
            )
        known = [v for v in (values[i] for i in train) if v is not None]
        if not known:
            raise UsageError(f"task.covariates: no training subject has a value of {name!r}; check the store's label tables")
        if name == term and all(_number(v) is not None for v in known):
            numbers = [None if v is None else _number(v) for v in values]
            wrong = sum(v is not None and n is None for v, n in zip(values, numbers, strict=True))
            if wrong:
                raise UsageError(
                    f"task.covariates: {name} has numbers and {wrong} values that are none: mend it, or say C({name})"
                )
            return [_filled(np.array([np.nan if n is None else n for n in numbers]), train, name)]
        return [np.array([float(v == one) for v in values]) for one in sorted(set(known))[1:]]

    def _displacement(self, key: str) -> float:
        """Mean framewise displacement of a unit's runs in mm; NaN where confounds tell of none."""
        found = [self.store.frame_values("framewise_displacement", run) for run in self.runs_of[key]]
        known = [float(np.nanmean(one)) for one in found if one is not None and not np.isnan(one).all()]
        return float(np.mean(known)) if known else np.nan

    def signature(self) -> tuple[Any, ...]:
        """What must be the same on all ranks for them to see the same samples and labels."""
        numbers = b"".join(one.numbers.tobytes() for one in self.encoded.values())
        words = repr((dataclasses.astuple(self.splits), self.states)).encode()
        digest = hashlib.sha256(numbers + words).hexdigest()
        return self.store.attributes["store_id"], self.store.version, self.store.fingerprint, digest

    def facts(self) -> dict[str, Any]:
        """What events and results tell of the data: numbers, no keys."""
        return {
            "store": self.store.attributes["store_id"],
            "store_version": self.version,
            "subjects": {name: len(keys) for name, keys in dataclasses.asdict(self.splits).items()},
            "tr": dict(Counter(f"{self.store.runs[i].tr:g}" for runs in self.runs_of.values() for i in runs)),
        }


def open_task(config: TaskConfig, run_dir: Path | None = None) -> TaskData:
    """Open a task's store, join labels, and divide.

    Args:
        config: the task.
        run_dir: a fine-tuning run directory; one that was begun keeps the units and parts that it began with.

    Raises:
        SwiftError: the store is missing or damaged, or another one than the run was begun on; a subject in two parts.
        UsageError: labels, repetition times or the split do not fit the configuration.
    """
    store = Store.open(config.data.store)
    former = begun(run_dir, store)
    version = store.version if former is None else int(former["store"]["version"])
    chosen = select_runs(store.runs, store.subject_keys, config.data.cohorts, version)
    runs = [int(i) for i in chosen if _wanted(config, store, int(i))]
    if not runs:
        raise UsageError(f"task {config.name}: no run of {config.data.store} is of these cohorts, sessions and scan tasks")
    check_repetition_times([store.runs[i].tr for i in runs], config.data.allow_mixed_tr or config.clip.target_tr is not None)
    check_cleaned(config.data, store, runs)
    runs_of: dict[str, list[int]] = {}
    for i in runs:
        runs_of.setdefault(store.runs[i].key if config.split.unit == "run" else store.runs[i].subject, []).append(i)
    keys = tuple(sorted(runs_of))
    joined = store.labels()
    rows = tuple(_joined_labels([joined[i] for i in runs_of[key]]) for key in keys)
    states = _states(config, store, runs)
    encoded = {target.column: _encoded(config, target, rows, states) for target in config.targets}
    first = encoded[config.targets[0].column].numbers.tolist()
    units = tuple(
        _unit(config, key, store.runs[runs_of[key][0]], row, number) for key, row, number in zip(keys, rows, first, strict=True)
    )
    if former is None:
        ids = store.subject_ids() if config.split.kind == "file" else None
        splits = split_units(config.split, _present(config, units, encoded), ids)
    else:
        splits = Splits(**{name: tuple(values) for name, values in former["splits"].items()})
    apart = config.split.unit == "subject"
    check_leak(splits, units, subjects=apart, families=apart and config.split.families)
    absence = Absence(f"rank {find_place(os.environ).rank}: store {store.path}")
    counts = None if former is None else former["clips"]
    return TaskData(config, store, version, units, splits, encoded, rows, runs_of, states, counts, absence)


def choose(clips: ClipIndex, places: NDArray[np.int64]) -> ClipIndex:
    """Only these clips of an index, numbered anew."""
    return dataclasses.replace(clips, run=clips.run[places], start=clips.start[places])


def encode_as(known: Encoded, labels: Sequence[str | None]) -> Floats:
    """Class numbers of labels by the classes of an encoding; NaN where a label is none of them."""
    number = {name: float(i) for i, name in enumerate(known.classes)}
    return np.array([number.get(label, np.nan) if label is not None else np.nan for label in labels])


def _wanted(config: TaskConfig, store: Store, run: int) -> bool:
    info = store.runs[run]
    sessions, tasks = config.sessions, config.scan_tasks
    return (sessions is None or info.session in sessions) and (tasks is None or info.task in tasks)


def _joined_labels(rows: list[dict[str, str | None]]) -> dict[str, str | None]:
    """Labels of a unit from those of its runs: a value that differs between them is in conflict, and marked so."""
    joined: dict[str, str | None] = {}
    for row in rows:
        for column, value in row.items():
            known = joined.get(column)
            joined[column] = value if known is None else known if value is None or value == known else CONFLICT
    return joined


CONFLICT = "\0differs between runs"
"""Stands for a label that has several values among the runs of a unit."""


def _encoded(
    config: TaskConfig, target: TargetConfig, rows: Sequence[dict[str, str | None]], states: dict[int, list[str | None]]
) -> Encoded:
    if config.events is not None:
        names = sorted({label for labels in states.values() for label in labels if label is not None})
        shown = encode(target, names)
        return dataclasses.replace(shown, numbers=np.full(len(rows), np.nan))
    if not any(target.column in row for row in rows):
        known = ", ".join(sorted({column for row in rows for column in row})) or "none"
        raise UsageError(f"task {config.name}: the store's labels have no column {target.column!r}; there are: {known}")
    values = [row.get(target.column) for row in rows]
    differing = sum(value == CONFLICT for value in values)
    if differing:
        raise UsageError(
            f"task {config.name}: {target.column} differs between the runs of {differing} subjects: choose task.sessions or "
            "task.scan_tasks, so that each has one value"
        )
    return encode(target, values)


def _unit(config: TaskConfig, key: str, run: Any, row: Mapping[str, str | None], number: float) -> Unit:
    """A unit with what the splitters ask of it; `number` is its first target's, class or value."""
    first = config.targets[0]
    value = None if np.isnan(number) else number if first.kind == "regression" else f"{number:g}"
    family = row.get(config.split.family_column) if config.split.families else None
    site = row.get(config.split.site_column)
    if family == CONFLICT:
        raise UsageError(
            f"task {config.name}: {config.split.family_column} differs between the runs of a subject: mend the labels"
        )
    if site == CONFLICT and config.split.kind == "site":
        raise UsageError(
            f"task {config.name}: {config.split.site_column} differs between the runs of a subject: choose task.sessions, so "
            "that everybody is of one site"
        )
    return Unit(
        key=key,
        subject=run.subject,
        family=f"{run.cohort}/{family}" if family else None,
        site=None if site == CONFLICT else site,
        value=value,
    )


def _present(config: TaskConfig, units: Sequence[Unit], encoded: dict[str, Encoded]) -> list[Unit]:
    """Units that the split divides: those with any label; all where clips have labels."""
    if config.events is not None:
        return list(units)
    missing = np.isnan(np.stack([encoded[target.column].numbers for target in config.targets]))
    return [unit for place, unit in enumerate(units) if not missing[:, place].all()]


def _states(config: TaskConfig, store: Store, runs: list[int]) -> dict[int, list[str | None]]:
    """Label of each volume of each run, where the task decodes states."""
    if config.events is None:
        return {}
    ids = {key: name.partition("/")[2] for name, key in store.subject_ids().items() if "/" in name}
    named = {i: RunName(ids[one.subject], one.session, one.task, one.run) for i, one in enumerate(store.runs) if i in set(runs)}
    events = read_events(config.events.folder, named, {i: store.runs[i].key for i in runs}, config.targets[0].column)
    return {
        run: frame_labels(
            events[run], store.runs[run].frames, store.runs[run].tr, config.events.delay_seconds, config.events.between
        )
        for run in runs
    }


def _spread(run: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Places of at most so many clips of each run, spread evenly over it."""
    kept = [np.flatnonzero(run == one)[spread_clips(run[run == one], most)] for one in np.unique(run)]
    return np.sort(np.concatenate(kept))


def _filled(values: Floats, train: list[int], name: str) -> Floats:
    known = values[train][~np.isnan(values[train])]
    if not len(known):
        raise UsageError(f"task.covariates: no training subject has a value of {name!r}")
    return np.where(np.isnan(values), known.mean(), values)


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None
