"""Pretraining: a store, a model and an engine put together."""

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from swiftv2 import weights
from swiftv2.config.engine import split_batch
from swiftv2.config.load import dump
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batches import BatchReader
from swiftv2.engine import launch
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.engine.collective import gather, on_first
from swiftv2.engine.launch import World
from swiftv2.engine.loop import FitResult, fit
from swiftv2.engine.place import find_place
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.stream import Exclusion
from swiftv2.engine.trackers.desk import Trackers
from swiftv2.engine.trackers.tracker import check
from swiftv2.errors import SwiftError
from swiftv2.models import decay_names, learning_rates
from swiftv2.models.blocks import compile_blocks
from swiftv2.models.geometry import patches_with_brain
from swiftv2.plan.machines import find_gpu
from swiftv2.recipes.branch import find_branch
from swiftv2.recipes.data import Data, open_data, sheet_of
from swiftv2.recipes.datasheet import write_data_sheet
from swiftv2.recipes.evaluate import HeldOut
from swiftv2.recipes.exclusions import EXCLUSIONS, read_exclusions, write_exclusions
from swiftv2.recipes.export import contract_of, write_contract
from swiftv2.recipes.objective import Objective, template_mask
from swiftv2.recipes.profiling import profile_of
from swiftv2.recipes.stream import DeviceStream
from swiftv2.report.figures import draw_run

BEST_METRIC = "heldout/loss"
FREE_TO_DIFFER = {"name", "drop_path", "attention_buckets", "checkpoint_stages", "checkpoint_keep"}
"""Keys of `model` that leave the function of given weights alone."""


def pretrain(config: PretrainConfig) -> FitResult:
    """Pretrain from the beginning, or go on where the run directory stands (called by every rank).

    Args:
        config: the checked configuration.

    Returns:
        Where it ended; `exit_status` is 0 done, 75 stopped early with the state saved.

    Raises:
        SwiftError: anything that the user can mend; before a device is taken where that is possible.
    """
    check(config.tracking.wanted, os.environ)
    branch = find_branch(config)
    data = open_data(config, config.run.dir if branch is None else branch.run_dir)
    # A branch has it in its trunk's checkpoint.
    asked = [] if branch is not None else _read_asked(config, data)
    start_from = _load_start(config, data) if config.run.init_from else None
    place = find_place(os.environ)
    micro_batch, accumulation = split_batch(config.train.global_batch, place.size, config.train.micro_batch)
    world = launch.start(config.engine)
    try:
        _check_agreement(data, asked, world)
        with (
            RunDirectory.open(config.run.dir, dump(config), world) as run,
            Trackers(config.tracking, config, run, world),
            Sentinel.over(run, world, config.train, config.faults) as watch,
        ):
            objective = Objective(config, torch.as_tensor(data.store.voxels).long(), data.store.grid.shape)
            if start_from is not None and not list_checkpoints(run.path):
                objective.simmim.load_state_dict(start_from)
                run.event("initialised", 0, source=str(config.run.init_from))
            run.event("data", **data.facts())
            if config.model.packing == "template":
                run.event("packing", places_kept=float(objective.simmim.encoder.template.float().mean()))
            on_first(lambda: write_contract(run.path, config, data), world)
            on_first(lambda: write_data_sheet(run.path, sheet_of(config, data)), world)
            objective.count()
            if config.engine.compile:
                compile_blocks(objective, varying=config.model.packing == "subject" or config.objective == "visible_only")
            names, rates = decay_names(objective), learning_rates(objective, config.model)
            parts = (config.engine, config.optimizer, objective, names, world, micro_batch, accumulation)
            backend = build_backend(*parts, rates)
            heldout = HeldOut(config, data, objective, world, run.path, partial(run.warn, "pictures"))
            result = fit(
                backend=backend,
                world=world,
                run=run,
                watch=watch,
                batches=lambda samples, exclusions: _stream(
                    config,
                    data,
                    run,
                    backend,
                    (micro_batch, accumulation),
                    samples,
                    exclusions if samples else [*exclusions, *asked],
                ),
                train=config.train,
                schedule=config.schedule,
                peak_lr=config.optimizer.lr,
                seed=config.run.seed,
                faults=config.faults,
                evaluate=heldout,
                profile=profile_of(config.train.profile, run, world, objective),
                best_metric=BEST_METRIC,
                peak_flops=_peak_flops(config, world),
                branch=None if branch is None else branch.checkpoint,
            )
            if not result.stopped_early:
                watch.at(result.step, "finish")
                on_first(lambda: _finish(run), world)
            backend.close()
            return result
    finally:
        launch.stop()


def _stream(
    config: PretrainConfig,
    data: Data,
    run: RunDirectory,
    backend: Backend,
    micro_batches: tuple[int, int],
    samples: int,
    exclusions: list[Exclusion],
) -> DeviceStream:
    """Batches of this rank after so many samples; (micro-batch, accumulation) in `micro_batches`."""
    world, order = backend.world, data.order(config.run.seed, samples, exclusions)
    reader = BatchReader(
        data.store,
        data.train,
        order,
        config.mask,
        config.data.normalisation,
        seed=config.run.seed,
        micro_batch=micro_batches[0],
        accumulation=micro_batches[1],
        rank=world.rank,
        world_size=world.size,
        samples_consumed=samples,
        reading=data.reading(config.data, world.device),
        most_faults=int(config.data.quarantine_limit * len(data.train)),
    )

    def begin_epoch(epoch: int) -> None:
        if world.rank == 0:
            plain = data.order(config.run.seed, 0, [])
            run.event("epoch", epoch=epoch, samples=data.composition(plain, epoch))

    def noted(left_out: list[Exclusion]) -> None:
        on_first(lambda: write_exclusions(run.path / EXCLUSIONS, data, left_out), world)

    limit, gone = config.data.quarantine_limit, data.withdrawn_train
    return DeviceStream(reader, world.device, limit, gone, begin_epoch, noted, micro_batches[1], backend.clock)


def _read_asked(config: PretrainConfig, data: Data) -> list[Exclusion]:
    """What is left out from the beginning; a run that goes on has it in its checkpoint.

    Raises:
        UsageError: `data.exclude` does not fit the data.
    """
    if config.data.exclude is None or list_checkpoints(config.run.dir):
        return []
    return read_exclusions(config.data.exclude, data)


def _check_agreement(data: Data, asked: list[Exclusion], world: World) -> None:
    """Make sure that all ranks opened the same version of the store, and leave out the same (collective).

    Raises:
        SwiftError: on every rank, where they did not.
    """
    if len(set(gather((data.signature(), tuple(asked)), world))) > 1:
        raise SwiftError(
            f"store {data.store.path}, or the file data.exclude, changed while the ranks opened it: give the same command again"
        )


def _load_start(config: PretrainConfig, data: Data) -> dict[str, Tensor]:
    """Tensors of `run.init_from`, made for this architecture and this input.

    Raises:
        SwiftError: the weights are of another architecture, or were made for other input; the difference is named.
    """
    source = Path(str(config.run.init_from))
    tensors, card = weights.load(source)
    if card.kind != config.objective:
        raise SwiftError(
            f"run.init_from={source}: weights of kind {card.kind}, where objective={config.objective} wants its own"
        )
    mine, theirs = config.model.model_dump(), card.model.model_dump()
    # Decoupled models know differences of time alone: longer clips change no weight.
    free = FREE_TO_DIFFER | ({"frames"} if config.model.variant == "decoupled" else set())
    for name in sorted(mine.keys() - free):
        if mine[name] != theirs[name]:
            raise SwiftError(f"run.init_from={source}: made with model.{name}={theirs[name]}, not {mine[name]}")
    weights.check_contract(card, contract_of(config, data))
    if config.model.packing == "template":
        _check_template(tensors["encoder.template"], config, data, source)
    return tensors


def _check_template(template: Tensor, config: PretrainConfig, data: Data, source: Path) -> None:
    """Make sure that weights leave out what the store's template mask leaves out.

    Raises:
        SwiftError: they were made with another mask.
    """
    kept = template_mask(torch.as_tensor(data.store.voxels).long(), data.store.grid.shape)
    mine = patches_with_brain(kept[None], config.model.patch_size)[0]
    if not torch.equal(mine, template):
        raise SwiftError(
            f"run.init_from={source}: its template mask keeps {int(template.sum())} places, that of the store "
            f"{int(mine.sum())}: weights and store are of different grids"
        )


def _peak_flops(config: PretrainConfig, world: World) -> float | None:
    """FLOP/s of all ranks' GPUs at their peak in the precision of the products; None where the GPU is not known."""
    device = find_gpu(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    if device is None:
        return None
    return world.size * (device.peak_bf16_flops if config.engine.precision == "bf16" else device.peak_fp32_flops)


def _finish(run: RunDirectory) -> None:
    """Leave the figure (rank 0)."""
    figure = draw_run(run.path)
    run.event("figure", path=figure.name)
