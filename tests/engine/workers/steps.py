"""Started by every launcher: 30 steps under each configuration given, then what states must survive; rank 0 reports."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from toy import DECAY, GLOBAL_BATCH, Toy, batches

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import launch
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.collective import on_all, on_first
from swiftv2.engine.launch import World
from swiftv2.engine.shards import SavedState, Snapshot, shard_name, write_shard
from swiftv2.errors import SwiftError

RATE = 1e-2
Settings = dict[str, Any]


def build(settings: Settings, world: World, unused: bool = False) -> Backend:
    values = {key: value for key, value in settings.items() if key != "accumulation"}
    accumulation = settings.get("accumulation", 1)
    config = EngineConfig(device="cpu", **values)
    micro = GLOBAL_BATCH // (world.size * accumulation)
    optimizer = OptimizerConfig(lr=RATE, weight_decay=0.1)
    return build_backend(config, optimizer, Toy(unused), DECAY, world, micro, accumulation)


def train(backend: Backend, world: World, begin: int, count: int) -> list[list[float]]:
    stream = batches(begin * GLOBAL_BATCH, world, backend.accumulation)
    rows = []
    for _ in range(count):
        for _ in range(backend.accumulation):
            backend.forward_backward(next(stream))
        result = backend.step(RATE)
        rows.append([result.loss, result.grad_norm])
    return rows


def save(backend: Backend, folder: Path) -> None:
    """What a checkpoint holds of the backend, and its own files."""
    shapes, world = backend.shapes(), backend.world
    taken = Snapshot().take(backend.stretches(), lambda: None)
    shard = folder / shard_name(world.rank, world.size)
    on_all(lambda: write_shard(shard, taken, {key: shapes[key] for key, _, _ in taken}, backend.adam_steps), world)
    backend.save_native(folder, 5, 5 * GLOBAL_BATCH)


def weights(backend: Backend) -> dict[str, list[float]]:
    folder = Path(on_first(tempfile.mkdtemp, backend.world))
    save(backend, folder)
    with SavedState(folder) as saved:
        found = {name: tensor.flatten().tolist() for name, tensor in saved.weights().items()}
    on_all(lambda: None, backend.world)
    on_first(lambda: shutil.rmtree(folder), backend.world)
    return found


def survival(settings: Settings, world: World, folder: Path) -> dict[str, Any]:
    """Save after 5 steps and go on; load into a fresh backend and go on: both must stay together."""
    first = build(settings, world)
    train(first, world, 0, 5)
    save(first, folder)
    with torch.no_grad():  # as an evaluation does, past the backend
        first.module(next(batches(0, world, 1)))
    undisturbed = train(first, world, 5, 4)
    expected = weights(first)
    first.close()
    second = build(settings, world)
    second.restore(folder)
    resumed = {"rows": train(second, world, 5, 4), "weights": weights(second)}
    second.close()
    return {"undisturbed": undisturbed, "expected": expected, "resumed": resumed}


def poison(settings: Settings, world: World) -> dict[str, Any]:
    """A step whose gradient is not finite, and one that is refused, change nothing; the next one goes on."""
    backend = build(settings, world)
    train(backend, world, 0, 2)
    before = weights(backend)
    inputs, targets = next(batches(0, world, 1))
    if world.rank == 0:
        targets = torch.full_like(targets, float("nan"))
    backend.forward_backward((inputs, targets))
    result = backend.step(RATE)
    after = weights(backend)
    backend.forward_backward(next(batches(0, world, 1)))
    refused = backend.step(RATE, lambda loss, norm: f"{loss > 0 and norm > 0}")
    still = weights(backend)
    row = train(backend, world, 3, 1)[0]
    backend.close()
    return {
        "skipped": result.refused is not None,
        "unchanged": before == after,
        "refused": refused.refused,
        "unchanged by refusal": before == still,
        "loss_after": row[0],
        "moved": weights(backend) != after,
    }


def unused(settings: Settings, world: World) -> str:
    backend = build(settings, world, unused=True)
    try:
        train(backend, world, 0, 1)
    except SwiftError as error:
        return str(error)
    finally:
        backend.close()
    return ""


def main() -> None:
    task = json.loads(sys.argv[1])
    world = launch.start(EngineConfig(device="cpu"))
    report: dict[str, Any] = {"size": world.size, "launcher": world.launcher, "local_rank": world.local_rank}
    for name, settings in task.get("runs", {}).items():
        backend = build(settings, world)
        report[name] = {"rows": train(backend, world, 0, 30), "weights": weights(backend)}
        backend.close()
    for name, settings in task.get("survival", {}).items():
        report[f"survival {name}"] = survival(settings, world, Path(task["folder"]) / name)
    for name, settings in task.get("poison", {}).items():
        report[f"poison {name}"] = poison(settings, world)
    for name, settings in task.get("unused", {}).items():
        report[f"unused {name}"] = unused(settings, world)
    if world.rank == 0:
        Path(task["report"]).write_text(json.dumps(report), encoding="utf-8")
    launch.stop()


if __name__ == "__main__":
    main()
