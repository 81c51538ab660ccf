"""A model card for people beside exported weights: what the model is, what it takes, what it was trained on, how to load it."""

import math
from pathlib import Path
from typing import Any

from swiftv2 import weights
from swiftv2.config.load import read_yaml
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, write_file
from swiftv2.plan.model import plan_model
from swiftv2.recipes.data import CONTRACT
from swiftv2.records import METRICS, read_metrics

NAME = "MODEL_CARD.md"
UNKNOWN = "not recorded"
LIMITS = """- Input that differs from the table above in anything is not what the weights were made for; `swiftv2 embed` and
  `swiftv2 finetune` refuse it.
- Evaluate on subjects that were not trained on: where the card holds salted hashes, swiftv2 finds them by cohort and id.
- For research on groups. Nothing here is validated for diagnosis, or for decisions on single persons.
- Embeddings and predictions may carry what cohorts differ in: sites, scanners, head motion, age. Compare with the baselines of
  `swiftv2 task baselines` before a result is put down to brain function."""
LOADING = """```python
from pathlib import Path

from swiftv2.weights import load_encoder

encoder = load_encoder(Path("{folder}")).eval()
features = encoder(volume{brain})  # volume {shape} -> (B, {width}, h, w, d, t)
```"""


def write_model_card(folder: Path, run_dir: Path | None = None) -> Path:
    """Write `MODEL_CARD.md` beside exported weights; an older one is replaced.

    Args:
        folder: of the weights.
        run_dir: the run that they come from, for hours of data and losses; what it does not tell is `not recorded`.

    Returns:
        The file.

    Raises:
        SwiftError: the folder holds no weights.
    """
    card = weights.read_card(folder)
    run = {} if run_dir is None else _of_run(run_dir, (card.provenance or {}).get("step"))
    path = folder / NAME
    write_file(path, _text(folder, card, run))
    return path


def _text(folder: Path, card: weights.Card, run: dict[str, str]) -> str:
    model, plan, made = card.model, plan_model(card.model), card.provenance or {}
    brain = ", brain=brain" if model.packing == "subject" else ""
    shape = f"(B, {model.in_channels}, {', '.join(map(str, card.input.grid))}, {card.input.frames})"
    loading = LOADING.format(folder=folder.name, brain=brain, shape=shape, width=model.embed_dim * 2 ** (len(model.depths) - 1))
    objective = {"encoder": "an encoder alone", "simmim": "SimMIM (arXiv 2111.09886)", "visible_only": "visible tokens only"}
    architecture = {
        "Name": model.name,
        "Architecture": f"Swin4D, variant {model.variant} (SwiFT: arXiv 2307.05916), packing {model.packing}",
        "Encoder": f"{plan.encoder_parameters:,} parameters",
        "Cost": f"{plan.forward_flops_per_clip['encoder'] / 1e9:,.1f} GFLOPs a clip",
        "Widths": ", ".join(str(model.embed_dim * 2**stage) for stage in range(len(model.depths))),
        "Blocks": ", ".join(map(str, model.depths)),
        "Patch": " x ".join(map(str, model.patch_size)) + " (voxels, frames)",
        "Pretrained by": objective[card.kind] + _hidden(card),
    }
    training = {
        "Step": str(made.get("step", UNKNOWN)),
        "Task": made.get("task"),
        "Regime": made.get("regime"),
        "Subjects trained on": run.get("subjects") or _hashed(card),
        "Scan time trained on": run.get("hours", UNKNOWN),
        "Data": run.get("data", UNKNOWN),
        "Training loss": run.get("loss", UNKNOWN),
        "Held-out loss": run.get("heldout", UNKNOWN),
        "Made with": _made_with(made),
    }
    head = f"Weights of an fMRI encoder, by swiftv2. `weights.json` says the same for programs. SHA-256: `{card.sha256}`."
    parts = [
        f"# {model.name}",
        head,
        "## Architecture\n\n" + _table(architecture),
        "## Input\n\n" + _table(_input(card.input)),
        "## Training\n\n" + _table({name: value for name, value in training.items() if value is not None}),
        f"## Loading\n\n{loading}",
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _input(contract: weights.InputContract) -> dict[str, str]:
    seconds = contract.tr_seconds
    return {
        "Space": contract.space or UNKNOWN,
        "Orientation": contract.orientation,
        "Grid": f"{' x '.join(map(str, contract.grid))} voxels of {' x '.join(f'{mm:g}' for mm in contract.voxel_mm)} mm",
        "Voxels": {"template": "the template's brain", "box": "the whole box", None: UNKNOWN}[contract.mask],
        "Repetition time": "runs of several, or not recorded" if seconds is None else f"{seconds:g} s",
        "Clip": f"{contract.frames} frames, one in {contract.stride_within} of a run's",
        "Scaling": f"{contract.normalisation.kind}, by the statistics of the {contract.normalisation.scope}",
    }


def _hidden(card: weights.Card) -> str:
    if card.mask is None or card.loss is None:
        return ""
    return f", {card.mask.ratio:.0%} of {card.mask.kind} cells hidden, loss {card.loss.kind}"


def _hashed(card: weights.Card) -> str:
    return UNKNOWN if card.subjects is None else f"{len(card.subjects.hashes):,}"


def _made_with(made: dict[str, Any]) -> str:
    tools = made.get("made_with")
    if not isinstance(tools, dict):
        return UNKNOWN
    packages = tools.get("packages")
    torch = f", torch {packages['torch']}" if isinstance(packages, dict) and "torch" in packages else ""
    return f"swiftv2 {tools.get('swiftv2', UNKNOWN)}{torch}, {tools.get('world_size', UNKNOWN)} ranks"


def _of_run(run_dir: Path, step: int | None) -> dict[str, str]:
    """What a run directory, and the store that it names if that is there, tell of the training."""
    contract, found = read_json(run_dir / CONTRACT), dict[str, str]()
    train = set(contract["splits"]["train"])
    found["subjects"] = f"{len(train):,}"
    found["data"] = "swiftv2's generated cohort" if contract["store"]["generated"] else "measured scans"
    rows = read_metrics(run_dir / METRICS)
    for name, key in (("loss", "loss"), ("heldout", "heldout/loss")):
        known = [row for row in rows if isinstance(row.get(key), int | float) and (step is None or row["step"] <= step)]
        if known and math.isfinite(known[-1][key]):
            found[name] = f"{known[-1][key]:.4g} at step {known[-1]['step']}"
    hours = _hours(run_dir, train, contract)
    return found | ({} if hours is None else {"hours": f"{hours:,.1f} hours"})


def _hours(run_dir: Path, subjects: set[str], contract: dict[str, Any]) -> float | None:
    """Scan time of the training subjects' runs that gave clips; None where the store is not there or another one."""
    tree = read_yaml(run_dir / "config.yaml")
    data = tree["data"] if "data" in tree else tree["task"]["data"]
    try:
        store = Store.open(data["store"])
    except SwiftError:
        return None
    if store.attributes["store_id"] != contract["store"]["id"]:
        return None
    used = [run for run in store.runs if run.key in contract["clips"] and {run.subject, run.key} & subjects]
    return sum((run.frames - run.steady_from) * run.tr for run in used) / 3600
