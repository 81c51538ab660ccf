"""From a run's checkpoint to weights that others can load: safetensors and a card, without DeepSpeed."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swiftv2 import weights
from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.splits import Splits
from swiftv2.data.store.reader import Store
from swiftv2.engine.checkpoint import latest, list_checkpoints, read_weights, verify_checkpoint
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, write_file
from swiftv2.recipes.data import CONTRACT, Data

PREFIX = "simmim."


def write_contract(run_dir: Path, config: PretrainConfig, data: Data) -> None:
    """Leave in the run directory what a resumed run and exported weights must know of their data; written once.

    It holds the input contract, store and version, the subjects of each part by pseudonymous key, and the salted hashes of
    the training subjects (null where the store's file of ids may not be read).
    """
    path = run_dir / CONTRACT
    if path.exists():
        return
    store, splits = data.store, data.splits
    content = {
        "input": input_contract(config, data).model_dump(mode="json"),
        "store": {
            "id": store.attributes["store_id"],
            "version": data.version,
            "fingerprint": store.fingerprint,
            "generated": store.generated,
        },
        "splits": asdict(splits),
        "clips": data.counts(),
        "subjects": _hashes(store, splits),
    }
    write_file(path, json.dumps(content, indent=1) + "\n")


def input_contract(config: PretrainConfig, data: Data) -> weights.InputContract:
    """What a model trained on these clips expects as input."""
    times = {config.clip.target_tr or round(float(data.store.runs[i].tr), 3) for i in set(data.train.run.tolist())}
    grid = data.store.grid
    return weights.InputContract(
        orientation=grid.orientation,
        space=grid.space,
        grid=grid.shape,
        voxel_mm=grid.voxel_mm,
        tr_seconds=times.pop() if len(times) == 1 else None,
        frames=config.clip.frames,
        stride_within=config.clip.stride_within,
        normalisation=config.data.normalisation,
        mask="box" if len(data.store.voxels) == grid.size else "template",
    )


def export_checkpoint(run_dir: Path, folder: Path, step: int | None = None) -> Path:
    """Write the weights of a checkpoint and their card into a new folder.

    Args:
        run_dir: a run directory.
        folder: must not exist.
        step: step of the checkpoint; the newest whole one when None.

    Raises:
        SwiftError: no such checkpoint, a damaged one, or the folder exists.
    """
    found = latest(run_dir) if step is None else next((c for c in list_checkpoints(run_dir) if c.step == step), None)
    if found is None:
        have = ", ".join(str(c.step) for c in list_checkpoints(run_dir)) or "none"
        raise SwiftError(f"{run_dir}: no whole checkpoint{'' if step is None else f' of step {step}'}; there are: {have}")
    try:
        verify_checkpoint(found.path)
    except SwiftError as error:
        older = [c.step for c in list_checkpoints(run_dir) if c.problem is None and c.step < found.step]
        raise SwiftError(f"{error}{f'; say --step {older[0]} for the one before' if older else ''}") from error
    config = load(PretrainConfig, run_dir / "config.yaml")
    contract, environment = read_json(run_dir / CONTRACT), read_json(run_dir / "environment.json")
    state = {name.removeprefix(PREFIX): tensor for name, tensor in read_weights(found.path).items()}
    made_with = {name: environment[name] for name in ("swiftv2", "python", "packages", "git", "world_size")}
    card: dict[str, Any] = {
        "kind": config.objective,
        "model": config.model.model_dump(mode="json"),
        "mask": config.mask.model_dump(mode="json"),
        "loss": config.loss.model_dump(mode="json"),
        "input": contract["input"],
        "subjects": contract["subjects"],
        "provenance": {"step": found.step, "store": contract["store"], "made_with": made_with},
    }
    weights.export(folder, state, card)
    return folder


def _hashes(store: Store, splits: Splits) -> dict[str, Any] | None:
    try:
        names = {key: name for name, key in store.subject_ids().items() if "/" in name}
    except SwiftError:
        return None
    return weights.hash_subjects((names[key] for key in splits.train), secrets.token_hex(16)).model_dump(mode="json")
