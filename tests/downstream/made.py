"""Predictions of made-up subjects, for the tests."""

import numpy as np
from numpy.typing import ArrayLike

from swiftv2.downstream.predictions import Predictions


def subjects(truth: ArrayLike, score: ArrayLike, first: int = 0) -> Predictions:
    """One row a subject, of (n, K) or (n,) scores."""
    known = np.asarray(truth, dtype=np.float64)
    n = len(known)
    unit = np.array([f"u{first + i:05d}" for i in range(n)], dtype=np.str_)
    return Predictions(
        unit, np.full(n, "", dtype=np.str_), np.full(n, -1), known, np.asarray(score, dtype=np.float64).reshape(n, -1)
    )


def binary(truth: ArrayLike, positive: ArrayLike, first: int = 0) -> Predictions:
    """One row a subject, by the probability of the positive class."""
    said = np.asarray(positive, dtype=np.float64)
    return subjects(truth, np.stack([1 - said, said], axis=1), first)


def clips(seed: int, people: int, classes: int) -> Predictions:
    """Uneven numbers of runs and clips a subject; probabilities that know a little, or (classes=1) numbers."""
    rng = np.random.default_rng(seed)
    unit, run, clip, truth, score = [], [], [], [], []
    for person in range(people):
        own = float(rng.integers(classes)) if classes > 1 else float(rng.normal(50, 10))
        for r in range(rng.integers(1, 4)):
            for c in range(rng.integers(1, 6)):
                unit.append(f"s{person:03d}")
                run.append(f"s{person:03d}r{r}")
                clip.append(20 * c)
                truth.append(own)
                if classes > 1:
                    said = np.exp(rng.normal(size=classes) + 0.7 * (np.arange(classes) == own))
                    score.append(said / said.sum())
                else:
                    score.append([0.5 * own + rng.normal(20, 5)])
    return Predictions(np.array(unit), np.array(run), np.array(clip, dtype=np.int64), np.array(truth), np.array(score))
