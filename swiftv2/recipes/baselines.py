"""What copying already achieves, and how much of the fluctuation a reconstruction explains beyond it.

Nearly all variance of BOLD is the static image, so a low loss shows nothing by itself. Two predictions from the visible
frames of the same clip stand beside every model: the mean of each voxel's visible frames, and interpolation between them
in time. All are judged on the masked brain voxels by R2 on the fluctuation, whose total is measured from each voxel's
mean over the whole clip: the mean of the visible frames can at best reach 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftv2.data import keyed

BASELINES = ("visible_mean", "time_interpolation")
MODEL = "model"
METHODS = (MODEL, *BASELINES)


def visible_mean(signal: Tensor, hidden: Tensor, brain: Tensor) -> Tensor:
    """Predict each voxel by the mean of its visible frames.

    Args:
        signal: (B, T, V) float.
        hidden: (B, T, V) bool, True = masked.
        brain: (B, V) bool.

    Returns:
        (B, T, V), constant in time (an expanded view). A voxel that is never visible is predicted by the mean over the
        visible brain voxels of its clip, and by 0 where there are none.
    """
    visible = ~hidden
    frames = visible.sum(1)
    total = torch.where(visible, signal, 0.0).sum(1)
    mean = torch.where(frames > 0, total / frames.clamp(min=1), _clip_mean(total, frames, brain)[:, None])
    return mean[:, None, :].expand_as(signal)


def time_interpolation(signal: Tensor, hidden: Tensor, brain: Tensor) -> Tensor:
    """Predict each voxel linearly between its nearest visible frames, constant before the first and after the last.

    Args:
        signal: (B, T, V) float.
        hidden: (B, T, V) bool, True = masked.
        brain: (B, V) bool.

    Returns:
        (B, T, V), equal to the signal where it is visible. A voxel that is never visible is predicted as by
        `visible_mean`.
    """
    before, since = _last_visible(signal, hidden)
    after, until = (x.flip(1) for x in _last_visible(signal.flip(1), hidden.flip(1)))
    between = since / (since + until).clamp_(min=1)
    weight = torch.where(since.isinf(), 1.0, torch.where(until.isinf(), 0.0, between))
    line = before + weight * (after - before)
    never = hidden.all(1, keepdim=True)
    return torch.where(never, visible_mean(signal, hidden, brain), line)


def _last_visible(signal: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Value of the last visible frame up to each frame, and the frames since then; 0 and infinity before the first."""
    value = torch.zeros_like(signal[:, 0])
    since = torch.full_like(value, torch.inf)
    values, ages = [], []
    for frame, masked in zip(signal.unbind(1), hidden.unbind(1), strict=True):
        value = torch.where(masked, value, frame)
        since = torch.where(masked, since + 1.0, 0.0)
        values.append(value)
        ages.append(since)
    return torch.stack(values, dim=1), torch.stack(ages, dim=1)


def _clip_mean(total: Tensor, frames: Tensor, brain: Tensor) -> Tensor:
    values = torch.where(brain, frames, 0).sum(1)
    return torch.where(brain, total, 0.0).sum(1) / values.clamp(min=1)


@dataclass(frozen=True)
class Estimate:
    """A mean over subjects with its bootstrap interval."""

    mean: float
    low: float | None
    """Lower end of the 95 % interval; None for fewer than two subjects."""
    high: float | None
    """Upper end."""


@dataclass(frozen=True)
class MethodScore:
    """How well one method predicts the masked brain voxels."""

    r2: Estimate | None
    """R2 on the fluctuation, a mean over subjects; None where no subject fluctuates."""
    l1: float
    """Mean over clips of the mean absolute error."""
    l2: float
    """Mean over clips of the mean squared error."""


@dataclass(frozen=True)
class CohortScore:
    """All methods on one cohort, or on all of them."""

    subjects: int
    clips: int
    methods: dict[str, MethodScore]
    l1_ratio: float | None
    """The model's L1 as a multiple of the better baseline's; None where that is 0."""
    l2_ratio: float | None
    """The model's L2 as a multiple of the better baseline's; None where that is 0."""
    r2_gain: dict[str, Estimate | None]
    """The model's R2 less each baseline's, paired by subject."""


class FluctuationScore:
    """Sums from which the scores of all methods follow, by subject.

    `totals` is one float64 tensor on the CPU; the sum of the ranks' totals (an all-reduce) is that of all clips.

    Args:
        cohort_of_subject: (subjects,) cohort of each subject of the store, as `RunTable.cohort_of_subject`.
        cohort_names: name of each cohort.
        methods: names of the predictions.
    """

    def __init__(
        self, cohort_of_subject: NDArray[np.int64], cohort_names: Sequence[str], methods: Sequence[str] = METHODS
    ) -> None:
        self.cohort_of_subject = np.asarray(cohort_of_subject)
        self.cohort_names = tuple(cohort_names)
        self.methods = tuple(methods)
        self.totals = torch.zeros(len(self.cohort_of_subject), 3 * len(self.methods) + 2, dtype=torch.float64)
        """(subjects, columns): squared errors, clips' mean absolute errors, clips' mean squared errors of each method;
        then squared fluctuation and clips."""

    @torch.no_grad()
    def update(
        self, predictions: Mapping[str, Tensor], target: Tensor, counted: Tensor, subject: Tensor, weight: Tensor
    ) -> None:
        """Add a batch.

        Args:
            predictions: (B, T, V) by method.
            target: (B, T, V) normalised signal.
            counted: (B, T, V) bool: masked brain voxels.
            subject: (B,) int64.
            weight: (B,): 0 for clips that do not count, else 1.
        """
        number = counted.sum((1, 2)).clamp(min=1)
        squared, absolute = [], []
        for name in self.methods:
            error = torch.where(counted, predictions[name].to(target.dtype) - target, 0.0)
            absolute.append(error.abs().sum((1, 2), dtype=torch.float64))
            squared.append(error.square_().sum((1, 2), dtype=torch.float64))
        fluctuation = torch.where(counted, target - target.mean(1, keepdim=True), 0.0)
        columns = [
            *squared,
            *(a / number for a in absolute),
            *(s / number for s in squared),
            fluctuation.square_().sum((1, 2), dtype=torch.float64),
            torch.ones(len(target), dtype=torch.float64, device=target.device),
        ]
        rows = torch.stack(columns, dim=1)
        rows = torch.where(weight[:, None] > 0, rows * weight[:, None].to(torch.float64), 0.0)
        self.totals.index_add_(0, subject.cpu(), rows.cpu())

    def report(self, seed: int, resamples: int = 2000) -> dict[str, CohortScore]:
        """Scores of each cohort that has clips by its name, and of all subjects together under `all`.

        Args:
            seed: of the bootstrap over subjects; the same seed resamples the same subjects for all methods.
            resamples: number of resamples.
        """
        totals = self.totals.numpy()
        seen = totals[:, -1] > 0
        groups = {"all": seen} if seen.any() else {}
        for index, name in enumerate(self.cohort_names):
            inside = seen & (self.cohort_of_subject == index)
            if inside.any():
                groups[name] = inside
        return {
            name: self._score(totals[inside], keyed.generator(seed, f"bootstrap {name}"), resamples)
            for name, inside in groups.items()
        }

    def _score(self, totals: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> CohortScore:
        number = len(self.methods)
        squared, absolute_means, squared_means = (totals[:, i * number : (i + 1) * number] for i in range(3))
        fluctuation, clips = totals[:, -2], totals[:, -1]
        moving = fluctuation > 0
        r2 = 1.0 - squared[moving] / fluctuation[moving, None]
        gains = [name for name in self.methods if name != MODEL] if MODEL in self.methods else []
        own = r2[:, [self.methods.index(MODEL)]] if gains else r2[:, :0]
        others = r2[:, [self.methods.index(name) for name in gains]]
        estimates = _bootstrap(np.hstack((r2, own - others)), rng, resamples)
        l1, l2 = (dict(zip(self.methods, m.sum(0) / clips.sum(), strict=True)) for m in (absolute_means, squared_means))
        return CohortScore(
            subjects=len(totals),
            clips=round(float(clips.sum())),
            methods={
                name: MethodScore(r2=estimate, l1=float(l1[name]), l2=float(l2[name]))
                for name, estimate in zip(self.methods, estimates[:number], strict=True)
            },
            l1_ratio=_ratio(l1),
            l2_ratio=_ratio(l2),
            r2_gain=dict(zip(gains, estimates[number:], strict=True)),
        )


def _ratio(losses: Mapping[str, float]) -> float | None:
    baselines = [losses[name] for name in losses if name != MODEL]
    if MODEL not in losses or not baselines or min(baselines) == 0.0:
        return None
    return float(losses[MODEL] / min(baselines))


def _bootstrap(values: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> list[Estimate | None]:
    """Mean and 95 % percentile interval over the rows (subjects) of each column."""
    subjects, columns = values.shape
    if subjects == 0:
        return [None] * columns
    if subjects == 1:
        return [Estimate(float(v), None, None) for v in values[0]]
    means = np.stack([values[rng.integers(0, subjects, subjects)].mean(0) for _ in range(resamples)])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return [Estimate(float(m), float(a), float(b)) for m, a, b in zip(values.mean(0), low, high, strict=True)]
