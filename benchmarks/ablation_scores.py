"""Trained cases on the same held-out clips and masks: loss and R2 on the fluctuation, paired by subject."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ablation_cases import CASES, configured, run_folder, training_words
from torch import Tensor

from swiftv2 import weights
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batches import evaluation_batches
from swiftv2.recipes.baselines import MODEL, CohortScore, FluctuationScore, time_interpolation, visible_mean
from swiftv2.recipes.data import Data, open_data
from swiftv2.recipes.export import export_checkpoint
from swiftv2.recipes.objective import Objective

BASELINES = ("visible_mean", "time_interpolation", "run_mean")
CLIPS = 60
"""Clips scored, spread evenly over the held-out subjects."""
PAIRS = (
    ("packed", "dense"),
    ("visible", "packed"),
    ("visible, skip", "visible"),
    ("decoupled", "dense"),
    ("decoupled, places", "decoupled"),
)
"""Cases whose R2 is compared, subject by subject: the first one less the second."""


@dataclass(frozen=True)
class Scores:
    """Scores of all cases of one seed."""

    losses: dict[str, float]
    """Mean over clips, mean squared error of hidden brain voxels, by case."""
    scores: CohortScore
    """R2 of cases and baselines."""
    differences: dict[tuple[str, str], CohortScore]
    """Of the pairs: `r2_gain` of the first over the second."""


def score(folder: Path, seed: int, frames: int | None = None, cases: Sequence[str] = tuple(CASES)) -> Scores:
    """Score the trained runs of a seed on clips of all held-out subjects.

    Args:
        folder: holds the runs.
        seed: theirs.
        frames: length of the clips; that of training when None.
        cases: which.
    """
    longer = () if frames is None else (f"clip.frames={frames}", f"model.frames={frames}")
    configs = {case: configured(case, (*training_words(folder, case, seed, 1), *longer)) for case in cases}
    config = configs[cases[0]]
    data = open_data(config)
    models = {case: _trained(folder, case, seed, configs[case], data) for case in cases}
    methods = (*cases, *BASELINES)
    table = data.table
    scores = FluctuationScore(table.cohort_of_subject, table.cohort_names, methods)
    pairs = [pair for pair in PAIRS if set(pair) <= set(cases)]
    paired = {pair: FluctuationScore(table.cohort_of_subject, table.cohort_names, (MODEL, pair[1])) for pair in pairs}
    losses, clips = dict.fromkeys(cases, 0.0), 0.0
    batches = evaluation_batches(
        data.store,
        data.heldout,
        config.mask,
        config.data.normalisation,
        seed=seed,
        batch=4,
        max_clips=CLIPS,
        reading=data.reading(config.data, torch.device("cpu")),
    )
    with batches, torch.no_grad():
        for batch in batches:
            predictions: dict[str, Tensor] = {}
            for case, model in models.items():
                loss, signal, predictions[case] = model.clip_losses(batch)
                losses[case] += float((loss * batch.weight).sum())
            clips += float(batch.weight.sum())
            hidden = models[cases[0]].hidden(batch)
            counted = hidden & batch.brain[:, None]
            predictions["visible_mean"] = visible_mean(signal, hidden, batch.brain)
            predictions["time_interpolation"] = time_interpolation(signal, hidden, batch.brain)
            predictions["run_mean"] = torch.zeros_like(signal)
            scores.update(predictions, signal, counted, batch.subject, batch.weight)
            for (first, second), one in paired.items():
                both = {MODEL: predictions[first], second: predictions[second]}
                one.update(both, signal, counted, batch.subject, batch.weight)
    return Scores(
        {case: loss / clips for case, loss in losses.items()},
        scores.report(seed)["all"],
        {pair: one.report(seed)["all"] for pair, one in paired.items()},
    )


def _trained(folder: Path, case: str, seed: int, config: PretrainConfig, data: Data) -> Objective:
    """The objective with the weights that a run ended with, by way of exported weights."""
    run = run_folder(folder, case, seed)
    exported = run / "exported"
    if not exported.is_dir():
        export_checkpoint(run, exported)
    tensors, _ = weights.load(exported)
    objective = Objective(config, torch.as_tensor(data.store.voxels).long(), data.store.grid.shape)
    objective.simmim.load_state_dict(tensors)
    return objective.eval()
