"""Probes of frozen tokens that learn where to look: a linear readout of tokens' attended mean, mean and deviation, by target.

A mean over tokens keeps no second moments and a deviation none between channels. A weighted mean whose weights depend on the
tokens has both (Bardes et al. 2024, arXiv 2404.08471, probe so). Targets share nothing but the tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from swiftv2.config.task import TaskConfig
from swiftv2.downstream.metrics import choose_threshold, judge
from swiftv2.downstream.predictions import Predictions, by_subject, write
from swiftv2.files import write_file
from swiftv2.recipes.feature_sets import with_split
from swiftv2.recipes.probe import PREDICTIONS, RESULT
from swiftv2.recipes.task import TaskClips, TaskData, open_task

STEPS, EVERY, BATCH, RATE, WEIGHT_DECAY, WARMUP = 600, 50, 64, 5e-3, 0.05, 20
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of clips as `swiftv2 embed --tokens` left them.

    Attributes:
        values: (clips, tokens, channels) float32.
        place: row of each clip, by run key and first frame.
    """

    values: Tensor
    place: Mapping[tuple[str, int], int]

    @classmethod
    def read(cls, folder: Path, stage: int) -> "Tokens":
        """All shards; every token of this stage must count, since none is left out."""
        values, keys = [], []
        for path in sorted(folder.glob("clips-*.parquet")):
            clips = pd.read_parquet(path)
            group = zarr.open_group(folder / path.name.replace("clips", "tokens").replace(".parquet", ".zarr"), mode="r")
            if not np.asarray(group[f"counted{stage}"]).all():
                raise ValueError(f"{folder}: stage {stage} has tokens without brain")
            values.append(np.asarray(group[f"stage{stage}"]))
            keys += list(zip(clips["run"].astype(str), clips["start"].astype(int), strict=True))
        joined = torch.from_numpy(np.concatenate(values))
        return cls(joined.flatten(1, -2), {key: row for row, key in enumerate(keys)})

    def rows(self, data: TaskData, cut: TaskClips) -> NDArray[np.int64]:
        """Rows of the clips of a part."""
        runs = [data.store.runs[run].key for run in cut.clips.run.tolist()]
        return np.array([self.place[key, int(start)] for key, start in zip(runs, cut.clips.start, strict=True)])


class Readout(nn.Module):
    """One linear readout a target of what it attends to, of the mean and of the deviation over a clip's tokens.

    Args:
        channels: of a token.
        targets: how many.
        generator: where first values come from.
    """

    def __init__(self, channels: int, targets: int, generator: torch.Generator) -> None:
        super().__init__()
        self.score = nn.Parameter(0.02 * torch.randn(channels, targets, generator=generator))
        self.weight = nn.Parameter(torch.zeros(targets, 3 * channels))
        self.bias = nn.Parameter(torch.zeros(targets))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, channels) -> (B, targets): log odds, or numbers in training deviations."""
        attended = torch.einsum("bnk,bnc->bkc", torch.softmax(tokens @ self.score, dim=1), tokens)
        deviation = tokens.std(dim=1, unbiased=False)
        plain = torch.cat((tokens.mean(dim=1), deviation), dim=1)[:, None].expand(-1, attended.shape[1], -1)
        features = functional.layer_norm(torch.cat((attended, plain), dim=2), (self.weight.shape[1],))
        return (features * self.weight).sum(dim=2) + self.bias


def attentive_probe(config: TaskConfig, tokens: Tokens, name: str, out: Path, index: int, seed: int = 0) -> None:
    """Learn on the training clips of a split, take for each target the step that is best on validation clips, judge once.

    Args:
        config: the task; its targets are pairs of classes, or numbers.
        tokens: of its clips.
        name: of the method.
        out: folder for `split_INDEX/result.json` and its predictions.
        index: of the split.
        seed: of first values and batches.
    """
    folder = out / name / f"split_{index}"
    if (folder / RESULT).exists():
        return
    data = open_task(with_split(config, index))
    cuts = {part: data.cut(part) for part in ("train", "val", "test")}
    rows = {part: tokens.rows(data, cut) for part, cut in cuts.items()}
    numbers = np.array([target.kind == "regression" for target in config.targets])
    truth = cuts["train"].truth
    centre = np.where(numbers, np.nanmean(truth, axis=0), 0.0)
    spread = np.where(numbers, np.nanstd(truth, axis=0), 1.0)
    scaled = {part: torch.tensor((cut.truth - centre) / spread, dtype=torch.float32) for part, cut in cuts.items()}
    said = learn(tokens.values, rows, scaled, torch.tensor(numbers), seed)
    groups = {unit.key: f"family {unit.family}" if unit.family else f"unit {unit.key}" for unit in data.units}
    predictions: dict[str, dict[str, Predictions]] = {"val": {}, "test": {}}
    targets = {}
    for place, target in enumerate(config.targets):
        for part, found in predictions.items():
            raw = said[part][:, place]
            score = raw[:, None] * spread[place] + centre[place] if numbers[place] else _chances(raw)
            found[target.column] = _of_part(data, cuts[part], place, score)
        classes = data.classes(target)
        own = {part: by_subject(found[target.column]) for part, found in predictions.items()}
        threshold = choose_threshold(own["val"]) if classes else None
        judged = {part: judge(found, target.kind, classes, threshold, groups=groups) for part, found in own.items()}
        targets[target.column] = {"kind": target.kind, "classes": list(classes), "threshold": threshold, **judged}
    split = {key: getattr(data.config.split, key) for key in ("kind", "index", "count", "seed", "unit")}
    subjects = {part: len(keys) for part, keys in asdict(data.splits).items() if part in cuts}
    result = {"task": config.name, "name": name, "split": split, "subjects": subjects, "targets": targets, "seed": seed}
    result |= {"best_step": None, "select": {"metric": "loss", "value": None}, "overlap": None}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / PREDICTIONS, predictions)
    write_file(folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")


def learn(
    tokens: Tensor, rows: Mapping[str, NDArray[np.int64]], truth: Mapping[str, Tensor], numbers: Tensor, seed: int
) -> dict[str, Floats]:
    """What is said of validation and test clips, (clips, targets), at each target's best step."""
    train = tokens[rows["train"]]
    known = {part: (tokens[own] - train.mean((0, 1))) / train.std((0, 1)) for part, own in rows.items()}
    model = Readout(tokens.shape[2], len(numbers), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    best = torch.full((len(numbers),), torch.inf)
    said = {part: torch.zeros(len(rows[part]), len(numbers)) for part in ("val", "test")}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP, 0.5 * (1 + np.cos(np.pi * step / STEPS)))
        batch = rng.choice(len(rows["train"]), min(BATCH, len(rows["train"])), replace=False)
        optimizer.zero_grad()
        losses = _losses(model(known["train"][batch]), truth["train"][batch], numbers)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                now = {part: model(known[part]) for part in said}
                held_out = _losses(now["val"], truth["val"], numbers)
            better = held_out < best
            best = torch.where(better, held_out, best)
            said = {part: torch.where(better, now[part], said[part]) for part in said}
    return {part: values.double().numpy() for part, values in said.items()}


def _losses(raw: Tensor, truth: Tensor, numbers: Tensor) -> Tensor:
    """(targets,) means over the clips whose truth is known of square errors, or of cross-entropies."""
    held = ~torch.isnan(truth)
    wanted = torch.where(held, truth, 0.0)
    entropy = functional.binary_cross_entropy_with_logits(raw, wanted.clamp(0, 1), reduction="none")
    each = torch.where(numbers, (raw - wanted).square(), entropy)
    return torch.where(held, each, 0.0).sum(dim=0) / held.sum(dim=0)


def _chances(raw: Floats) -> Floats:
    positive = 1 / (1 + np.exp(-raw))
    return np.stack([1 - positive, positive], axis=1)


def _of_part(data: TaskData, cut: TaskClips, place: int, score: Floats) -> Predictions:
    run = np.array([data.store.runs[number].key for number in cut.clips.run.tolist()])
    truth = cut.truth[:, place]
    return Predictions(cut.unit, run, cut.clips.start.astype(np.int64), truth, score).rows(~np.isnan(truth))
