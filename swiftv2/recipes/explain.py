"""What a prediction rests on: integrated gradients of a fine-tuned model over held-out clips, as a map in the store's space.

Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017 (arXiv 1703.01365); the check by randomised weights is
that of Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (arXiv 1810.03292).
"""

import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from swiftv2.data.samples.batches import evaluation_batches
from swiftv2.data.samples.reading import Reading
from swiftv2.data.store.layout import PRIVATE_FOLDER
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file
from swiftv2.models.initialise import initialise
from swiftv2.models.regimes import merge
from swiftv2.recipes.finetune import no_mask
from swiftv2.recipes.finetuned import load_finetuned
from swiftv2.recipes.predictor import Finetuned, Output
from swiftv2.recipes.task import TaskClips, TaskData

Floats = NDArray[np.float64]
Baseline = Literal["mean", "background"]
FACTS = "gradients.json"
FEWEST_SUBJECTS = 5
"""Real subjects whose mean is shown to others."""


@dataclass(frozen=True)
class Attribution:
    """A map and how far it can be trusted.

    Attributes:
        values: (H, W, D) mean over subjects of what a voxel adds to the output, summed over a clip's frames.
        output, at_baseline: mean output at the clips, and at the baselines.
        completeness_error: |sum of attributions - difference of outputs|, mean over clips, over the mean |difference|.
        randomised_correlation: rank correlation of |map| with that of a model of random weights; a map of the
            architecture or of the input alone would give about 1.
        subjects, clips: that were averaged.
    """

    values: Floats
    output: float
    at_baseline: float
    completeness_error: float
    randomised_correlation: float
    subjects: int
    clips: int


def explain(
    run_dir: Path,
    out: Path,
    *,
    target: str | None = None,
    label: str | None = None,
    clips: int = 32,
    steps: int = 32,
    baseline: Baseline = "mean",
    draw_subjects: bool = False,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Attribution:
    """Attribute a finished run's output to voxels, over validation subjects, and write it.

    Args:
        run_dir: of fine-tuning.
        out: new folder for `gradients.nii.gz` and `gradients.json`.
        target: column; the task's first when None.
        label: class whose log odds are attributed; the last when None.
        clips: validation clips at most, spread evenly over subjects.
        steps: of the path from baseline to clip.
        baseline: mean, each clip's mean image, so that fluctuation is explained; or the background's value everywhere.
        draw_subjects: whether a map of fewer than `FEWEST_SUBJECTS` real subjects is written, into a folder for its owner
            alone.
        progress: told clips done and clips in all.

    Raises:
        SwiftError: the run has not finished, the folder is there, or the map would show single real subjects.
        UsageError: the target or class is unknown.
    """
    if out.exists():
        raise SwiftError(f"{out}: already exists; choose another folder or delete it")
    module, data = load_finetuned(run_dir)
    chosen = next((one for one in module.outputs if target in (None, one.target.column)), None)
    if chosen is None:
        names = ", ".join(one.target.column for one in module.outputs)
        raise UsageError(f"--target {target}: the run predicts {names}")
    if label is not None and label not in chosen.classes:
        there = ", ".join(chosen.classes) or "none, for it is a number"
        raise UsageError(f"--class {label}: classes of {chosen.target.column} are {there}")
    place = None if not chosen.classes else len(chosen.classes) - 1 if label is None else chosen.classes.index(label)
    part = data.cut("val")
    _check_group(data, min(clips, len(set(_subjects(data, part)))), draw_subjects)
    # Before it is copied: torch's copies of parametrised layers share a class, and merging one would break the other.
    merge(module.predictor)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    found = attribute(module, data, chosen, place, part, clips, steps, baseline, progress)
    single = _check_group(data, found.subjects, draw_subjects)
    image = nib.Nifti1Image(found.values.astype(np.float32), data.store.grid.matrix)  # type: ignore[no-untyped-call]
    code = 4 if data.store.grid.space.startswith("MNI152") else 2
    image.set_sform(data.store.grid.matrix, code=code)  # type: ignore[no-untyped-call]
    image.header["xyzt_units"] = 2  # millimetres
    facts = {name: value for name, value in asdict(found).items() if name != "values"}
    facts |= {
        "task": data.config.name,
        "target": chosen.target.column,
        "output": "value in the label's units" if place is None else "log odds of the class against the others",
        "class": None if place is None else chosen.classes[place],
        "mean_output": found.output,
        "baseline": baseline,
        "steps": steps,
        "space": data.store.grid.space,
        "generated": data.store.generated,
    }
    out.mkdir(parents=True, mode=PRIVATE_FOLDER if single else 0o777)
    write_file(out / "gradients.nii.gz", gzip.compress(image.to_bytes(), mtime=0))
    write_file(out / FACTS, json.dumps(facts, indent=1) + "\n")
    return found


def attribute(
    module: Finetuned,
    data: TaskData,
    output: Output,
    place: int | None,
    part: TaskClips,
    clips: int,
    steps: int,
    baseline: Baseline,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Attribution:
    """Integrated gradients of one target over a part's clips, on the module's device.

    `place` is the class's among the target's, None for a number; other arguments are as of `explain`.
    """
    batches = evaluation_batches(
        data.store,
        part.clips,
        no_mask(module.predictor.encoder.config),
        module.config.task.data.normalisation,
        seed=module.config.run.seed,
        batch=1,
        max_clips=clips,
        reading=Reading(table=data.table),
        left_out=part.left_out,
    )
    random, subjects = _randomised(module), _subjects(data, part)
    sums: dict[str, list[tuple[Floats, Floats]]] = {}
    values = []
    total = min(clips, len(part.clips))
    with batches:
        for batch in batches:
            volume, brain = module.volumes(batch.to(module.voxels.device))
            start = _baseline(volume, brain, baseline)
            own, difference, reached = _integrate(module, output, place, volume, start, brain, steps)
            other, *_ = _integrate(random, output, place, volume, start, brain, max(steps // 4, 8))
            sums.setdefault(subjects[int(batch.clip[0])], []).append((own, other))
            values.append((float(own.sum()), difference, reached))
            progress(len(values), total)
    maps = [np.mean([one[kind] for one in of_unit], axis=0) for kind in (0, 1) for of_unit in sums.values()]
    mean, randomised = (np.mean(maps[i * len(sums) : (i + 1) * len(sums)], axis=0) for i in (0, 1))
    inside = (np.abs(mean) > 0) | (np.abs(randomised) > 0)
    correlation = stats.spearmanr(np.abs(mean[inside]), np.abs(randomised[inside])).statistic if inside.sum() > 2 else np.nan
    added, differences, outputs = (np.array(column) for column in zip(*values, strict=True))
    scale = float(np.abs(differences).mean())
    return Attribution(
        values=mean,
        output=float(outputs.mean()),
        at_baseline=float((outputs - differences).mean()),
        completeness_error=float(np.abs(added - differences).mean()) / scale if scale else 0.0,
        randomised_correlation=float(correlation),
        subjects=len(sums),
        clips=len(values),
    )


def _subjects(data: TaskData, part: TaskClips) -> list[str]:
    """Subject of each clip, by key: units may be runs or clips."""
    return [data.store.runs[run].subject for run in part.clips.run.tolist()]


def _check_group(data: TaskData, subjects: int, draw_subjects: bool) -> bool:
    """Whether a mean over so many subjects shows single real brains.

    Raises:
        SwiftError: it does, and nobody asked for that.
    """
    single = not data.store.generated and subjects < FEWEST_SUBJECTS
    if single and not draw_subjects:
        raise SwiftError(
            f"a map of {subjects} real subjects shows single brains: give {FEWEST_SUBJECTS} or more (--clips), or say "
            "--draw-subjects for files that you alone can read"
        )
    return single


def _integrate(
    module: Finetuned, output: Output, place: int | None, volume: Tensor, start: Tensor, brain: Tensor, steps: int
) -> tuple[Floats, float, float]:
    """Attributions (H, W, D) of one clip summed over frames, the difference of outputs, and the output at the clip."""
    # It is imported for this alone, and not by every run.
    from captum.attr import IntegratedGradients

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        every: Tensor = module.predictor(x, mask)
        raw = every[:, output.place : output.place + output.size]
        if place is None:
            return raw[:, 0] * output.scale.std + output.scale.mean if output.scale is not None else raw[:, 0]
        others = [number for number in range(output.size) if number != place]
        return raw[:, place] - torch.logsumexp(raw[:, others], dim=1)

    found = IntegratedGradients(forward).attribute(
        volume, start, additional_forward_args=(brain,), n_steps=steps, internal_batch_size=4
    )
    with torch.no_grad():
        reached, left = float(forward(volume, brain)[0]), float(forward(start, brain)[0])
    return found.detach()[0, 0].sum(dim=-1).double().cpu().numpy(), reached - left, reached


def _baseline(volume: Tensor, brain: Tensor, kind: Baseline) -> Tensor:
    if kind == "mean":
        return volume.mean(dim=-1, keepdim=True).expand_as(volume).contiguous()
    outside = ~brain[:, None]
    # Where the whole window is brain there is no background: the clip's lowest value stands for it.
    value = volume[outside].flatten()[0] if bool(outside.any()) else volume.min()
    return torch.full_like(volume, float(value))


def _randomised(module: Finetuned) -> Finetuned:
    """The same architecture with first values of another seed."""
    other = copy.deepcopy(module)
    initialise(other.predictor, other.predictor.encoder.config, module.config.run.seed + 1)
    return other.eval()
