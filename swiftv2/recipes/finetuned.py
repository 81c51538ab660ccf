"""What becomes of a finished fine-tuning run: its module again, and weights that others can load."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from swiftv2 import weights
from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import load
from swiftv2.data.store.reader import Store
from swiftv2.engine.checkpoint import read_weights, verify_checkpoint
from swiftv2.errors import SwiftError
from swiftv2.files import read_json
from swiftv2.models.regimes import merge
from swiftv2.recipes.data import CONTRACT
from swiftv2.recipes.export import hashes_of
from swiftv2.recipes.finetune import RESULT, best_of, build_module
from swiftv2.recipes.predictor import Finetuned
from swiftv2.recipes.task import TaskData, open_task

HEAD, HEAD_CARD = "head.safetensors", "head.json"


def is_finetuning(run_dir: Path) -> bool:
    """Whether a run directory is of fine-tuning: it has a contract of a task."""
    path = run_dir / CONTRACT
    return path.exists() and read_json(path).get("recipe") == "finetune"


def load_finetuned(run_dir: Path) -> tuple[Finetuned, TaskData]:
    """The module of a finished run at its best step, in evaluation mode on the CPU, and its task.

    Raises:
        SwiftError: the run has not finished, its checkpoint is damaged, or its weights or store are gone.
    """
    if not (run_dir / RESULT).exists():
        raise SwiftError(f"{run_dir}: has no {RESULT}: give a fine-tuning run that has finished")
    config = load(FinetuneConfig, run_dir / "config.yaml")
    card = None if config.encoder.weights is None else weights.read_card(config.encoder.weights)
    data = open_task(config.task, run_dir)
    module = build_module(config, data, data.cut("train"), card)
    best = best_of(run_dir)
    verify_checkpoint(best)
    module.load_state_dict(read_weights(best))
    return module.eval(), data


def export_finetuned(run_dir: Path, folder: Path) -> Path:
    """Write a finished run's encoder as weights, with its head beside them, into a new folder.

    Low-rank additions are merged. The subjects on the card are those of pretraining, where their hashes are known, and those
    that trained here. `head.json` tells pooling, head, classes and scales; `head.safetensors` holds the tensors.

    Raises:
        SwiftError: the run has not finished, is damaged, or the folder exists.
    """
    module, data = load_finetuned(run_dir)
    merge(module)
    config, encoder = module.config, module.predictor.encoder
    contract, result = read_json(run_dir / CONTRACT), read_json(run_dir / RESULT)
    outputs = [
        {
            "column": one.target.column,
            "kind": one.target.kind,
            "classes": list(one.classes),
            "first_output": one.place,
            "scale": None if one.scale is None else {"mean": one.scale.mean, "std": one.scale.std},
            "threshold": result["targets"][one.target.column]["threshold"],
        }
        for one in module.outputs
    ]
    state = {
        name: tensor.contiguous() for name, tensor in module.predictor.state_dict().items() if not name.startswith("encoder.")
    }
    environment = read_json(run_dir / "environment.json")
    made_with = {name: environment[name] for name in ("swiftv2", "python", "packages", "git", "world_size")}
    card: dict[str, Any] = {
        "kind": "encoder",
        "model": encoder.config.model_dump(mode="json"),
        "input": contract["input"],
        "subjects": _subjects(config, data.store, data.splits.train, data),
        "provenance": {
            "task": config.task.name,
            "regime": config.encoder.regime,
            "step": result["best_step"],
            "made_with": made_with,
        },
    }
    head = {"head": config.head.model_dump(mode="json"), "outputs": outputs}
    beside = {HEAD: save(state), HEAD_CARD: (json.dumps(head, indent=1) + "\n").encode()}
    weights.export(folder, encoder, card, beside)
    return folder


def _subjects(config: FinetuneConfig, store: Store, keys: tuple[str, ...], data: TaskData) -> dict[str, Any] | None:
    """Hashes of everybody that the weights have seen, by one salt; None where somebody's cannot be told."""
    trained = {store.runs[run].subject for key in keys for run in data.runs_of[key]}
    if config.encoder.weights is None or config.encoder.regime == "scratch":
        return hashes_of(store, trained)
    before = weights.read_card(config.encoder.weights).subjects
    if before is None:
        return None
    now = hashes_of(store, trained, before.salt)
    return None if now is None else {"salt": before.salt, "hashes": sorted({*before.hashes, *now["hashes"]})}
