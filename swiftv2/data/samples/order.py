"""The one global order of samples: which clip stands at which position, for every world size the same.

Position p belongs to epoch p // clips. Without a mixture each epoch is a permutation of all clips; with one it holds each
cohort's share. All depends on the seed, the epoch, the store's version, the mixture and the exclusions only. The state of
a run is one number, the samples consumed, beside the exclusions that its ranks have agreed on.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftv2.data import keyed
from swiftv2.data.samples.mixing import Mixture
from swiftv2.errors import SwiftError

Integers = NDArray[np.int64]
_DRAWS = 64


class Exclusion(NamedTuple):
    """A clip that must not be used any more, agreed by all ranks."""

    clip: int
    """Clip id."""
    position: int
    """First position of the global order from which the exclusion holds: of a clip of no use, its step's first sample."""
    cause: str = "unusable"
    """Why; it is kept, and changes no order."""


class SampleOrder:
    """Order of the samples of a run; a pure function of seed, number of clips, mixture and exclusions.

    Clips are numbered by the store, so the order belongs to one version of the store. A clip that is excluded is
    replaced, where its turn comes, by another one of its cohort drawn for that turn (of any, where its cohort has none left):
    all other positions keep theirs.

    Args:
        seed: of the run.
        clips: how many there are.
        exclusions: what must not be used.
        mixture: how cohorts are mixed; each clip once an epoch when None.
        cohort: (clips,) cohort of each clip; all are one when None.
    """

    def __init__(
        self,
        seed: int,
        clips: int,
        exclusions: Iterable[Exclusion] = (),
        mixture: Mixture | None = None,
        cohort: Integers | None = None,
    ) -> None:
        if clips < 1:
            raise ValueError("an order needs at least one clip")
        self.seed = seed
        self.clips = clips
        self.mixture = mixture
        self.cohort = np.zeros(clips, dtype=np.int64) if cohort is None else cohort
        self._members: dict[int, Integers] = {}
        self._since: dict[int, Exclusion] = {}
        self._left_out = np.empty(0, dtype=np.int64)
        self.exclude(exclusions)
        self._epochs: dict[int, tuple[Integers, Integers]] = {}

    def exclude(self, exclusions: Iterable[Exclusion]) -> None:
        """Add exclusions; of two of one clip the earlier holds, of two from one position the first."""
        for one in exclusions:
            if not 0 <= one.clip < self.clips:
                raise ValueError(f"there is no clip {one.clip} to exclude; clips are 0 to {self.clips - 1}")
            if not self._excluded(one.clip, one.position):
                self._since[one.clip] = one
        self._left_out = np.sort(np.fromiter(self._since, dtype=np.int64, count=len(self._since)))

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """All exclusions, by clip."""
        return tuple(self._since[clip] for clip in sorted(self._since))

    def clips_at(self, positions: Integers) -> Integers:
        """Clip id at each position, same shape; see `samples_at`."""
        return self.samples_at(positions)[0]

    def samples_at(self, positions: Integers) -> tuple[Integers, Integers]:
        """Clip id at each position, and which pass over the clip's cohort it is, both of the same shape.

        Without a mixture the pass is the epoch. Of a clip that stands in for an excluded one it is -1 - position, so that no
        draw for it is that of its own turn.

        Raises:
            SwiftError: every clip is excluded.
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = positions // self.clips, positions % self.clips
        clips, passes = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            own, turns = self._epoch(int(epoch))
            clips[here], passes[here] = own[places[here]], turns[places[here]]
        for i in np.flatnonzero(np.isin(clips, self._left_out)):
            position = int(positions[i])
            if self._excluded(int(clips[i]), position):
                clips[i], passes[i] = self._substitute(int(clips[i]), int(passes[i]), position), -1 - position
        return clips, passes

    def _substitute(self, clip: int, turn: int, position: int) -> int:
        """What stands at a position whose turn it is for an excluded clip in this pass over its cohort."""
        rng = keyed.generator(self.seed, "substitute", turn, clip)
        for own in (self._cohort_of(clip), np.arange(self.clips)):
            # Draws rather than a permutation: with few exclusions one is enough, however many clips there are.
            for _ in range(_DRAWS):
                other = int(own[int(rng.bit_generator.random_raw()) % len(own)])
                if not self._excluded(other, position):
                    return other
            for other in own[keyed.permutation(rng, len(own))]:
                if not self._excluded(int(other), position):
                    return int(other)
        raise SwiftError("every clip of the training split is left out: mend the store, or begin a run on its newest version")

    def _cohort_of(self, clip: int) -> Integers:
        cohort = int(self.cohort[clip])
        if cohort not in self._members:
            self._members[cohort] = np.flatnonzero(self.cohort == cohort).astype(np.int64)
        return self._members[cohort]

    def composition(self, epoch: int) -> dict[int, int]:
        """How many samples of each cohort an epoch holds; a cohort of which nothing is left lends its own to the others."""
        numbers, counts = np.unique(self.cohort[self._epoch(epoch)[0]], return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def _excluded(self, clip: int, position: int) -> bool:
        known = self._since.get(clip)
        return known is not None and position >= known.position

    def _epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """Clips and passes of an epoch in their order."""
        if epoch not in self._epochs:
            # A batch may straddle two epochs; nobody looks further back.
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            if self.mixture is not None:
                self._epochs[epoch] = self.mixture.epoch(self.seed, epoch)
            else:
                order = keyed.permutation(keyed.generator(self.seed, "order", epoch), self.clips)
                self._epochs[epoch] = order, np.full(self.clips, epoch, dtype=np.int64)
        return self._epochs[epoch]


def rank_positions(first: int, micro_batch: int, accumulation: int, rank: int, world_size: int) -> Iterator[Integers]:
    """Positions that a rank reads in one step, a micro-batch at a time.

    Args:
        first: position of the step's first sample: the samples consumed before it.
        micro_batch: clips that a rank computes at a time.
        accumulation: micro-batches of a step.
        rank: which of the ranks.
        world_size: how many ranks.

    Yields:
        `accumulation` arrays of shape (micro_batch,); over all ranks they hold each of the step's positions once.
    """
    for turn in range(accumulation):
        begin = first + (turn * world_size + rank) * micro_batch
        yield np.arange(begin, begin + micro_batch, dtype=np.int64)
