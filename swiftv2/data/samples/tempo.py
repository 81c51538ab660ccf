"""Clips on a time grid of their own: from a run's repetition time to the one that is asked for."""

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.data import ClipConfig

SAME_TR_S = 0.005
"""Repetition times that differ by less (rounding of headers) are one."""


def is_resampled(tr: float, target_tr: float | None) -> bool:
    """Whether a run of this repetition time (s) must be interpolated to reach the target (s; None asks for none)."""
    return target_tr is not None and abs(tr - target_tr) > SAME_TR_S


def _margin(tr: float, target_tr: float) -> int:
    """Frames of a run that the filter needs on either side of a clip: none towards a faster grid."""
    return max(int(np.ceil(target_tr / tr - 1e-6)) - 1, 0)


def clip_step(config: ClipConfig, tr: float) -> int:
    """Frames of a run of this repetition time (s) from a clip's first sample to where the next clip might begin."""
    steps = config.frames * config.stride_within
    if not is_resampled(tr, config.target_tr):
        return steps
    return int(np.ceil((steps - 1) * float(config.target_tr or tr) / tr - 1e-6)) + 1


def clip_duration(config: ClipConfig, tr: float) -> int:
    """Frames of a run of this repetition time (s) that one clip is made of."""
    if config.target_tr is None or not is_resampled(tr, config.target_tr):
        return clip_step(config, tr)
    return clip_step(config, tr) + 2 * _margin(tr, config.target_tr)


def time_weights(config: ClipConfig, tr: float) -> NDArray[np.float32] | None:
    """How a clip's frames are made of a run's: (frames of the clip, `clip_duration`); None where they are the run's own.

    Between frames the signal is linear. Where the target is slower than the run, the triangle is as wide as two target
    steps, so that what the slower sampling cannot hold is averaged away rather than folded into lower frequencies; the clip
    then takes some frames on either side, so that the triangle is whole for its first and last frame too.
    """
    if config.target_tr is None or not is_resampled(tr, config.target_tr):
        return None
    ratio = config.target_tr / tr
    wanted = _margin(tr, config.target_tr) + np.arange(config.frames) * config.stride_within * ratio
    distance = np.abs(wanted[:, None] - np.arange(clip_duration(config, tr))[None, :])
    weights = np.clip(1.0 - distance / max(1.0, ratio), 0.0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
