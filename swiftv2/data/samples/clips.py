"""From runs to clips: which stretches of which runs are samples."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.data import ClipConfig
from swiftv2.data.samples.sources import RunInfo
from swiftv2.data.samples.tempo import SAME_TR_S, clip_duration, clip_step
from swiftv2.errors import SwiftError, UsageError

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
    """Every how many frames (of target_tr, where that is set) one is taken."""
    config: ClipConfig
    """What the clips were cut by."""
    too_short: tuple[str, ...] = ()
    """Keys of the runs that hold no clip: for the caller to report."""

    def __len__(self) -> int:
        return len(self.run)


def clip_starts(frames: int, config: ClipConfig, tr: float = 1.0) -> NDArray[np.int64]:
    """First frames of the clips of a run of `frames` volumes of `tr` seconds, ascending; empty when it is too short."""
    duration = clip_duration(config, tr)
    step = max(round(config.stride_between * clip_step(config, tr)), 1)
    return np.arange(0, frames - duration + 1, step, dtype=np.int64)


def starts_around(censored: NDArray[np.bool_], first: int, config: ClipConfig, tr: float) -> NDArray[np.int64]:
    """First frames of the clips of a run that hold no censored frame (`clip.gaps` avoid or between), ascending.

    Args:
        censored: (frames,) of the run.
        first: frames before this one are in no clip.
        config: length, strides and what is done about gaps.
        tr: seconds between the run's frames.
    """
    duration = clip_duration(config, tr)
    if config.gaps == "avoid":
        starts = first + clip_starts(len(censored) - first, config, tr)
        before = np.concatenate(([0], np.cumsum(censored)))
        clean: NDArray[np.int64] = starts[before[starts + duration] == before[starts]]
        return clean
    edges = np.flatnonzero(np.diff(np.concatenate(([1], censored[first:].astype(np.int8), [1])))) + first
    stretches = zip(edges[::2], edges[1::2], strict=True)
    return np.concatenate([np.empty(0, np.int64), *(a + clip_starts(int(b - a), config, tr) for a, b in stretches)])


def select_runs(
    runs: Sequence[RunInfo],
    subjects: Collection[str],
    cohorts: Collection[str] | None = None,
    version: int | None = None,
) -> NDArray[np.int64]:
    """Indices of the runs of these subjects (pseudonymous keys), ascending; of some cohorts only where they are given.

    Args:
        runs: all runs of the store.
        subjects: whose runs.
        cohorts: names; all when None.
        version: runs that this version of the store had, those withdrawn since included, so that clips keep their
            numbers; when None those that are there now.

    Raises:
        UsageError: a cohort is unknown to the store.
    """
    known = {run.cohort for run in runs}
    unknown = sorted(set(cohorts or ()) - known)
    if unknown:
        raise UsageError(f"data.cohorts: the store has no cohort {unknown[0]!r}; it has {', '.join(sorted(known))}")
    wanted, kept = set(subjects), known if cohorts is None else set(cohorts)

    def there(run: RunInfo) -> bool:
        return not run.withdrawn if version is None else run.since <= version and not 0 < run.withdrawn <= version

    return np.array(
        [i for i, run in enumerate(runs) if run.subject in wanted and run.cohort in kept and there(run)], dtype=np.int64
    )


def index_clips(
    runs: Sequence[RunInfo],
    config: ClipConfig,
    chosen: Iterable[int] | None = None,
    *,
    allow_mixed_tr: bool = False,
    censored: Callable[[int], NDArray[np.bool_] | None] | None = None,
    counts: Mapping[str, int] | None = None,
    frames: int | None = None,
) -> ClipIndex:
    """All clips of the chosen runs, in the order of the store's runs and then of their starts.

    Leading non-steady volumes, whose signal has not settled, are in no clip.

    Args:
        runs: all runs of the store.
        config: length and strides of the clips.
        chosen: indices of the runs to take; all when None.
        allow_mixed_tr: whether runs of different repetition times may meet.
        censored: (frames,) bool of a run by its index, or None where that is not known; asked where `clip.gaps` is not keep.
        counts: clips that each run had, by key, when it was indexed before; for runs that are withdrawn since, whose censored
            frames nobody knows any more. Their clips keep their numbers and all begin at the first steady frame.
        frames: only clips within so many first steady frames of a run; all when None.

    Raises:
        UsageError: no run is chosen, none holds a clip, repetition times are mixed without leave, or gaps are to be kept
            out of clips and are not known.
        SwiftError: a run does not have as many clips as it had.
    """
    indices = sorted({int(i) for i in (range(len(runs)) if chosen is None else chosen)})
    if not indices:
        raise UsageError("no run is left to cut clips from: check data.cohorts and data.split")
    check_repetition_times([runs[i].tr for i in indices], allow_mixed_tr or config.target_tr is not None)
    if config.gaps == "keep":
        starts = [runs[i].steady_from + clip_starts(runs[i].frames - runs[i].steady_from, config, runs[i].tr) for i in indices]
    else:
        starts = _starts_between_gaps(runs, config, indices, censored, counts or {})
    if frames is not None:
        ends = [runs[i].steady_from + frames - clip_duration(config, runs[i].tr) for i in indices]
        starts = [own[own <= end] for own, end in zip(starts, ends, strict=True)]
    for index, own in zip(indices, starts, strict=True):
        key = runs[index].key
        if counts is not None and len(own) != counts.get(key, 0):
            raise SwiftError(
                f"run {key} gives {len(own)} clips, not the {counts.get(key, 0)} that it gave when this run directory was "
                "begun: begin another one"
            )
    short = tuple(runs[i].key for i, s in zip(indices, starts, strict=True) if not len(s))
    if len(short) == len(indices):
        longest = max(clip_duration(config, runs[i].tr) for i in indices)
        raise UsageError(
            f"no run holds a clip of {longest} frames (clip.frames x clip.stride_within, at the TR of the runs): "
            f"{_listing(short)} are too short; lower clip.frames{'' if config.gaps == 'keep' else ' or say clip.gaps=keep'}"
            f"{'' if frames is None else f' or raise data.frames_per_run={frames}'}"
        )
    return ClipIndex(
        run=np.repeat(np.array(indices, dtype=np.int64), [len(s) for s in starts]),
        start=np.concatenate(starts),
        frames=config.frames,
        stride=config.stride_within,
        config=config,
        too_short=short,
    )


def _starts_between_gaps(
    runs: Sequence[RunInfo],
    config: ClipConfig,
    indices: Sequence[int],
    censored: Callable[[int], NDArray[np.bool_] | None] | None,
    counts: Mapping[str, int],
) -> list[NDArray[np.int64]]:
    starts, unknown = [], []
    for index in indices:
        run = runs[index]
        flags = None if censored is None or run.withdrawn else censored(index)
        if run.withdrawn:
            starts.append(np.full(counts.get(run.key, 0), run.steady_from, dtype=np.int64))
        elif flags is None:
            unknown.append(run.key)
        else:
            starts.append(starts_around(flags, run.steady_from, config, run.tr))
    if unknown:
        raise UsageError(
            f"clip.gaps={config.gaps} needs to know which volumes are censored, and {len(unknown)} of {len(indices)} runs "
            f"have no confounds ({_listing(unknown)}): say clip.gaps=keep, or choose cohorts that have them by data.cohorts"
        )
    return starts


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
    # Headers hold TR as float32 seconds or milliseconds: what lies close together is the same TR.
    counts = sorted(Counter(round(float(t), 6) for t in times).items())
    groups = [list(counts[:1])]
    for (former, _), one in itertools.pairwise(counts):
        if one[0] - former > SAME_TR_S:
            groups.append([])
        groups[-1].append(one)
    if len(groups) > 1 and not allow_mixed:
        counted = ", ".join(f"{group[0][0]:.3g} s ({sum(count for _, count in group)} runs)" for group in groups)
        raise UsageError(
            f"runs have different repetition times: {counted}; choose cohorts of one TR, bring all to one by clip.target_tr, "
            "or set data.allow_mixed_tr=true"
        )


def _listing(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _evenly(count: int, size: int) -> NDArray[np.int64]:
    """`size` different numbers of range(count), evenly spaced."""
    return ((np.arange(size, dtype=np.int64) * 2 + 1) * count) // (2 * max(size, 1))
