"""From runs to clips: which stretches of which runs are samples."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.data import ClipConfig
from swiftv2.data.sources import RunInfo
from swiftv2.errors import UsageError

_NAMED = 10


@dataclass(frozen=True, eq=False)
class ClipIndex:
    """All clips of some runs of a store; a clip's id is its place in these arrays."""

    run: NDArray[np.int64]
    """(clips,) index of the run in the store."""
    start: NDArray[np.int64]
    """(clips,) first frame."""
    frames: int
    """Frames of each clip."""
    stride: int
    """Every how many frames of the run one is taken."""
    too_short: tuple[str, ...] = ()
    """Keys of the runs that hold no clip: for the caller to report."""

    def __len__(self) -> int:
        return len(self.run)


def clip_duration(config: ClipConfig) -> int:
    """Frames of a run that one clip spans."""
    return config.frames * config.stride_within


def clip_starts(frames: int, config: ClipConfig) -> NDArray[np.int64]:
    """First frames of the clips of a run of `frames` volumes, ascending; empty when the run is too short."""
    duration = clip_duration(config)
    step = max(round(config.stride_between * duration), 1)
    return np.arange(0, frames - duration + 1, step, dtype=np.int64)


def select_runs(
    runs: Sequence[RunInfo], subjects: Collection[str], cohorts: Collection[str] | None = None
) -> NDArray[np.int64]:
    """Indices of the runs of these subjects (pseudonymous keys), ascending; of some cohorts only where they are given.

    Withdrawn runs are never among them.

    Raises:
        UsageError: a cohort is unknown to the store.
    """
    known = {run.cohort for run in runs}
    unknown = sorted(set(cohorts or ()) - known)
    if unknown:
        raise UsageError(f"data.cohorts: the store has no cohort {unknown[0]!r}; it has {', '.join(sorted(known))}")
    wanted, kept = set(subjects), known if cohorts is None else set(cohorts)
    return np.array(
        [i for i, run in enumerate(runs) if run.subject in wanted and run.cohort in kept and not run.withdrawn], dtype=np.int64
    )


def index_clips(
    runs: Sequence[RunInfo],
    config: ClipConfig,
    chosen: Iterable[int] | None = None,
    *,
    allow_mixed_tr: bool = False,
) -> ClipIndex:
    """All clips of the chosen runs, in the order of the store's runs and then of their starts.

    Leading non-steady volumes, whose signal has not settled, are in no clip.

    Args:
        runs: all runs of the store.
        config: length and strides of the clips.
        chosen: indices of the runs to take; all when None.
        allow_mixed_tr: whether runs of different repetition times may meet.

    Raises:
        UsageError: no run is chosen, none holds a clip, or repetition times are mixed without leave.
    """
    indices = sorted({int(i) for i in (range(len(runs)) if chosen is None else chosen)})
    if not indices:
        raise UsageError("no run is left to cut clips from: check data.cohorts and data.split")
    check_repetition_times([runs[i].tr for i in indices], allow_mixed_tr)
    starts = [runs[i].steady_from + clip_starts(runs[i].frames - runs[i].steady_from, config) for i in indices]
    short = tuple(runs[i].key for i, s in zip(indices, starts, strict=True) if not len(s))
    if len(short) == len(indices):
        raise UsageError(
            f"no run holds a clip of {clip_duration(config)} frames (clip.frames x clip.stride_within): "
            f"{_listing(short)} are too short; lower clip.frames"
        )
    counts = [len(s) for s in starts]
    return ClipIndex(
        run=np.repeat(np.array(indices, dtype=np.int64), counts),
        start=np.concatenate(starts),
        frames=config.frames,
        stride=config.stride_within,
        too_short=short,
    )


def spread_clips(subject: NDArray[np.int64], max_clips: int | None) -> NDArray[np.int64]:
    """Choose clips evenly over subjects, and evenly over each subject's clips.

    Args:
        subject: (clips,) subject of each clip.
        max_clips: clips at most; all when None.

    Returns:
        Clip ids, ascending, min(max_clips, clips) of them; no subject has two more than another who has clips left.
    """
    if max_clips is None or max_clips >= len(subject):
        return np.arange(len(subject), dtype=np.int64)
    _, owner, counts = np.unique(subject, return_inverse=True, return_counts=True)
    quota = np.zeros(len(counts), dtype=np.int64)
    left = max_clips
    while left:
        open_ = np.flatnonzero(counts > quota)
        taken = open_ if len(open_) <= left else open_[_evenly(len(open_), left)]
        quota[taken] += 1
        left -= len(taken)
    by_owner = np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])
    return np.sort(np.concatenate([own[_evenly(len(own), int(q))] for own, q in zip(by_owner, quota, strict=True)]))


def check_repetition_times(times: Sequence[float], allow_mixed: bool) -> None:
    """Refuse runs of different repetition times (seconds) where they may not meet.

    Raises:
        UsageError: they differ and `allow_mixed` is False; the times and their runs are counted.
    """
    # Headers hold TR as float32 seconds or milliseconds: what agrees to a millisecond is the same TR.
    rounded = [round(float(t), 3) for t in times]
    different = sorted(set(rounded))
    if len(different) > 1 and not allow_mixed:
        counted = ", ".join(f"{t:g} s ({rounded.count(t)} runs)" for t in different)
        raise UsageError(
            f"runs have different repetition times: {counted}; choose cohorts of one TR or set data.allow_mixed_tr=true"
        )


def _listing(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _evenly(count: int, size: int) -> NDArray[np.int64]:
    """`size` different numbers of range(count), evenly spaced."""
    return ((np.arange(size, dtype=np.int64) * 2 + 1) * count) // (2 * max(size, 1))
