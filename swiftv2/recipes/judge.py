"""What a fine-tuned model is worth: predictions of all ranks, gathered, averaged to subjects, judged."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.model import MaskConfig
from swiftv2.config.task import LOWER_IS_BETTER
from swiftv2.data.samples.batches import evaluation_batches
from swiftv2.data.samples.reading import Reading
from swiftv2.downstream.metrics import choose_threshold, judge
from swiftv2.downstream.predictions import Predictions, by_subject
from swiftv2.engine.collective import gather
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError
from swiftv2.recipes.predictor import Finetuned, Output
from swiftv2.recipes.task import TaskClips, TaskData

SELECT = "val/select"
"""The task's metric on validation subjects, with the sign that makes lower better."""
Tick = Callable[[], None]


class Judge:
    """Predicts the clips of a part and judges its subjects; called by all ranks.

    Args:
        config: of the run.
        data: the opened task.
        module: what predicts; its weights are the engine's.
        world: this process among the ranks.
        reading: how clips are read.
        mask: that batches carry.
    """

    def __init__(
        self, config: FinetuneConfig, data: TaskData, module: Finetuned, world: World, reading: Reading, mask: MaskConfig
    ) -> None:
        self.config, self.data, self.module, self.world = config, data, module, world
        self.reading, self.mask = reading, mask

    def validate(self, part: TaskClips, tick: Tick) -> dict[str, float]:
        """Values that are logged of the validation subjects (collective); `val/select` chooses the best step.

        Args:
            part: their clips.
            tick: called between batches, on all ranks equally often; it may break the evaluation off by raising.
        """
        predictions = self.predict(part, tick, self.config.evaluate.max_clips)
        values: dict[str, float] = {}
        chosen = []
        for one in self.module.outputs:
            found = judge(by_subject(predictions[one.target.column]), one.target.kind, one.classes, bootstrap=0)
            values |= {
                f"val/{one.target.column}/{name}": metric["value"]
                for name, metric in found["metrics"].items()
                if metric["value"] is not None
            }
            chosen.append(self._selected(one, found))
        values["val/loss"] = _mean(
            [self._loss(one, values.get(f"val/{one.target.column}/loss")) for one in self.module.outputs]
        )
        return values | {SELECT: _mean(chosen)}

    def conclude(self, val: TaskClips, test: TaskClips | None, tick: Tick) -> tuple[dict[str, Any], dict[str, Any]]:
        """Judge validation subjects and, by the threshold that they gave, test subjects (collective).

        Returns:
            What results hold (`targets`, `select`), and all predictions by part and target.
        """
        parts = {"val": val} if test is None else {"val": val, "test": test}
        predictions = {name: self.predict(part, tick) for name, part in parts.items()}
        targets, chosen = {}, []
        for one in self.module.outputs:
            column = one.target.column
            subjects = {name: by_subject(found[column]) for name, found in predictions.items()}
            two = one.target.kind == "classification" and len(one.classes) == 2
            threshold = (choose_threshold(subjects["val"]) if one.target.threshold == "validation" else 0.5) if two else None
            judged = {
                name: judge(
                    found,
                    one.target.kind,
                    one.classes,
                    threshold=threshold,
                    bootstrap=self.config.evaluate.bootstrap,
                    seed=self.config.run.seed,
                    groups=self.data.together(parts[name]),
                )
                for name, found in subjects.items()
            }
            # As while training: a threshold that these very subjects gave would flatter them.
            chosen.append(self._selected(one, judge(subjects["val"], one.target.kind, one.classes, bootstrap=0)))
            targets[column] = {
                "kind": one.target.kind,
                "classes": list(one.classes),
                "threshold": threshold,
                "val": judged["val"],
                "test": judged.get("test"),
            }
        select = _mean(chosen)
        found = {
            "targets": targets,
            "select": {"metric": self.config.task.select, "value": select if np.isfinite(select) else None},
        }
        return found, predictions

    @torch.no_grad()
    def predict(self, part: TaskClips, tick: Tick, max_clips: int | None = None) -> dict[str, Predictions]:
        """Predictions of each target, of the clips that have it, the same on all ranks (collective)."""
        was_training = self.module.training
        self.module.eval()
        clips, raw = [], []
        batches = evaluation_batches(
            self.data.store,
            part.clips,
            self.mask,
            self.config.task.data.normalisation,
            seed=self.config.run.seed,
            batch=self.config.evaluate.batch,
            max_clips=max_clips,
            rank=self.world.rank,
            world_size=self.world.size,
            reading=self.reading,
            left_out=part.left_out,
        )
        try:
            with batches:
                for batch in batches:
                    tick()
                    counted = batch.weight.numpy() > 0
                    found = self.module.raw(batch.to(self.world.device)).cpu().numpy()
                    clips.append(batch.clip.numpy()[counted])
                    raw.append(found[counted])
        finally:
            self.module.train(was_training)
        every = gather((np.concatenate(clips), np.concatenate(raw)), self.world)
        clip = np.concatenate([one for one, _ in every])
        order = np.argsort(clip)
        clip, outputs = clip[order], np.concatenate([one for _, one in every])[order]
        if not len(clip):
            raise SwiftError("no clip of the held-out subjects can be used: `swiftv2 store verify` tells what is damaged")
        return self._as_predictions(part, clip, outputs)

    def _as_predictions(
        self, part: TaskClips, clip: np.ndarray[Any, Any], outputs: np.ndarray[Any, Any]
    ) -> dict[str, Predictions]:
        runs = np.array([self.data.store.runs[run].key for run in part.clips.run[clip].tolist()])
        predictions = {}
        for number, (one, score) in enumerate(zip(self.module.outputs, self.module.scores(outputs), strict=True)):
            truth = part.truth[clip, number]
            known = ~np.isnan(truth)
            predictions[one.target.column] = Predictions(
                unit=part.unit[clip][known],
                run=runs[known],
                clip=part.clips.start[clip][known],
                truth=truth[known],
                score=score[known],
            )
        return predictions

    def _selected(self, one: Output, found: dict[str, Any]) -> float:
        """The task's metric of one target, lower better; NaN where it is not defined."""
        name = self.config.task.select
        value = found["metrics"][name]["value"]
        if value is None:
            return float("nan")
        return self._loss(one, value) if name == "loss" else float(value) if name in LOWER_IS_BETTER else -float(value)

    @staticmethod
    def _loss(one: Output, value: float | None) -> float:
        """A loss that targets of different units can be averaged by: square errors in deviations of the training subjects."""
        if value is None:
            return float("nan")
        return float(value) if one.scale is None else float(value) / one.scale.std**2


def _mean(values: list[float]) -> float:
    """Mean over the targets of which the value is defined; NaN where it is of none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
