"""The feature sets that linear models are given beside every result: which a task can have, and their values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.task import TaskConfig
from swiftv2.data.samples.clips import ClipIndex
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json, sha256
from swiftv2.recipes.embeddings import CARD, read_clips
from swiftv2.recipes.features import (
    FEWEST_FRAMES,
    ClipFeatures,
    Connectivity,
    Singles,
    features_of_runs,
    features_of_units,
    named_regions,
    run_connectivity,
    run_mask,
    run_mean_image,
    run_motion,
)
from swiftv2.recipes.task import TaskData

Floats = NDArray[np.float64]
Tell = Callable[[str, int, int], None]

MAJORITY = "majority"
"""Shares of the classes, or the mean of numbers, over the training subjects: no feature at all."""
COVARIATES = "covariates"
OF_SUBJECTS = (MAJORITY, COVARIATES, "motion", "mask", "mean_image", "connectivity")
OF_CLIPS = (MAJORITY, "motion", "mean_image", "pattern", "connectivity")


@dataclass(frozen=True)
class FeatureOptions:
    """Which feature sets, and how they are measured.

    Attributes:
        methods: names of those that are wanted; all that the task can have when None.
        atlas: of functional connectivity; `none` for none of it.
        radius_mm: of its spheres; the atlas' own when None.
        band: (low, high) in Hz that is kept of regions' signals; all when None.
        embeddings: folders of embeddings by name; `FOLDER#3` takes only what stage 3 says.
        cache: folder that keeps features of runs; None keeps none.
    """

    methods: tuple[str, ...] | None = None
    atlas: str = "seitzman_2018"
    radius_mm: float | None = None
    band: tuple[float, float] | None = None
    embeddings: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of whom predictions are about, each measured once.

    Attributes:
        name: of the baseline.
        kind: what is measured, and how: equal kinds give equal features.
        measure: (keys, D) features of units or clips by their keys, NaN where unknown.
        about: what a reader of results should know of them.
        residual: whether the covariates' share is taken out.
        overlap: what is declared of subjects that an encoder was trained on.
    """

    name: str
    kind: str
    measure: Callable[[Sequence[str]], Floats]
    about: str = ""
    residual: bool = True
    overlap: dict[str, Any] | None = None
    _rows: dict[str, Floats] = field(default_factory=dict)

    def of(self, keys: Sequence[str]) -> Floats:
        """(keys, D)."""
        missing = [key for key in keys if key not in self._rows]
        if missing:
            self._rows.update(zip(missing, self.measure(missing), strict=True))
        return np.stack([self._rows[key] for key in keys])


def feature_sets(data: TaskData, options: FeatureOptions, tell: Tell | None = None) -> tuple[list[FeatureSet], dict[str, str]]:
    """The feature sets that a task can have, and why it cannot have the others.

    Args:
        data: the opened task, of any of its splits.
        options: which are wanted.
        tell: called with what is measured, runs done, and runs in all.

    Raises:
        UsageError: a set that was asked for by name cannot be had, or does not exist.
    """
    possible = OF_SUBJECTS if data.config.events is None else OF_CLIPS
    wanted = options.methods
    for name in wanted or ():
        if name not in possible and name not in options.embeddings:
            raise UsageError(f"--methods: this task has no {name!r}; there are {', '.join([*possible, *options.embeddings])}")
    taken = [name for name in options.embeddings if name in possible]
    if taken:
        raise UsageError(f"--embeddings {taken[0]}=...: that name is of a baseline; choose another")
    sets: list[FeatureSet] = []
    left_out: dict[str, str] = {}
    for name in (*possible, *options.embeddings):
        if wanted is not None and name not in wanted:
            continue
        reason = _missing(name, data, options)
        if reason is None:
            sets.append(_made(name, data, options, tell))
        elif wanted is not None:
            raise UsageError(f"--methods {name}: {reason}")
        else:
            left_out[name] = reason
    return sets, left_out


def _made(name: str, data: TaskData, options: FeatureOptions, tell: Tell | None) -> FeatureSet:
    if name in options.embeddings:
        return _of_embeddings(name, data, options.embeddings[name])
    if name == MAJORITY:
        return FeatureSet(name, name, _nothing)
    if name == COVARIATES:
        # A missing one is filled by the mean of a split's training subjects: `probe` asks the task of each split.
        columns = ", ".join(data.config.covariates)
        return FeatureSet(name, f"{name}: {columns}", _nothing, columns, residual=False)
    return _of_units(name, data, options, tell) if data.config.events is None else _of_clips(name, data, options)


def _nothing(keys: Sequence[str]) -> Floats:
    return np.zeros((len(keys), 0))


def _missing(name: str, data: TaskData, options: FeatureOptions) -> str | None:
    """Why a task cannot have a feature set."""
    runs = [data.store.runs[run] for owned in data.runs_of.values() for run in owned]
    if name == COVARIATES and not data.config.covariates:
        return "the task names no covariates"
    if name == "motion" and not any("framewise_displacement" in run.confounds for run in runs):
        return "the store knows no framewise displacement"
    if name != "connectivity":
        return None
    if options.atlas == "none":
        return "no atlas was given"
    frames = data.config.clip.frames if data.config.events is not None else min(run.frames - run.steady_from for run in runs)
    if frames < FEWEST_FRAMES:
        what = "clips" if data.config.events is not None else "the shortest run"
        return f"{what} of {frames} frames are too short for correlations; {FEWEST_FRAMES} are needed"
    return None


def _connectivity(data: TaskData, options: FeatureOptions) -> Connectivity:
    return Connectivity(named_regions(options.atlas, data.store, options.radius_mm), options.band)


def _about(measure: Connectivity) -> str:
    regions = measure.regions
    lost = f", {regions.left_out} regions lie outside the store's voxels" if regions.left_out else ""
    return f"{measure.name}: {len(regions.members)} regions{lost}"


def _of_units(name: str, data: TaskData, options: FeatureOptions, tell: Tell | None) -> FeatureSet:
    store = data.store
    measures: dict[str, Callable[[int], Singles]] = {
        "motion": lambda run: run_motion(store, run),
        "mask": lambda run: run_mask(store, run),
        "mean_image": lambda run: run_mean_image(store, run),
    }
    kind, about, measure = name, "", measures.get(name)
    if measure is None:
        connectivity = _connectivity(data, options)
        kind, about = connectivity.name, _about(connectivity)
        measure = lambda run: run_connectivity(store, run, connectivity)  # noqa: E731 - one of several of its kind
    one_run = measure

    def of(keys: Sequence[str]) -> Floats:
        runs = [run for key in keys for run in data.runs_of[key]]
        owner = [place for place, key in enumerate(keys) for _ in data.runs_of[key]]
        told = None if tell is None else lambda done, total: tell(name, done, total)
        rows = features_of_runs(store, runs, kind, one_run, options.cache, told)
        return features_of_units(rows, owner, len(keys))

    return FeatureSet(name, kind, of, about)


def _of_clips(name: str, data: TaskData, options: FeatureOptions) -> FeatureSet:
    kind, about, connectivity = name, "", None
    if name == "connectivity":
        connectivity = _connectivity(data, options)
        kind, about = connectivity.name, _about(connectivity)

    def of(keys: Sequence[str]) -> Floats:
        clips = ClipFeatures(data.store, _clips(data, keys))
        measures: dict[str, Callable[[int], Singles]] = {
            "motion": clips.motion,
            "mean_image": clips.mean_image,
            "pattern": clips.pattern,
        }
        if connectivity is None:
            return clips.all(measures[name])
        return clips.all(lambda number: clips.connectivity(number, connectivity))

    return FeatureSet(name, kind, of, about)


def _clips(data: TaskData, keys: Sequence[str]) -> ClipIndex:
    """Clips by their keys `RUN@START`."""
    place = {run.key: number for number, run in enumerate(data.store.runs)}
    parts = [key.rpartition("@") for key in keys]
    config = data.config.clip
    return ClipIndex(
        run=np.array([place[run] for run, _, _ in parts], dtype=np.int64),
        start=np.array([int(start) for _, _, start in parts], dtype=np.int64),
        frames=config.frames,
        stride=config.stride_within,
        config=config,
    )


def _of_embeddings(name: str, data: TaskData, source: str) -> FeatureSet:
    folder, _, stage = source.partition("#")
    found = clip_embeddings(Path(folder), stage or None)
    values = found.values
    about = f"{values.shape[1]} features of {len(values)} clips{f', stage {stage}' if stage else ''}"
    if found.overlap is not None and found.overlap.get("counted"):
        about += f"; {found.overlap['counted']} of {found.overlap['asked']} embedded subjects were seen in pretraining"
    rows: dict[str, list[int]] = {}
    for row, (run, start) in enumerate(zip(found.runs, found.starts, strict=True)):
        rows.setdefault(run if data.config.events is None else f"{run}@{start}", []).append(row)

    def of(keys: Sequence[str]) -> Floats:
        # A run that holds no clip, or none that can be used, leaves its subject to the others.
        own = {key: [run for run in _runs_of(data, key) if run in rows] for key in keys}
        absent = sum(not runs for runs in own.values())
        if absent:
            what = "units" if data.config.events is None else "clips"
            raise SwiftError(
                f"{folder}: has nothing of {absent} of the {len(keys)} {what} of the task: "
                "embed the task's store, and for task states by the task's clips"
            )
        return np.stack([np.mean([values[rows[run]].mean(axis=0) for run in own[key]], axis=0) for key in keys])

    return FeatureSet(name, found.kind, of, about, overlap=found.overlap)


def _runs_of(data: TaskData, key: str) -> list[str]:
    """Keys of a unit's runs; of a clip, its own."""
    return [data.store.runs[run].key for run in data.runs_of[key]] if data.config.events is None else [key]


@dataclass(frozen=True, eq=False)
class ClipEmbeddings:
    """Embeddings of clips.

    Attributes:
        runs: (clips) keys of their runs.
        starts: (clips) their first frames.
        values: (clips, D).
        kind: what the values are.
        overlap: what the folder declares of subjects that the encoder was trained on; None for an untrained one.
    """

    runs: list[str]
    starts: list[int]
    values: Floats
    kind: str
    overlap: dict[str, Any] | None


def clip_embeddings(folder: Path, stage: str | None = None) -> ClipEmbeddings:
    """Embeddings of clips that `swiftv2 embed` has written, as Parquet.

    Args:
        folder: a finished one.
        stage: number of the stage that is wanted; all when None.

    Raises:
        SwiftError: no finished embeddings, other files than Parquet, damaged ones, or no such stage.
    """
    shards = list(read_clips(folder))
    card = read_json(folder / CARD)
    known = [one["stage"] for one in card["stages"]]
    wanted = [one for one in known if stage is None or str(one) == stage]
    if not wanted or not shards:
        raise SwiftError(f"{folder}: has no stage {stage}; stages are {', '.join(map(str, known)) or 'not there'}")
    return ClipEmbeddings(
        runs=[run for shard in shards for run in shard.keys["run"]],
        starts=[int(start) for shard in shards for start in shard.start],
        values=np.concatenate([np.concatenate([shard.stages[one] for one in wanted], axis=1) for shard in shards]).astype(
            np.float64
        ),
        kind=f"embeddings {sha256(folder / CARD)[:16]}, stages {wanted}",
        overlap=card.get("overlap"),
    )


def with_split(config: TaskConfig, index: int) -> TaskConfig:
    """The same task, another of its splits."""
    return config.model_copy(update={"split": config.split.model_copy(update={"index": index})})


def split_count(data: TaskData) -> int:
    """How many splits a task has."""
    split = data.config.split
    if split.kind == "file" or (split.kind == "site" and split.test_sites is not None):
        return 1
    if split.kind == "site":
        known = {key for part in dataclasses.astuple(data.splits) for key in part}
        return len({unit.site for unit in data.units if unit.site and unit.key in known})
    return split.count
