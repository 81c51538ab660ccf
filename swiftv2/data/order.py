"""The one global order of samples: which clip stands at which position, for every world size the same.

Position p belongs to epoch p // clips; each epoch is a permutation of all clips that depends on the seed and the epoch
only. The state of a run is one number: the samples consumed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swiftv2.data import keyed
from swiftv2.errors import SwiftError

Integers = NDArray[np.int64]


class Exclusion(NamedTuple):
    """A clip that must not be used any more, agreed by all ranks."""

    clip: int
    """Clip id."""
    position: int
    """First position of the global order (a step's first sample) from which the exclusion holds."""


class SampleOrder:
    """Order of the samples of a run; a pure function of seed, number of clips and exclusions.

    Clips are numbered by the store, so the order belongs to one version of the store. A clip that is excluded is
    replaced, where its turn comes, by another one drawn for that epoch and clip: all other positions keep theirs.
    """

    def __init__(self, seed: int, clips: int, exclusions: Sequence[Exclusion] = ()) -> None:
        if clips < 1:
            raise ValueError("an order needs at least one clip")
        self.seed = seed
        self.clips = clips
        self.exclusions = tuple(exclusions)
        self._since: dict[int, int] = {}
        for clip, position in self.exclusions:
            if not 0 <= clip < clips:
                raise ValueError(f"there is no clip {clip} to exclude; clips are 0 to {clips - 1}")
            self._since[clip] = min(position, self._since.get(clip, position))
        self._permutations: dict[int, Integers] = {}

    def positions(self, step: int, global_batch: int) -> Integers:
        """Positions of the samples of a step (counted from 0) of a run of constant batch, shape (global_batch,)."""
        return np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)

    def epochs_at(self, positions: Integers) -> Integers:
        """Epoch of each position, same shape."""
        return positions // self.clips

    def clips_at(self, positions: Integers) -> Integers:
        """Clip id at each position, same shape.

        Raises:
            SwiftError: every clip is excluded.
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = positions // self.clips, positions % self.clips
        clips = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            clips[here] = self._permutation(int(epoch))[places[here]]
        for i in np.flatnonzero(np.isin(clips, list(self._since))) if self._since else ():
            clips[i] = self._substitute(int(clips[i]), int(epochs[i]), int(positions[i]))
        return clips

    def clip_at(self, position: int) -> int:
        """Clip id at one position."""
        return int(self.clips_at(np.array([position]))[0])

    def samples_for(self, step: int, global_batch: int) -> Integers:
        """Clip ids of a step of a run of constant batch, shape (global_batch,)."""
        return self.clips_at(self.positions(step, global_batch))

    def _permutation(self, epoch: int) -> Integers:
        if epoch not in self._permutations:
            # A batch may straddle two epochs; nobody looks further back.
            for old in [e for e in self._permutations if e < epoch - 1]:
                del self._permutations[old]
            self._permutations[epoch] = keyed.permutation(keyed.generator(self.seed, "order", epoch), self.clips)
        return self._permutations[epoch]

    def _substitute(self, clip: int, epoch: int, position: int) -> int:
        if position < self._since[clip]:
            return clip
        for other in keyed.permutation(keyed.generator(self.seed, "substitute", epoch, clip), self.clips):
            if position < self._since.get(int(other), position + 1):
                return int(other)
        raise SwiftError("every clip of the training split is excluded: mend the store or drop its broken runs")


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
