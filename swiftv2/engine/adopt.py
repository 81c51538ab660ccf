"""A checkpoint of DeepSpeed's alone becomes one of a run, which goes on from it on any number of ranks."""

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from swiftv2.config.load import dump
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine.checkpoint import TrainerState, commit, list_checkpoints
from swiftv2.engine.foreign import ForeignState, find_source
from swiftv2.engine.launch import World
from swiftv2.engine.lease import Lease, last_attempt
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.shards import Written, shard_name, write_shard
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file
from swiftv2.records import cut_torn_line, only_ours, read_lines


class Adopted(NamedTuple):
    """What was made.

    Attributes:
        folder: the checkpoint.
        step, samples: where the run goes on.
        adam_steps: updates of the optimizer.
        world_size: ranks that saved the source.
        bytes: of the state.
    """

    folder: Path
    step: int
    samples: int
    adam_steps: int
    world_size: int
    bytes: int


def adopt(source: Path, run_dir: Path, config: PretrainConfig, step: int | None = None) -> Adopted:
    """Make a permanent checkpoint of a run directory of a DeepSpeed checkpoint.

    Fp32 weights, moments and Adam's count are taken over exactly. Names and shapes are compared with the model when the run
    goes on, since only then is there one.

    Args:
        source: the folder of a DeepSpeed tag, or the one that holds `latest`.
        run_dir: a run directory with `config.yaml`, or a folder that is empty or not there.
        config: of the run; written where the folder has none.
        step: that the checkpoint counts as; DeepSpeed's own count when None.

    Raises:
        UsageError: the configuration does not fit the checkpoint.
        SwiftError: the source cannot be adopted, the folder is no run directory, another process writes to it, or it holds
            checkpoints of this or later steps. Nothing is left behind.
    """
    state = ForeignState(find_source(source))
    step = _check_step(state, config, step)
    fresh = not (run_dir / "config.yaml").exists()
    if fresh and run_dir.exists() and not only_ours(run_dir):
        raise SwiftError(f"{run_dir} is not empty and no run directory: give another one")
    made = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    attempt = 1 + max(last_attempt(run_dir), *(row["attempt"] for row in read_lines(run_dir / "events.jsonl")), 0)
    with ExitStack() as stack:
        lease = stack.enter_context(Lease.acquire(run_dir, attempt))
        undo = stack.enter_context(ExitStack())
        if made:
            undo.callback(shutil.rmtree, run_dir, ignore_errors=True)
        for leftover in (run_dir / "checkpoints").glob(".step_*"):
            shutil.rmtree(leftover)
        later = [c.step for c in list_checkpoints(run_dir) if c.step >= step]
        if later:
            raise SwiftError(f"{run_dir} has a checkpoint of step {max(later)} already: adopt step {step} into another one")
        if fresh:
            undo.callback((run_dir / "config.yaml").unlink, missing_ok=True)
            write_file(run_dir / "config.yaml", dump(config))
        adopted = _write(state, run_dir, config, step, attempt)
        undo.pop_all()
        cut_torn_line(run_dir / "events.jsonl")
        RunDirectory(run_dir, attempt, World(0, 1, 0, 1, torch.device("cpu")), lease).event(
            "adopted",
            step,
            source=str(source.resolve()),
            world_size=state.world_size,
            deepspeed=state.version,
            deepspeed_steps=state.steps,
            adam_steps=adopted.adam_steps,
        )
    return adopted


def _check_step(state: ForeignState, config: PretrainConfig, step: int | None) -> int:
    """The step that the checkpoint counts as.

    Raises:
        UsageError: batch, steps or exclusions of the configuration do not fit.
    """
    batch, path = config.train.global_batch, state.source.model
    if step is None:
        step = state.steps
        if state.samples not in (None, step * batch):
            raise UsageError(
                f"{path}: {state.samples} clips in {step} steps, where train.global_batch={batch} makes {step * batch}: take "
                "the batch that it was trained with, or say with --step how many steps of this batch it stands for"
            )
    if not 0 < step <= config.train.max_steps:
        raise UsageError(f"{path}: step {step} is not within 1 and train.max_steps={config.train.max_steps}")
    if config.data.exclude is not None:
        raise UsageError("data.exclude is heeded where a run begins, and an adopted one goes on: leave it out")
    return step


def _check_adam(state: ForeignState, adam_steps: int, step: int) -> None:
    """DeepSpeed counts steps from where its engine was made, which a run that was resumed by other means does anew.

    Raises:
        UsageError: there were more updates than steps.
    """
    if adam_steps > step:
        raise UsageError(
            f"{state.source.model}: {adam_steps} updates of Adam in {step} steps: say with --step where the run stands"
        )


def _write(state: ForeignState, run_dir: Path, config: PretrainConfig, step: int, attempt: int) -> Adopted:
    """Write shards beside the checkpoints, and let them count once all are there."""
    final = run_dir / "checkpoints" / f"step_{step}"
    partial = final.with_name(f".{final.name}.{attempt}.adopt.partial")
    partial.mkdir(parents=True)
    files: dict[str, Written] = {}
    adam_steps, ranks = 0, max(len(state.source.ranks), 1)
    try:
        for rank, part in enumerate(state.parts()):
            shapes = {key: state.shapes[key] for key, _, _ in part.stretches}
            name = shard_name(rank, ranks)
            adam_steps = part.adam_steps
            files[name] = write_shard(partial / name, part.stretches, shapes, adam_steps)
        _check_adam(state, adam_steps, step)
        trainer = _trainer(state, run_dir, config, step, attempt)
        commit(partial, final, "permanent", trainer, files)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    size = sum(one.size for one in files.values())
    return Adopted(final, step, trainer.samples, adam_steps, state.world_size, size)


def _trainer(state: ForeignState, run_dir: Path, config: PretrainConfig, step: int, attempt: int) -> TrainerState:
    batch = config.train.global_batch
    share = max(batch // state.world_size, 1)
    micro_batch = state.micro_batch or share
    return TrainerState(
        step=step,
        samples=step * batch,
        attempt=attempt,
        seed=config.run.seed,
        world_size=state.world_size,
        micro_batch=micro_batch,
        accumulation=max(share // micro_batch, 1),
        config_sha256=hashlib.sha256((run_dir / "config.yaml").read_bytes()).hexdigest(),
        schedule=json.loads(config.schedule.model_dump_json()) | {"max_steps": config.train.max_steps},
    )
