"""Decoding what a person saw (8 categories and rest) from one slice of real BOLD: the whole path on real labels.

    python benchmarks/downstream_haxby.py --folder FOLDER --slice SLICE --out FILE

SLICE holds `bold.nii.gz`, `mask.nii.gz` and `attributes.txt` of Haxby et al. 2001 (Science 293:2425) as PyMVPA ships them
(CC BY-SA 3.0, not part of this repository): one slice of one subject, 12 runs. They become a BIDS-like tree and a store. Runs
are the groups: a fold tests on runs that nothing was fitted on, pretraining included. Minutes on two quiet cores; the
same folder goes on where it stands.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import nibabel as nib
import numpy as np
from downstream import Stages, Tree, difference, finetune_all, shown, swiftv2
from machine import page, parser, prose, table, write_page
from numpy.typing import NDArray

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import build
from swiftv2.config.task import TaskConfig
from swiftv2.errors import SwiftError
from swiftv2.recipes.comparison import Source, compare_folders
from swiftv2.recipes.probe import ProbeOptions, probe
from swiftv2.recipes.task import open_task

PACKAGES = ("torch", "zarr", "numpy", "scikit-learn", "nibabel")
TR = 2.5
STATE_SECONDS = 5.0
RUN = "sub-01/func/sub-01_task-objectviewing_run-{:02d}"
SALT = "5d41402abc4b2a76b9719d911017c592"
FOLDS = 4
REGIMES = ("frozen", "last_blocks", "scratch")
STEPS = {"pretrain": 120, "frozen": 100, "last_blocks": 100, "scratch": 100}
RATES = {"frozen": 1e-2, "last_blocks": 3e-3, "scratch": 3e-3}
TRAIN = {"global_batch": 16, "save_every": 100000, "save_minutes": 0, "deepspeed_files": False, "log_every": 20}
MODEL = {
    "name": "haxby",
    "variant": "decoupled",
    "image_size": [40, 20, 1],
    "frames": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [4, 8],
    "patch_size": [4, 4, 1, 2],
}
ENGINE = {"backend": "plain", "precision": "fp32", "device": "cpu"}
CLIP = {"frames": 4, "stride_between": 0.25}
NORMALISATION = {"kind": "znorm_zeroback", "scope": "clip"}


def write_tree(source: Path, folder: Path) -> None:
    """The slice as BIDS derivatives: a file a run with its mask and events, and a side-car for all.

    Raises:
        SwiftError: the files are not there, or do not fit one another.
    """
    attributes = source / "attributes.txt"
    if not attributes.is_file():
        raise SwiftError(f"--slice {source}: holds no attributes.txt; give the folder of the slice")
    image = nib.Nifti1Image.from_filename(source / "bold.nii.gz")
    mask = nib.Nifti1Image.from_filename(source / "mask.nii.gz")
    state, run = np.loadtxt(attributes, dtype=int).T
    if image.shape[3] != len(state):
        raise SwiftError(f"--slice {source}: {image.shape[3]} volumes and {len(state)} lines of attributes.txt do not fit")
    for number in np.unique(run).tolist():
        stem = folder / RUN.format(number + 1)
        stem.parent.mkdir(parents=True, exist_ok=True)
        volumes = np.flatnonzero(run == number)
        nib.save(image.slicer[..., volumes[0] : volumes[-1] + 1], f"{stem}_desc-preproc_bold.nii.gz")
        nib.save(mask, f"{stem}_desc-brain_mask.nii.gz")
        lines = [f"{onset:g}\t{duration:g}\t{label}" for onset, duration, label in events_of(state[run == number])]
        Path(f"{stem}_events.tsv").write_text("\n".join(["onset\tduration\ttrial_type", *lines]) + "\n")
    write_sidecar(folder)


def write_sidecar(folder: Path) -> None:
    """What holds for all runs."""
    (folder / "task-objectviewing_bold.json").write_text(json.dumps({"RepetitionTime": TR}))


def events_of(state: NDArray[np.int64]) -> Iterator[tuple[float, float, str]]:
    """Onset and duration in seconds of each stretch of volumes that is not rest, with the number of its category."""
    volume = 0
    for label, stretch in groupby(state.tolist()):
        length = len(list(stretch))
        if label:
            yield volume * TR, length * TR, f"category{label}"
        volume += length


def task_tree(folder: Path, fold: int) -> Tree:
    """The task: what is seen in each clip of four volumes that lie in one state, 5 s later."""
    return {
        "name": "haxby_slice",
        "targets": [{"column": "trial_type", "kind": "classification"}],
        "data": {"store": str(folder / "all.zarr"), "normalisation": NORMALISATION},
        "clip": CLIP,
        "split": {"kind": "kfold", "unit": "run", "count": FOLDS, "index": fold},
        "events": {"folder": str(folder / "bids"), "delay_seconds": STATE_SECONDS, "between": "rest"},
        "select": "balanced_accuracy",
    }


def build_store(source: Path, store: Path) -> None:
    """A store of the runs below a folder."""
    if not store.exists():
        own = ("grid.kind=source", "grid.mask=box", "grid.space=Haxby2001")
        swiftv2("store", "build", str(source), str(store), "--cohort", "haxby", "--salt", SALT, *own)


def pretrain_fold(folder: Path, fold: int) -> Path:
    """Weights pretrained on the training runs of a fold alone."""
    own = folder / f"fold_{fold}"
    weights = own / "weights"
    if weights.exists():
        return weights
    data = open_task(build(TaskConfig, task_tree(folder, fold), "task"))
    names = {run.key: run.run for run in data.store.runs}
    for key in data.splits.train:
        # Pretraining holds out subjects, and here is one: each run is given to it as a subject of its own.
        for path in (folder / "bids").glob(f"sub-01/func/*_run-{names[key]}_desc-*.nii.gz"):
            name = path.name.replace("sub-01_", f"sub-run{names[key]}_").replace(f"_run-{names[key]}_", "_")
            link = own / "bids" / f"sub-run{names[key]}" / "func" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.hardlink_to(path)
    write_sidecar(own / "bids")
    build_store(own / "bids", own / "train.zarr")
    tree = {
        "run": {"dir": str(own / "pretrain")},
        "data": {"store": str(own / "train.zarr"), "normalisation": NORMALISATION, "split": {"fractions": [0.8, 0.2, 0.0]}},
        "clip": CLIP,
        "model": MODEL,
        "mask": {"kind": "random", "ratio": 0.6, "patch_size": MODEL["patch_size"]},
        "loss": {"kind": "l2"},
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": 30},
        "engine": ENGINE,
        "train": TRAIN | {"max_steps": STEPS["pretrain"], "evaluate_every": 100000},
    }
    path = own / "pretrain.json"
    path.write_text(json.dumps(tree))
    swiftv2("pretrain", str(path), threads=1)
    swiftv2("checkpoint", "export", str(own / "pretrain"), str(weights), threads=1)
    return weights


def runs_of(folder: Path, fold: int) -> list[FinetuneConfig]:
    """What is fine-tuned in a fold, from the fold's weights."""
    weights = str(pretrain_fold(folder, fold))
    trees: list[Tree] = [
        {
            "run": {"dir": str(folder / "runs" / regime / f"split_{fold}")},
            "task": task_tree(folder, fold),
            "encoder": {"regime": regime, "weights": weights},
            "head": {"pool": "attention"},
            "optimizer": {"lr": RATES[regime]},
            "schedule": {"warmup_steps": 20},
            "engine": ENGINE,
            "train": TRAIN | {"max_steps": STEPS[regime], "evaluate_every": 50},
        }
        for regime in REGIMES
    ]
    return [build(FinetuneConfig, tree, "fine-tuning") for tree in trees]


def main(words: Sequence[str] | None = None) -> None:
    """Run it and write the page."""
    made = parser(__doc__)
    made.add_argument("--slice", type=Path, required=True, help="folder with bold.nii.gz, mask.nii.gz and attributes.txt")
    asked = made.parse_args(words)
    folder = asked.folder.resolve()
    stages = Stages(folder)
    if not (folder / "all.zarr").exists():
        with stages.timed("tree and store"):
            write_tree(asked.slice, folder / "bids")
            build_store(folder / "bids", folder / "all.zarr")
    with stages.timed("pretraining on the training runs of each fold"):
        configs = [config for fold in range(FOLDS) for config in runs_of(folder, fold)]
    with stages.timed("fine-tuning"):
        finetune_all(configs)
    with stages.timed("baselines"):
        probe(build(TaskConfig, task_tree(folder, 0), "task"), folder / "baselines", ProbeOptions())
    sources = [Source(folder / "baselines"), *(Source(folder / "runs" / regime) for regime in REGIMES)]
    found = compare_folders(sources, "majority")
    (folder / "comparison.json").write_text(json.dumps(found, indent=1))
    write_page(page("Decoding one slice of real BOLD", PACKAGES, body(found, stages)), asked.out)


def body(found: Tree, stages: Stages) -> list[str]:
    """The page's lines."""
    target = found["targets"]["trial_type"]
    accuracy, balanced = target["metrics"]["accuracy"]["methods"], target["metrics"]["balanced_accuracy"]["methods"]
    auroc = target["metrics"]["auroc"]["methods"]
    rows = [
        (name, shown(accuracy[name]), shown(balanced[name]), shown(auroc[name]), difference(balanced[name]["difference"]))
        for name in sorted(balanced, key=lambda name: -balanced[name]["mean"])
    ]
    sizes = target["subjects"]
    return [
        *prose(
            "Haxby et al. 2001, one slice of one subject: 12 runs of 121 volumes, 8 categories and rest, clips of four volumes "
            f"(10 s) that lie in one state, 5 s later. {FOLDS} folds of whole runs; one trains on {sizes['train'][0]} runs "
            f"and tests on {sizes['test'][0]}. Each fold has an encoder of its own, pretrained on its training runs alone. "
            f"Chance is {1 / len(target['classes']):.3f} for balanced accuracy. Means over folds; differences from majority "
            "with corrected resampled t intervals over folds (95 %). One subject: nothing here speaks of other people."
        ),
        *table(("method", "accuracy", "balanced accuracy", "AUROC", "balanced accuracy less majority's"), rows),
        "",
        *stages.lines(),
        "",
    ]


if __name__ == "__main__":
    main()
