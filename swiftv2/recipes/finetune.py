"""Fine-tuning: a task, an encoder and an engine put together; the best step on validation subjects predicts the test's."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftv2 import weights
from swiftv2.config.data import ClipConfig
from swiftv2.config.engine import split_batch
from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import build, dump
from swiftv2.config.model import MaskConfig, ModelConfig
from swiftv2.config.task import TaskConfig
from swiftv2.data.samples.augment import Augment
from swiftv2.data.samples.batches import BatchReader
from swiftv2.data.samples.order import Exclusion as OrderExclusion
from swiftv2.data.samples.order import SampleOrder
from swiftv2.data.samples.reading import Reading
from swiftv2.downstream.predictions import Predictions, by_subject, write
from swiftv2.engine import launch
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.checkpoint import latest, list_checkpoints
from swiftv2.engine.collective import gather, on_first
from swiftv2.engine.launch import World
from swiftv2.engine.loop import FitResult, fit
from swiftv2.engine.place import find_place
from swiftv2.engine.rundir import CHANGEABLE, RunDirectory, compare_config
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.stream import Exclusion
from swiftv2.engine.trackers.desk import Trackers
from swiftv2.engine.trackers.tracker import check
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file
from swiftv2.models import decay_names
from swiftv2.models.regimes import learned_share, prepare, rates
from swiftv2.models.swin4d import Swin4D
from swiftv2.recipes.data import CONTRACT
from swiftv2.recipes.datasheet import Part, data_sheet, write_data_sheet
from swiftv2.recipes.export import hashes_of, input_contract
from swiftv2.recipes.judge import SELECT, Judge
from swiftv2.recipes.objective import template_mask
from swiftv2.recipes.overlap import Overlap, find_overlap
from swiftv2.recipes.predictor import Finetuned, make_outputs
from swiftv2.recipes.profiling import profile_of
from swiftv2.recipes.stream import DeviceStream
from swiftv2.recipes.task import TaskClips, TaskData, open_task
from swiftv2.report.downstream import draw_result

RESULT = "result.json"
MAY_CHANGE = (*CHANGEABLE, *(f"task.{key}" for key in CHANGEABLE if key.startswith("data.")))
"""Settings that may differ when a run is resumed."""


def finetune(config: FinetuneConfig) -> FitResult:
    """Fine-tune from the beginning, or go on where the run directory stands (called by every rank).

    A finished run has `result.json`, `predictions.csv` and the encoder as exported weights; test subjects are predicted
    once, by the step that validation subjects chose.

    Args:
        config: the checked configuration.

    Returns:
        Where it ended; `exit_status` is 0 done, 75 stopped early with the state saved.

    Raises:
        SwiftError: anything that the user can mend; before a device is taken where that is possible.
    """
    check(config.tracking.wanted, os.environ)
    card = None if config.encoder.weights is None else weights.read_card(config.encoder.weights)
    config = complete(config, card)
    compare_config(config.run.dir / "config.yaml", dump(config), MAY_CHANGE)
    data = open_task(config.task, config.run.dir)
    overlap = _check_overlap(config, data, card)
    _check_input(config, data, card)
    train, val = data.cut("train"), data.cut("val")
    test = data.cut("test") if config.evaluate.test else None
    _check_classes(config, data, val, test)
    module = build_module(config, data, train, card)
    mask = no_mask(module.predictor.encoder.config)
    place = find_place(os.environ)
    micro_batch, accumulation = split_batch(config.train.global_batch, place.size, config.train.micro_batch)
    world = launch.start(config.engine)
    try:
        if len(set(gather(data.signature(), world))) > 1:
            raise SwiftError(
                f"store {data.store.path}, or its labels, changed while the ranks opened it: give the command again"
            )
        with (
            RunDirectory.open(config.run.dir, dump(config), world, MAY_CHANGE) as run,
            Trackers(config.tracking, config, run, world),
            Sentinel.over(run, world, config.train, config.faults) as watch,
        ):
            share = learned_share(module.predictor)
            run.event("data", **data.facts(), clips={"train": len(train.clips), "val": len(val.clips)})
            run.event("regime", regime=config.encoder.regime, learned_share_of_encoder=share)
            on_first(lambda: _write_contract(run.path, config, data, train), world)
            cut = {"train": train, "val": val, "test": test}
            on_first(lambda: write_data_sheet(run.path, _sheet(config, data, cut)), world)
            factors = {
                f"predictor.{name}": rate for name, rate in rates(module.predictor, config.encoder, config.head.rate).items()
            }
            learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            backend = build_backend(
                config.engine,
                config.optimizer,
                module,
                decay_names(module) & learned,
                world,
                micro_batch,
                accumulation,
                factors,
            )
            reading = _reading(config, data, world)
            judge = Judge(config, data, module, world, reading, mask)
            result = fit(
                backend=backend,
                world=world,
                run=run,
                watch=watch,
                batches=lambda samples, exclusions: _stream(
                    config, data, train, mask, backend, reading, (micro_batch, accumulation), samples, exclusions
                ),
                train=config.train,
                schedule=config.schedule,
                peak_lr=config.optimizer.lr,
                seed=config.run.seed,
                faults=config.faults,
                evaluate=lambda _, tick: judge.validate(val, tick),
                profile=profile_of(config.train.profile, run, world, module),
                best_metric=SELECT,
            )
            if not result.stopped_early and not (run.path / RESULT).exists():
                best = _best(run.path, world)
                backend.restore(best)
                found, predictions = judge.conclude(val, test, lambda: watch.at(result.step, "evaluate"))
                step = int(best.name.removeprefix("step_"))
                facts = {"best_step": step, "overlap": None if overlap is None else overlap.to_json()}
                found |= facts | {"learned_share_of_encoder": share}
                on_first(lambda: _leave(config, data, run.path, found, predictions), world)
                run.event("judged", step, test=config.evaluate.test)
            backend.close()
            return result
    finally:
        launch.stop()


def _sheet(config: FinetuneConfig, data: TaskData, cut: Mapping[str, TaskClips | None]) -> dict[str, Any]:
    """What the run takes from the store, in counts."""
    parts = []
    for name, clips in cut.items():
        runs = [] if clips is None else sorted(set(clips.clips.run.tolist()))
        subjects = sorted({data.store.runs[index].subject for index in runs})
        parts.append(Part(name, subjects, None if clips is None else clips.clips))
    families = {unit.subject: unit.family for unit in data.units if unit.family}
    return data_sheet(data.store, parts, families, config.task.clip, config.task.split.unit)


def complete(config: FinetuneConfig, card: weights.Card | None) -> FinetuneConfig:
    """Take from the weights what the task does not say: normalisation, frames and strides of clips."""
    if card is None:
        return config
    task, wanted = config.task, card.input
    data, clip = task.data, task.clip
    if "normalisation" not in data.model_fields_set:
        data = data.model_copy(update={"normalisation": wanted.normalisation})
    taken: dict[str, Any] = {}
    if not {"frames", "seconds"} & clip.model_fields_set:
        taken["frames"] = wanted.frames
    if "stride_within" not in clip.model_fields_set:
        taken["stride_within"] = wanted.stride_within
    clip = ClipConfig(**(clip.model_dump(exclude_unset=True) | taken))
    full = task.model_dump() | {"data": data.model_dump(), "clip": clip.model_dump()}
    # Built anew, so that a normalisation that the task forbids is refused.
    return config.model_copy(update={"task": _checked(TaskConfig, full, config)})


def _checked(cls: type[TaskConfig], tree: dict[str, Any], config: FinetuneConfig) -> TaskConfig:
    return build(cls, tree, where=f"task {config.task.name} with encoder.weights={config.encoder.weights}")


def build_module(config: FinetuneConfig, data: TaskData, train: TaskClips, card: weights.Card | None) -> Finetuned:
    """The module that learns, from its first values, on the CPU.

    Raises:
        SwiftError: the weights are damaged, or of another grid.
        UsageError: the architecture does not fit the store or the regime.
    """
    model = _architecture(config, card)
    store = data.store
    if tuple(store.grid.shape) != model.image_size:
        raise UsageError(
            f"the model is made for a grid of {list(model.image_size)}, {store.path} has {list(store.grid.shape)}: take "
            "weights (or encoder.model.image_size) of that grid, or build the store with another grid.voxel_mm"
        )
    if model.variant != "decoupled" and config.task.clip.frames > model.frames:
        raise UsageError(
            f"clips of task.clip.frames={config.task.clip.frames} are longer than the model's {model.frames} frames: shorten "
            "them, or take weights (or encoder.model.frames) of as many"
        )
    encoder = Swin4D(model, seed=config.run.seed)
    mask = template_mask(torch.as_tensor(store.voxels).long(), store.grid.shape)
    if model.packing == "template":
        encoder.use_template(mask)
    if config.encoder.regime != "scratch" and config.encoder.weights is not None:
        source = weights.load_encoder(config.encoder.weights).state_dict()
        _take(
            encoder, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in source.items()}, config
        )
    classes = [data.classes(target) for target in config.task.targets]
    outputs = make_outputs(config.task.targets, classes, data.values_of(train))
    augment = Augment(config.augment, store.grid.voxel_mm, config.run.seed) if config.augment.changes else None
    # The first axis is left to right in both orders of voxels; mirrored about the window's middle it must be about x = 0.
    middle = store.grid.matrix[0, 3] + store.grid.matrix[0, 0] * (store.grid.shape[0] - 1) / 2
    if config.augment.flip and abs(middle) > store.grid.voxel_mm[0] / 2:
        raise UsageError(f"augment.flip mirrors at x = {middle:.1f} mm on this grid, not between the hemispheres: leave it off")
    voxels = torch.as_tensor(store.voxels).long()
    module = Finetuned(config, encoder, outputs, train.truth, voxels, store.grid.shape, augment)
    prepare(module.predictor, config.encoder, config.run.seed)
    return module


def _architecture(config: FinetuneConfig, card: weights.Card | None) -> ModelConfig:
    model = config.encoder.model if card is None else card.model
    if model is None:
        raise AssertionError("the configuration has weights or a model")
    if card is not None and card.kind != "encoder" and card.model.packing == "none" and card.kind == "visible_only":
        # Visible tokens were encoded by the definition of packing; all tokens are another function of the weights.
        model = model.model_copy(update={"packing": "template"})
    chosen = {"drop_path": config.encoder.drop_path, "packing": config.encoder.packing}
    tree = model.model_dump() | {name: value for name, value in chosen.items() if value is not None}
    return ModelConfig.model_validate(tree)


def _take(encoder: Swin4D, tensors: dict[str, Tensor], config: FinetuneConfig) -> None:
    """Load weights into an encoder whose packing may be another than theirs.

    Raises:
        SwiftError: they leave out other places than the store.
    """
    own = encoder.state_dict()
    theirs = tensors.pop("template", None)
    mine = own.get("template")
    if theirs is not None and mine is not None and not torch.equal(mine, theirs.to(mine.dtype)):
        raise SwiftError(
            f"encoder.weights={config.encoder.weights}: its template mask keeps {int(theirs.sum())} places, that of the store "
            f"{int(mine.sum())}: weights and store are of different grids"
        )
    encoder.load_state_dict(tensors | ({} if mine is None else {"template": mine}))


def _check_input(config: FinetuneConfig, data: TaskData, card: weights.Card | None) -> None:
    """Refuse what the weights were not made for.

    Raises:
        SwiftError: orientation, space, grid, voxel size, repetition time, clip or normalisation differ.
    """
    if card is None:
        return
    runs = sorted({run for runs in data.runs_of.values() for run in runs})
    weights.check_contract(card, input_contract(data.store, config.task.clip, config.task.data.normalisation, runs))


def _check_classes(config: FinetuneConfig, data: TaskData, val: TaskClips, test: TaskClips | None) -> None:
    """Refuse before training what could not be judged after it.

    Raises:
        UsageError: validation subjects have one class, or no value, of a target; or test subjects no value.
    """
    for number, target in enumerate(config.task.targets):
        if test is not None and np.isnan(test.truth[:, number]).all():
            raise UsageError(f"task {config.task.name}: no test subject has a value of {target.column}: split otherwise")
        known = np.unique(val.truth[:, number][~np.isnan(val.truth[:, number])])
        if not len(known):
            raise UsageError(f"task {config.task.name}: no validation subject has a value of {target.column}: split otherwise")
        if len(data.classes(target)) == 2 and len(known) < 2 and target.threshold == "validation":
            raise UsageError(
                f"task {config.task.name}: validation subjects have one class of {target.column}, which gives no threshold: "
                "raise split.val_share, or say threshold=half for this target"
            )


def _check_overlap(config: FinetuneConfig, data: TaskData, card: weights.Card | None) -> Overlap | None:
    """Subjects of validation and test that the weights have seen.

    Raises:
        SwiftError: there are some, or nobody can tell, and `encoder.overlap` does not declare it.
    """
    if card is None or config.encoder.regime == "scratch":
        return None
    judged = {unit.subject for unit in data.units if unit.key in {*data.splits.val, *data.splits.test}}
    found = find_overlap(card, data.store, judged)
    if config.encoder.overlap == "refuse" and found.counted:
        raise SwiftError(
            f"{found.counted} of the {len(judged)} validation and test subjects were seen in the pretraining of "
            f"{config.encoder.weights}: take weights or a split without them, or say encoder.overlap=declare"
        )
    return found


def _reading(config: FinetuneConfig, data: TaskData, world: World) -> Reading:
    given = config.task.data
    return Reading(
        threads=given.threads,
        prefetch=given.prefetch,
        prefetch_mb=given.prefetch_mb,
        pin=world.device.type == "cuda",
        on_bad_clip=given.on_bad_clip,
        table=data.table,
        patience_seconds=given.patience_seconds,
        absence=data.absence,
    )


def no_mask(model: ModelConfig) -> MaskConfig:
    """A mask that batches carry and nobody looks at: its cells are the model's patches."""
    return MaskConfig(patch_size=model.patch_size, among="all")


def _stream(
    config: FinetuneConfig,
    data: TaskData,
    train: TaskClips,
    mask: MaskConfig,
    backend: Backend,
    reading: Reading,
    micro_batches: tuple[int, int],
    samples: int,
    exclusions: list[Exclusion],
) -> DeviceStream:
    """Batches of this rank after so many samples; (micro-batch, accumulation) in `micro_batches`."""
    world = backend.world
    left_out = [OrderExclusion(*one) for one in exclusions] + [OrderExclusion(clip, samples) for clip in train.left_out]
    order = SampleOrder(config.run.seed, len(train.clips), left_out, None, data.table.cohort[train.clips.run])
    reader = BatchReader(
        data.store,
        train.clips,
        order,
        mask,
        config.task.data.normalisation,
        seed=config.run.seed,
        micro_batch=micro_batches[0],
        accumulation=micro_batches[1],
        rank=world.rank,
        world_size=world.size,
        samples_consumed=samples,
        reading=reading,
        most_faults=int(config.task.data.quarantine_limit * len(train.clips)),
    )
    limit = config.task.data.quarantine_limit
    return DeviceStream(reader, world.device, limit, train.left_out, remembered=max(micro_batches[1], 1), clock=backend.clock)


def _write_contract(run_dir: Path, config: FinetuneConfig, data: TaskData, train: TaskClips) -> None:
    """Leave what a resumed run must know of its data; written once."""
    path = run_dir / CONTRACT
    if path.exists():
        return
    store = data.store
    runs = sorted(set(train.clips.run.tolist()))
    contract = input_contract(store, config.task.clip, config.task.data.normalisation, runs)
    subjects = {store.runs[run].subject for run in runs}
    content = {
        "input": contract.model_dump(mode="json"),
        "store": {
            "id": store.attributes["store_id"],
            "version": data.version,
            "fingerprint": store.fingerprint,
            "generated": store.generated,
        },
        "splits": asdict(data.splits),
        "clips": data.counts(),
        "subjects": hashes_of(store, subjects),
        "recipe": "finetune",
    }
    write_file(path, json.dumps(content, indent=1) + "\n")


def best_of(run_dir: Path) -> Path:
    """The checkpoint of a run's best step.

    Raises:
        SwiftError: there is none.
    """
    newest = latest(run_dir)
    step = None if newest is None else newest.trainer().best_step
    found = next((one for one in list_checkpoints(run_dir) if one.step == step and one.problem is None), None)
    if found is None:
        raise SwiftError(f"{run_dir}: no evaluation gave a finite {SELECT}, so there is no best step: look at metrics.jsonl")
    return found.path


def _best(run_dir: Path, world: World) -> Path:
    """The checkpoint of the best step (collective)."""
    return on_first(lambda: best_of(run_dir), world)


def _leave(
    config: FinetuneConfig,
    data: TaskData,
    run_dir: Path,
    found: dict[str, Any],
    predictions: dict[str, dict[str, Predictions]],
) -> None:
    """Write and draw what the run came to: the result last, so that it stands for all of it (rank 0)."""
    write(run_dir / "predictions.csv", predictions)
    split = config.task.split
    result = {
        "task": config.task.name,
        "name": config.run.name or config.encoder.regime,
        "split": {"kind": split.kind, "index": split.index, "count": split.count, "seed": split.seed, "unit": split.unit},
        "subjects": {part: len(keys) for part, keys in asdict(data.splits).items() if part != "unassigned"},
        "seed": config.run.seed,
        **found,
    }
    for part, of_targets in predictions.items():
        judged = {column: by_subject(found) for column, found in of_targets.items()}
        draw_result(
            result, {c: {"truth": one.truth, "score": one.score} for c, one in judged.items()}, run_dir / "figures", part
        )
    write_file(run_dir / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
