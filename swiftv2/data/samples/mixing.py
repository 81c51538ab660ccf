"""How many clips of each cohort an epoch holds, and which of them: several cohorts in one run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.data import MixingConfig
from swiftv2.data import keyed
from swiftv2.errors import UsageError

Integers = NDArray[np.int64]


def cohort_shares(config: MixingConfig, names: Sequence[str], clips: Sequence[int]) -> NDArray[np.float64]:
    """Share of each cohort among the samples of an epoch, (cohorts,), summing to 1.

    Proportional: as many as it has clips. Temperature T: in proportion to clips^(1/T) (T=1 is proportional, a large T
    makes cohorts equal; multilingual language models mix so, Conneau et al., arXiv 1911.02116). Weights: as they say.

    Args:
        config: how cohorts are mixed.
        names: cohorts of the run.
        clips: training clips of each, at least one.

    Raises:
        UsageError: the weights do not name just the cohorts of the run.
    """
    counts = np.asarray(clips, dtype=np.float64)
    if config.kind == "weights":
        given = config.weights or {}
        unlike = sorted(set(given) ^ set(names))
        if unlike:
            raise UsageError(
                f"data.mixing.weights must name each cohort of the run once, {', '.join(names)}: look at {unlike[0]!r} "
                "(data.cohorts chooses cohorts)"
            )
        counts = np.asarray([given[name] for name in names], dtype=np.float64)
    elif config.kind == "temperature":
        counts = counts ** (1.0 / float(config.temperature or 1.0))
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


@dataclass(frozen=True, eq=False)
class Mixture:
    """Cohorts of the clips of a run and how many samples of each an epoch holds."""

    members: tuple[Integers, ...]
    """Clip ids of each cohort, ascending."""
    quota: tuple[int, ...]
    """Samples of each cohort in one epoch; they sum to the number of clips."""

    @classmethod
    def make(cls, config: MixingConfig, names: Sequence[str], cohort: Integers) -> "Mixture | None":
        """The mixture of a run; None where cohorts come as often as they have clips.

        Args:
            config: how cohorts are mixed.
            names: names of all cohorts of the store.
            cohort: (clips,) place of each clip's cohort in `names`.
        """
        if config.kind == "proportional":
            return None
        present = np.unique(cohort)
        members = tuple(np.flatnonzero(cohort == place).astype(np.int64) for place in present)
        shares = cohort_shares(config, [names[place] for place in present], [len(one) for one in members])
        return cls(members, _largest_remainder(shares, len(cohort)))

    def epoch(self, seed: int, epoch: int) -> tuple[Integers, Integers]:
        """Clip ids of an epoch in their order, and the pass over its cohort to which each belongs, (clips,) each.

        Each cohort goes on where the former epoch left it, so that its clips are used equally often, within one.
        """
        clips, passes = [], []
        for number, (own, quota) in enumerate(zip(self.members, self.quota, strict=True)):
            places = np.arange(epoch * quota, (epoch + 1) * quota, dtype=np.int64)
            turn, place = places // len(own), places % len(own)
            for one in range(int(turn[0]), int(turn[-1]) + 1) if quota else ():
                order = keyed.permutation(keyed.generator(seed, "cohort order", number, one), len(own))
                first, last = np.searchsorted(turn, (one, one + 1))
                clips.append(own[order[place[first:last]]])
            passes.append(turn)
        shuffled = keyed.permutation(keyed.generator(seed, "mixture", epoch), sum(self.quota))
        return np.concatenate(clips)[shuffled], np.concatenate(passes)[shuffled]


def _largest_remainder(shares: NDArray[np.float64], total: int) -> tuple[int, ...]:
    """Whole numbers in these proportions that sum to `total`."""
    exact = shares * total
    whole = np.floor(exact).astype(np.int64)
    first = np.argsort(-(exact - whole), kind="stable")[: total - int(whole.sum())]
    whole[first] += 1
    return tuple(int(n) for n in whole)
