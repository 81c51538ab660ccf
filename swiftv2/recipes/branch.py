"""A run that goes on from a checkpoint of another one, its trunk: one long run at a constant rate serves many budgets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.errors import UsageError
from swiftv2.recipes.data import CONTRACT

FREE_TO_DIFFER = {
    "model.name",
    "model.attention_buckets",
    "model.checkpoint_stages",
    "model.checkpoint_keep",
    "data.store",
    "data.on_bad_clip",
    "data.quarantine_limit",
    "data.patience_seconds",
    "data.threads",
    "data.prefetch",
    "data.prefetch_mb",
}
"""Settings of the compared sections that change neither what is learned from a clip nor which clip comes next."""


class Branch(NamedTuple):
    """Where a new run goes on from."""

    run_dir: Path
    """Of the trunk; its contract tells subjects and numbers of clips."""
    checkpoint: Path


def find_branch(config: PretrainConfig) -> Branch | None:
    """The checkpoint from which a run without one of its own goes on; None where it begins by itself or has begun.

    Raises:
        UsageError: the other run or its checkpoint is missing, or the run was made with other data, model, batch or seed.
    """
    trunk, step = config.run.branch_from, config.run.branch_step
    if trunk is None or step is None or list_checkpoints(config.run.dir):
        return None
    if not (trunk / "config.yaml").is_file() or not (trunk / CONTRACT).is_file():
        raise UsageError(f"run.branch_from={trunk}: is no run directory that has begun; give that of the other run")
    found = {one.step: one for one in list_checkpoints(trunk) if one.problem is None}
    if step not in found:
        have = ", ".join(map(str, sorted(found))) or "none"
        raise UsageError(
            f"run.branch_step={step}: {trunk} has no whole checkpoint of this step (it has {have}); "
            f"train it with train.keep_steps=[{step}]"
        )
    mine, theirs = dict(compared(config)), dict(compared(load(PretrainConfig, trunk / "config.yaml")))
    differing = [key for key, value in mine.items() if theirs.get(key) != value]
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise UsageError(f"run.branch_from={trunk}: was made with {key}={theirs.get(key)}, not {mine[key]}{more}")
    return Branch(trunk, found[step].path)


def compared(config: PretrainConfig) -> Iterator[tuple[str, Any]]:
    """What a run learns from and how, by key; steps and schedule are left out. It must be the same in a branch."""
    for section in ("data", "clip", "model", "mask", "loss", "optimizer"):
        for name, value in getattr(config, section).model_dump(mode="json").items():
            if f"{section}.{name}" not in FREE_TO_DIFFER:
                yield f"{section}.{name}", value
    yield "objective", config.objective
    yield "train.global_batch", config.train.global_batch
    yield "run.seed", config.run.seed
