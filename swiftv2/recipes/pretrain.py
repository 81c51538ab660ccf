"""Pretraining: a store, a model and an engine put together."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from swiftv2 import weights
from swiftv2.config.engine import split_batch
from swiftv2.config.load import dump
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.batch import Batch
from swiftv2.data.batches import BatchReader
from swiftv2.data.clips import ClipIndex, check_repetition_times, index_clips, select_runs
from swiftv2.data.order import SampleOrder
from swiftv2.data.splits import Splits, split_subjects
from swiftv2.data.store import Store
from swiftv2.engine import launch
from swiftv2.engine.backend import build_backend
from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.engine.loop import FitResult, fit
from swiftv2.engine.place import find_place
from swiftv2.engine.rundir import RunDirectory
from swiftv2.errors import SwiftError, UsageError
from swiftv2.models import decay_names
from swiftv2.recipes.evaluate import HeldOut
from swiftv2.recipes.export import input_contract, write_contract
from swiftv2.recipes.objective import Objective
from swiftv2.recipes.pictures import save_reconstruction
from swiftv2.report.figures import draw_run

BEST_METRIC = "heldout/loss"
FREE_TO_DIFFER = {"name", "drop_path", "checkpoint_stages"}
"""Keys of `model` that leave the function of given weights alone."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The opened store with the clips of the training and the held-out subjects."""

    store: Store
    splits: Splits
    train: ClipIndex
    heldout: ClipIndex


def open_data(config: PretrainConfig) -> Data:
    """Open the store and cut it into clips.

    Raises:
        SwiftError: the store is missing, unfinished or damaged.
        UsageError: grid, repetition times, splits or clips do not fit the configuration.
    """
    store = Store.open(config.data.store)
    if tuple(store.grid.shape) != config.model.image_size:
        raise UsageError(
            f"model.image_size={list(config.model.image_size)} is not the grid of {config.data.store}, "
            f"{list(store.grid.shape)}: set model.image_size or build the store with another grid.voxel_mm"
        )
    families = _families(store) if config.data.split.families and config.data.split.file is None else {}
    ids = store.subject_ids() if config.data.split.file else None
    splits = split_subjects(config.data.split, store.subject_keys, ids=ids, families=families)
    chosen = [
        select_runs(store.runs, subjects, config.data.cohorts)
        for subjects in (splits.train, splits.part(config.evaluate.split))
    ]
    for part, runs in zip(("train", config.evaluate.split), chosen, strict=True):
        if not len(runs):
            raise UsageError(f"no run of the store is in the part {part}: check data.split and data.cohorts")
    check_repetition_times([store.runs[i].tr for runs in chosen for i in runs], config.data.allow_mixed_tr)
    train, heldout = (index_clips(store.runs, config.clip, runs, allow_mixed_tr=True) for runs in chosen)
    return Data(store, splits, train, heldout)


def _families(store: Store) -> dict[str, str]:
    """Family of each subject, by pseudonymous keys, where the label table names one."""
    try:
        labels = store.labels()
    except SwiftError as error:
        raise SwiftError(f"{error}; data.split.families=false splits without knowing families") from error
    pairs = zip(store.runs, labels, strict=True)
    return {run.subject: f"{run.cohort}/{row['family_id']}" for run, row in pairs if row.get("family_id")}


def pretrain(config: PretrainConfig) -> FitResult:
    """Pretrain from the beginning, or go on where the run directory stands (called by every rank).

    Args:
        config: the checked configuration.

    Returns:
        Where it ended; `exit_status` is 0 done, 75 stopped early with the state saved.

    Raises:
        SwiftError: anything that the user can mend; before a device is taken where that is possible.
    """
    data = open_data(config)
    start_from = _load_start(config, data) if config.run.init_from else None
    place = find_place(os.environ)
    micro_batch, accumulation = split_batch(config.train.global_batch, place.size, config.train.micro_batch)
    world = launch.start(config.engine)
    try:
        with RunDirectory.open(config.run.dir, dump(config), world) as run:
            objective = Objective(config, torch.as_tensor(data.store.voxels).long(), data.store.grid.shape)
            if start_from is not None and not list_checkpoints(run.path):
                objective.simmim.load_state_dict(start_from)
                run.event("initialised", 0, source=str(config.run.init_from))
            _note_data(run, data)
            on_first(lambda: write_contract(run.path, config, data.store, data.splits, data.train), world)
            backend = build_backend(
                config.engine,
                config.optimizer,
                objective,
                decay_names(objective),
                world,
                micro_batch,
                accumulation,
            )
            heldout = HeldOut(config, data.store, data.heldout, objective, world, run.path)
            result = fit(
                backend=backend,
                world=world,
                run=run,
                batches=lambda samples: _batches(config, data, world, micro_batch, accumulation, samples),
                train=config.train,
                schedule=config.schedule,
                peak_lr=config.optimizer.lr,
                seed=config.run.seed,
                evaluate=heldout,
                best_metric=BEST_METRIC,
            )
            if not result.stopped_early:
                on_first(lambda: _finish(config, data, objective, world, run), world)
            backend.close()
            return result
    finally:
        launch.stop()


def _batches(config: PretrainConfig, data: Data, world: World, micro_batch: int, accumulation: int, samples: int) -> "OnDevice":
    reader = BatchReader(
        data.store,
        data.train,
        SampleOrder(config.run.seed, len(data.train)),
        config.mask,
        config.data.normalisation,
        seed=config.run.seed,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.size,
        samples_consumed=samples,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        pin=world.device.type == "cuda",
    )
    return OnDevice(reader, world.device)


class OnDevice:
    """Micro-batches on the device, copied while the former one is computed."""

    def __init__(self, reader: BatchReader, device: torch.device) -> None:
        self._reader, self._device = reader, device

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._reader).to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the threads that read ahead."""
        self._reader.close()


def _load_start(config: PretrainConfig, data: Data) -> dict[str, Tensor]:
    """Tensors of `run.init_from`, made for this architecture and this input.

    Raises:
        SwiftError: the weights are of another architecture, or were made for other input; the difference is named.
    """
    source = Path(str(config.run.init_from))
    tensors, card = weights.load(source)
    if card.kind != "simmim":
        raise SwiftError(f"run.init_from={source}: an encoder alone; pretraining starts from exported SimMIM weights")
    mine, theirs = config.model.model_dump(), card.model.model_dump()
    for name in sorted(mine.keys() - FREE_TO_DIFFER):
        if mine[name] != theirs[name]:
            raise SwiftError(f"run.init_from={source}: made with model.{name}={theirs[name]}, not {mine[name]}")
    weights.check_contract(card, input_contract(config, data.store, data.train))
    return tensors


def _note_data(run: RunDirectory, data: Data) -> None:
    run.event(
        "data",
        store_version=data.store.version,
        runs=len(data.store.runs),
        subjects={"train": len(data.splits.train), "val": len(data.splits.val), "test": len(data.splits.test)},
        unassigned_subjects=len(data.splits.unassigned),
        clips={"train": len(data.train), "heldout": len(data.heldout)},
        too_short=list(data.train.too_short + data.heldout.too_short),
    )


def _finish(config: PretrainConfig, data: Data, objective: Objective, world: World, run: RunDirectory) -> None:
    """Leave the card for exported weights, the pictures and the figure (rank 0)."""
    save_reconstruction(config, data.store, data.heldout, objective, world.device, run.path / "figures")
    figure = draw_run(run.path)
    run.event("figure", path=figure.name)
