"""Opening a store for a run: which subjects, which clips, which cohorts; the same again whenever the run goes on."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftv2.config.data import StoreConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batch import RunTable
from swiftv2.data.samples.clips import ClipIndex, check_repetition_times, index_clips, select_runs
from swiftv2.data.samples.mixing import Mixture
from swiftv2.data.samples.order import Exclusion, SampleOrder
from swiftv2.data.samples.patience import Absence
from swiftv2.data.samples.reading import Reading
from swiftv2.data.samples.splits import Splits, split_subjects
from swiftv2.data.store.reader import Store
from swiftv2.engine.place import find_place
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.recipes.datasheet import Part, data_sheet

CONTRACT = "contract.json"
"""What a run directory keeps of its data."""


@dataclass(frozen=True)
class Data:
    """The opened store with the clips of the training and the held-out subjects.

    Attributes:
        store: as it is now.
        version: of the store that the run was begun on; clips are numbered by it.
        splits: subjects of each part.
        train, heldout: their clips, those of runs that were withdrawn since included, so that numbers stay.
        table: what batches say of runs.
        mixture: how cohorts are mixed; None for proportional.
        withdrawn_train, withdrawn_heldout: clips whose data are gone.
        absence: what this rank says while the store cannot be reached.
    """

    store: Store
    version: int
    splits: Splits
    train: ClipIndex
    heldout: ClipIndex
    table: RunTable
    mixture: Mixture | None
    withdrawn_train: tuple[int, ...]
    withdrawn_heldout: tuple[int, ...]
    absence: Absence

    def order(self, seed: int, samples: int, exclusions: Iterable[Sequence[Any]]) -> SampleOrder:
        """The order of training samples of a run that goes on after so many samples.

        What was withdrawn since is excluded from there on.

        Args:
            seed: of the run.
            samples: consumed so far.
            exclusions: clip, position and cause (`unusable` where it is not said) of each, as checkpoints keep them.
        """
        known = [Exclusion(*one) for one in exclusions]
        gone = [Exclusion(clip, samples) for clip in self.withdrawn_train]
        return SampleOrder(seed, len(self.train), [*known, *gone], self.mixture, self.table.cohort[self.train.run])

    def reading(self, config: StoreConfig, device: torch.device) -> Reading:
        """How this rank reads clips, for training and evaluation alike."""
        return Reading(
            threads=config.threads,
            prefetch=config.prefetch,
            prefetch_mb=config.prefetch_mb,
            pin=device.type == "cuda",
            on_bad_clip=config.on_bad_clip,
            table=self.table,
            patience_seconds=config.patience_seconds,
            absence=self.absence,
        )

    def composition(self, order: SampleOrder, epoch: int) -> dict[str, int]:
        """Samples of each cohort in an epoch, by name."""
        counted = order.composition(epoch)
        return {self.table.cohort_names[place]: count for place, count in counted.items()}

    def counts(self) -> dict[str, int]:
        """Clips of each run that was cut into clips, by key."""
        runs, counts = np.unique(np.concatenate([self.train.run, self.heldout.run]), return_counts=True)
        return {self.store.runs[run].key: int(count) for run, count in zip(runs, counts, strict=True)}

    def signature(self) -> tuple[Any, ...]:
        """What must be the same on all ranks for them to see the same samples."""
        arrays = [self.train.run, self.train.start, self.heldout.run, self.heldout.start]
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        return self.store.attributes["store_id"], self.store.version, self.store.fingerprint, digest

    def facts(self) -> dict[str, Any]:
        """What the run's events tell of its data."""
        chosen = sorted(set(self.train.run.tolist()))
        return {
            "store": self.store.attributes["store_id"],
            "store_version": self.version,
            "store_version_now": self.store.version,
            "runs": len(chosen),
            "subjects": {"train": len(self.splits.train), "val": len(self.splits.val), "test": len(self.splits.test)},
            "unassigned_subjects": len(self.splits.unassigned),
            "clips": {"train": len(self.train), "heldout": len(self.heldout)},
            "tr": dict(Counter(f"{self.store.runs[i].tr:g}" for i in chosen)),
            "withdrawn_clips": {"train": len(self.withdrawn_train), "heldout": len(self.withdrawn_heldout)},
            "too_short": list(self.train.too_short + self.heldout.too_short),
        }


def open_data(config: PretrainConfig, run_dir: Path | None = None) -> Data:
    """Open the store and cut it into clips.

    Args:
        config: of the run.
        run_dir: where the run lives; one that was begun gets the subjects and the numbers of clips that it began with,
            whatever was appended to the store or withdrawn from it since.

    Raises:
        SwiftError: the store is missing, unfinished, damaged, or another one than the run was begun on.
        UsageError: grid, repetition times, splits or clips do not fit the configuration.
    """
    store = Store.open(config.data.store)
    if tuple(store.grid.shape) != config.model.image_size:
        raise UsageError(
            f"model.image_size={list(config.model.image_size)} is not the grid of {config.data.store}, "
            f"{list(store.grid.shape)}: set model.image_size or build the store with another grid.voxel_mm"
        )
    former = begun(run_dir, store)
    version = store.version if former is None else int(former["store"]["version"])
    splits = _split(config, store) if former is None else Splits(**{name: tuple(v) for name, v in former["splits"].items()})
    chosen = [
        select_runs(store.runs, subjects, config.data.cohorts, version)
        for subjects in (splits.train, splits.part(config.evaluate.split))
    ]
    for part, runs in zip(("train", config.evaluate.split), chosen, strict=True):
        if not len(runs):
            raise UsageError(f"no run of the store is in the part {part}: check data.split and data.cohorts")
    every = [int(i) for runs in chosen for i in runs]
    together = config.data.allow_mixed_tr or config.clip.target_tr is not None
    check_repetition_times([store.runs[i].tr for i in every], together)
    check_cleaned(config.data, store, every)

    def censored(index: int) -> Any:
        return store.censored(index, config.clip.displacement_mm)

    counts = None if former is None else former["clips"]
    train, heldout = (
        index_clips(store.runs, config.clip, runs, allow_mixed_tr=True, censored=censored, counts=counts, frames=frames)
        for runs, frames in zip(chosen, (config.data.frames_per_run, None), strict=True)
    )
    table = RunTable(store.runs)
    mixture = Mixture.make(config.data.mixing, table.cohort_names, table.cohort[train.run])
    gone = [_withdrawn(store, clips) for clips in (train, heldout)]
    for part, clips, withdrawn in zip(("training", "held-out"), (train, heldout), gone, strict=True):
        if len(withdrawn) == len(clips):
            raise SwiftError(f"{run_dir}: all its {part} subjects were withdrawn since it was begun: begin another run.dir")
    absence = Absence(f"rank {find_place(os.environ).rank}: store {store.path}")
    return Data(store, version, splits, train, heldout, table, mixture, gone[0], gone[1], absence)


def sheet_of(config: PretrainConfig, data: Data) -> dict[str, Any]:
    """The data sheet of a pretraining run."""
    try:
        families = _families(data.store)
    except SwiftError:
        families = {}  # Labels may be out of reach here: then the sheet says that families are not known.
    splits = data.splits
    held = {config.evaluate.split: data.heldout, "train": data.train}
    parts = [Part(name, getattr(splits, name), held.get(name)) for name in ("train", "val", "test")]
    return data_sheet(data.store, parts, families, config.clip)


def begun(run_dir: Path | None, store: Store) -> dict[str, Any] | None:
    """What a run that was begun noted of its data.

    Raises:
        SwiftError: it was begun on another store, or on a version of which this store is no later one.
    """
    if run_dir is None or not (run_dir / CONTRACT).exists():
        return None
    contract: dict[str, Any] = read_json(run_dir / CONTRACT)
    former = contract["store"]
    known = {int(one["version"]): one["runs_sha256"] for one in store.attributes["history"]}
    if former["id"] != store.attributes["store_id"] or known.get(former["version"]) != former["fingerprint"]:
        raise SwiftError(
            f"{run_dir} was begun on another store than {store.path}: give the former one, or a later version of it, "
            "as data.store, or another run.dir"
        )
    return contract


def _split(config: PretrainConfig, store: Store) -> Splits:
    families = _families(store) if config.data.split.families and config.data.split.file is None else {}
    ids = store.subject_ids() if config.data.split.file else None
    return split_subjects(config.data.split, store.subject_keys, ids=ids, families=families)


def _families(store: Store) -> dict[str, str]:
    """Family of each subject, by pseudonymous keys, where the label table names one."""
    try:
        labels = store.labels()
    except SwiftError as error:
        raise SwiftError(f"{error}; data.split.families=false splits without knowing families") from error
    pairs = zip(store.runs, labels, strict=True)
    return {run.subject: f"{run.cohort}/{row['family_id']}" for run, row in pairs if row.get("family_id")}


def check_cleaned(config: StoreConfig, store: Store, runs: list[int]) -> None:
    """Refuse cleaned runs where their scaling would mean something else than that of others.

    Raises:
        UsageError: they meet others, or are scaled by one mean over all voxels, without leave.
    """
    cleaned = sum(store.runs[i].cleaned for i in runs)
    if not cleaned or config.allow_cleaned or config.normalisation.kind in ("per_voxel", "none"):
        return
    what = "all runs are" if cleaned == len(runs) else f"{cleaned} of {len(runs)} runs are"
    raise UsageError(
        f"{what} cleaned already (their voxels' means are about zero), so data.normalisation.kind="
        f"{config.normalisation.kind} scales them by their fluctuation and not by their image: "
        "use per_voxel, choose other data.cohorts, or say data.allow_cleaned=true"
    )


def _withdrawn(store: Store, clips: ClipIndex) -> tuple[int, ...]:
    return tuple(clip for clip, run in enumerate(clips.run.tolist()) if store.runs[run].withdrawn)
