"""From a run's checkpoint to weights that others can load: safetensors and a card, without DeepSpeed."""

import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swiftv2 import weights
from swiftv2.config.data import ClipConfig, NormalisationConfig
from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
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
        "input": contract_of(config, data).model_dump(mode="json"),
        "store": {
            "id": store.attributes["store_id"],
            "version": data.version,
            "fingerprint": store.fingerprint,
            "generated": store.generated,
        },
        "splits": asdict(splits),
        "clips": data.counts(),
        "subjects": hashes_of(store, splits.train),
    }
    write_file(path, json.dumps(content, indent=1) + "\n")


def contract_of(config: PretrainConfig, data: Data) -> weights.InputContract:
    """What a model pretrained on these clips expects as input."""
    return input_contract(data.store, config.clip, config.data.normalisation, set(data.train.run.tolist()))


def input_contract(
    store: Store, clip: ClipConfig, normalisation: NormalisationConfig, runs: Iterable[int]
) -> weights.InputContract:
    """What a model that is fed with clips of these runs of a store gets, or expects, as input."""
    times = {clip.target_tr or round(float(store.runs[i].tr), 3) for i in runs}
    grid = store.grid
    return weights.InputContract(
        orientation=grid.orientation,
        space=grid.space,
        grid=grid.shape,
        voxel_mm=grid.voxel_mm,
        tr_seconds=times.pop() if len(times) == 1 else None,
        frames=clip.frames,
        stride_within=clip.stride_within,
        normalisation=normalisation,
        mask="box" if len(store.voxels) == grid.size else "template",
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


def hashes_of(store: Store, subjects: Iterable[str], salt: str | None = None) -> dict[str, Any] | None:
    """Salted hashes of subjects by their keys, as cards hold them; None where the store's file of ids may not be read.

    Args:
        store: whose subjects.
        subjects: pseudonymous keys.
        salt: hexadecimal; a new one when None.
    """
    try:
        names = {key: name for name, key in store.subject_ids().items() if "/" in name}
    except SwiftError:
        return None
    salt = salt or secrets.token_hex(16)
    return weights.hash_subjects((names[key] for key in subjects), salt).model_dump(mode="json")
