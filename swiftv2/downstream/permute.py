"""Permutations of labels over units: what a linear model scores where there is nothing to learn.

Relatives are alike, in labels and in features, so labels may not be exchanged freely: families exchange all their labels
with families of as many members, and relatives theirs among themselves (whole-block and within-block exchangeability:
Winkler et al. 2015, NeuroImage 123, 253). With a restriction, as to sites, only units of the same one exchange labels.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from swiftv2.config.task import TargetConfig
from swiftv2.downstream.linear import fit_predict
from swiftv2.errors import SwiftError

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]
STRENGTH = 1.0
"""Of the penalty, the same for all permutations and for the true labels: chosen in advance, so that nobody is favoured."""


@dataclass(frozen=True, eq=False)
class Part:
    """One split, ready for linear models.

    Attributes:
        prepared: (n, d) features by `linear.prepare`.
        train: (n,) training rows.
        test: (n,) rows that are judged.
    """

    prepared: Floats
    train: Rows
    test: Rows


class Exchange:
    """Draws permutations of the rows' labels that families, and what else is to be kept, allow.

    Args:
        known: (n,) rows that have a label; the others keep having none.
        families: (n,) family of each row; rows of one family have one name.
        within: (n,) such as the site: labels stay in it; None lets them go anywhere.
    """

    def __init__(self, known: Rows, families: NDArray[np.str_], within: NDArray[np.str_] | None = None) -> None:
        self.size = len(known)
        members: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row in np.flatnonzero(known).tolist():
            # A family with members in two places exchanges in each of them apart.
            members["" if within is None else str(within[row]), str(families[row])].append(row)
        self._strata: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
        for (place, _), rows in sorted(members.items()):
            self._strata[place, len(rows)].append(rows)

    @property
    def share_moved(self) -> float:
        """Share of the rows that may get the label of somebody else's family."""
        counted = sum(size * len(blocks) for (_, size), blocks in self._strata.items())
        moving = sum(size * len(blocks) for (_, size), blocks in self._strata.items() if len(blocks) > 1)
        return moving / max(counted, 1)

    def draw(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """(n,) the row whose label each row gets."""
        source = np.arange(self.size, dtype=np.int64)
        for blocks in self._strata.values():
            for block, giver in zip(blocks, rng.permutation(len(blocks)).tolist(), strict=True):
                source[block] = rng.permutation(blocks[giver])
        return source


def permute(
    parts: Sequence[Part],
    numbers: Floats,
    target: TargetConfig,
    classes: Sequence[str],
    exchange: Exchange,
    groups: NDArray[np.str_],
    count: int,
    *,
    seed: int = 0,
    strengths: Sequence[float] = (STRENGTH,),
) -> dict[str, Any]:
    """AUROC on the test rows, mean over splits, for permuted labels and for the true ones.

    Each permutation goes through all that the true labels go through: it is learned on the training rows and judged on the
    test rows of every split; only what labels have no part in (`linear.prepare`) is done once. A split whose test rows have
    one class under a permutation is left out of its mean.

    Args:
        parts: splits.
        numbers: (n,) class numbers, NaN where missing.
        target: a classification target.
        classes: its classes in order; of more than two, AUROC is the mean over each against the rest.
        exchange: how labels may move.
        groups: (n,) who stays together in inner folds, where there are several strengths to choose from.
        count: permutations.
        seed: of the permutations.
        strengths: of the penalty; several are chosen from on inner folds, for each permutation anew.

    Returns:
        count, values (one a permutation), mean, std, error (standard error of the mean), low and high (their 95 % range),
        observed (the true labels), p (one-sided, with the true labels as one of the draws: Phipson and Smyth 2010) and
        share_moved.

    Raises:
        SwiftError: it is no classification target, labels cannot move, or no split can be judged.
    """
    if target.kind != "classification":
        raise SwiftError(f"target {target.column}: permutations judge AUROC, which is for classes")
    if exchange.share_moved == 0.0:
        raise SwiftError(f"target {target.column}: no two families are of one size in one site, so no label can move")
    rng = np.random.default_rng([seed, count])

    def score(labels: Floats) -> float:
        found = [_auroc(part, labels, target, classes, groups, strengths, seed) for part in parts]
        known = [one for one in found if one is not None]
        if not known:
            raise SwiftError(f"target {target.column}: no split has every class among its training and test subjects")
        return float(np.mean(known))

    observed = score(numbers)
    values = [score(numbers[exchange.draw(rng)]) for _ in range(count)]
    spread = float(np.std(values, ddof=1)) if count > 1 else None
    return {
        "count": count,
        "values": values,
        "mean": float(np.mean(values)),
        "std": spread,
        "error": None if spread is None else spread / float(np.sqrt(count)),
        "low": float(np.quantile(values, 0.025)),
        "high": float(np.quantile(values, 0.975)),
        "observed": observed,
        "p": (1 + sum(value >= observed for value in values)) / (count + 1),
        "share_moved": exchange.share_moved,
    }


def _auroc(
    part: Part,
    labels: Floats,
    target: TargetConfig,
    classes: Sequence[str],
    groups: NDArray[np.str_],
    strengths: Sequence[float],
    seed: int,
) -> float | None:
    """None where the training or test rows lack a class."""
    test = part.test & ~np.isnan(labels)
    train = part.train & ~np.isnan(labels)
    if min(len(set(labels[test])), len(set(labels[train]))) < len(classes):
        return None
    score = fit_predict(part.prepared, labels, train, target, classes, groups, seed=seed, strengths=strengths).score[test]
    truth = labels[test].astype(np.int64)
    if len(classes) == 2:
        return float(roc_auc_score(truth, score[:, 1]))
    return float(roc_auc_score(truth, score, multi_class="ovr", labels=range(len(classes))))
