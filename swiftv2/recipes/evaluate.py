"""Held-out evaluation: the model beside copying, on the same clips and masks, by cohort and over subjects."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.batches import evaluated_clips, evaluation_batches
from swiftv2.data.samples.masks import brain_ratio
from swiftv2.data.samples.normalise import scaling
from swiftv2.engine.collective import gather, on_first
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError
from swiftv2.files import write_file
from swiftv2.recipes.baselines import METHODS, MODEL, CohortScore, FluctuationScore, time_interpolation, visible_mean
from swiftv2.recipes.data import Data
from swiftv2.recipes.maps import VoxelSums
from swiftv2.recipes.objective import Objective
from swiftv2.recipes.pictures import Pictures

REPORT = "evaluation.json"
RUN_MEAN = "run_mean"


class HeldOut:
    """Evaluates an objective on the clips of held-out subjects; called with the step, by all ranks.

    Every call writes `evaluation.json` and what is to be drawn into the run directory and returns the values that are logged.
    Where nothing can be drawn, `tell` is told in a line, on all ranks.
    """

    def __init__(
        self, config: PretrainConfig, data: Data, objective: Objective, world: World, run_dir: Path, tell: Callable[[str], None]
    ) -> None:
        self.config, self.data, self.tell = config, data, tell
        self.objective, self.world, self.run_dir = objective, world, run_dir
        self.pictures = Pictures(config, data, objective, world, run_dir) if config.evaluate.pictures else None

    def __call__(self, step: int, tick: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Score the model and both baselines on the held-out clips (collective).

        Args:
            step: of the run.
            tick: called between batches, on all ranks equally often; it may break the evaluation off by raising.
        """
        was_training = self.objective.training
        self.objective.eval()
        try:
            loss, share, left_out, scores, sums = self._score(tick)
            values = self._report(step, (loss, share, left_out), scores)
            problem = None if self.pictures is None or sums is None else self.pictures.write(step, loss, scores, sums)
        finally:
            self.objective.train(was_training)
        if problem is not None:
            self.tell(f"step {step}: the pictures of the evaluation are not there: {problem}")
        return values

    def _report(self, step: int, whole: tuple[float, float, int], scores: FluctuationScore) -> dict[str, float]:
        """Write `evaluation.json` (collective); the values that are logged."""
        loss, share, left_out = whole
        report = scores.report(self.config.run.seed)
        groups = {name: dataclasses.asdict(score) for name, score in report.items()}
        content: dict[str, Any] = {
            "step": step,
            "split": self.config.evaluate.split,
            "loss": loss,
            "hidden_share_of_brain": share,
            "clips_left_out": left_out,
        }
        kind = self.config.loss.kind
        content |= {"loss_kind": kind, "distance": "l2" if kind == "l2" else "l1"}
        # JSON knows no NaN: null stands for what a diverged model scores.
        content = json.loads(json.dumps(content | {"groups": groups}), parse_constant=lambda _: None)
        text = json.dumps(content, indent=1) + "\n"
        on_first(lambda: write_file(self.run_dir / REPORT, text), self.world)
        values = {"heldout/loss": loss, **self._evenness()}
        return values | {k: v for name, score in report.items() for k, v in _flat(name, score).items()}

    def _evenness(self) -> dict[str, float]:
        """Training since the last evaluation, where ranks compute different tokens (collective).

        `packing/imbalance` is the rows of the rank with most over the mean of all ranks, `packing/shapes` the most sets of
        bucket shapes that a rank met: what bounds recompilation.
        """
        rows, shapes = self.objective.simmim.encoder.work.take()
        if self.config.model.packing != "subject" and self.config.objective == "simmim":
            return {}
        found = gather((rows, shapes), self.world)
        mean = sum(one[0] for one in found) / len(found)
        if not mean:
            return {}
        return {"packing/imbalance": max(one[0] for one in found) / mean, "packing/shapes": float(max(one[1] for one in found))}

    @torch.no_grad()
    def _score(self, tick: Callable[[], None]) -> tuple[float, float, int, FluctuationScore, VoxelSums | None]:
        """Mean loss and hidden share of the brain over held-out clips, how many are of no use, sums (collective)."""
        config, world = self.config, self.world
        # Per-voxel scaling hands the model each voxel's mean over the run: then that mean is a baseline too.
        knows_run_mean = config.data.normalisation.kind == "per_voxel" and config.data.normalisation.scope == "run"
        methods = (*METHODS, RUN_MEAN) if knows_run_mean else METHODS
        scores = FluctuationScore(self.data.table.cohort_of_subject, self.data.table.cohort_names, methods)
        sums, first = self._sums(methods)
        total = torch.zeros(4, dtype=torch.float64)
        batches = evaluation_batches(
            self.data.store,
            self.data.heldout,
            config.mask,
            config.data.normalisation,
            seed=config.run.seed,
            batch=config.evaluate.batch,
            max_clips=config.evaluate.max_clips,
            rank=world.rank,
            world_size=world.size,
            reading=self.data.reading(config.data, world.device),
            left_out=self.data.withdrawn_heldout,
        )
        with batches:
            for cpu_batch in batches:
                tick()
                batch = cpu_batch.to(world.device)
                losses, signal, reconstruction = self.objective.clip_losses(batch)
                hidden = self.objective.hidden(batch)
                counted = hidden & batch.brain[:, None]
                predictions = {
                    MODEL: reconstruction,
                    "visible_mean": visible_mean(signal, hidden, batch.brain),
                    "time_interpolation": time_interpolation(signal, hidden, batch.brain),
                }
                if RUN_MEAN in scores.methods:
                    predictions[RUN_MEAN] = torch.zeros_like(signal)
                scores.update(predictions, signal, counted, batch.subject, batch.weight)
                if sums is not None:
                    sums.update(predictions, signal, counted, *_owners(cpu_batch, first), self._units(batch))
                parts = (batch.weight, losses * batch.weight, brain_ratio(hidden, batch.brain) * batch.weight)
                total[:3] += torch.stack([part.sum() for part in parts]).double().cpu()
            total[3] = len(batches.faults())
        together = torch.cat((total, scores.totals.flatten())).to(world.device)
        if world.size > 1:
            dist.all_reduce(together)
        if sums is not None:
            sums.reduce(world)
        scores.totals = together[4:].view_as(scores.totals).cpu()
        clips, lost, hidden_shares, unusable = together[:4].tolist()
        if not clips:
            raise SwiftError("no held-out clip can be used: `swiftv2 store verify` tells what is damaged")
        return lost / clips, hidden_shares / clips, int(unusable), scores, sums

    def _sums(self, methods: tuple[str, ...]) -> tuple[VoxelSums | None, frozenset[int]]:
        """Sums by voxel, where maps are wanted; the first evaluated clip of each subject, by which subjects are counted."""
        if self.pictures is None:
            return None, frozenset()
        data = self.data
        cohorts = sorted(set(data.table.cohort[data.heldout.run].tolist()))
        clips = evaluated_clips(data.table, data.heldout, self.config.evaluate.max_clips, data.withdrawn_heldout)
        _, places = np.unique(data.table.subject[data.heldout.run[clips]], return_index=True)
        return VoxelSums(cohorts, len(data.store.voxels), methods, self.world.device), frozenset(clips[places].tolist())

    def _units(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Spread and centre that bring normalised values back to source units, (B, 1, 1) or (B, 1, V) each."""
        scale = scaling(batch, self.config.data.normalisation)
        return torch.where(torch.isfinite(scale.spread) & (scale.spread > 0), scale.spread, 0.0), scale.centre


def _owners(batch: Batch, first: frozenset[int]) -> tuple[list[int], list[float], list[bool]]:
    """Of each clip: place of its cohort, its weight, and whether it stands for its subject."""
    return batch.cohort.tolist(), batch.weight.tolist(), [clip in first for clip in batch.clip.tolist()]


def _flat(group: str, score: CohortScore) -> dict[str, Any]:
    """Values of one group as they stand in metrics.jsonl: `heldout/<group>/r2/<method>` and so on."""
    values: dict[str, float | None] = {f"heldout/{group}/l1_ratio": score.l1_ratio}
    for name, method in score.methods.items():
        values[f"heldout/{group}/r2/{name}"] = method.r2.mean if method.r2 else None
        values[f"heldout/{group}/l1/{name}"] = method.l1
        values[f"heldout/{group}/l2/{name}"] = method.l2
    return {key: value for key, value in values.items() if value is not None}
