"""Clips on another time grid: what interpolation keeps, what it must average away, and where clips may begin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.data import ClipConfig
from swiftv2.data.samples.clips import clip_starts, starts_around
from swiftv2.data.samples.tempo import clip_duration, clip_step, time_weights

TRS = st.sampled_from([0.72, 0.735, 0.8, 1.35, 2.0, 2.5, 3.0])


@settings(deadline=None)
@given(TRS, TRS, st.integers(1, 40), st.integers(1, 3))
def test_a_straight_line_stays_a_straight_line(tr: float, target: float, frames: int, stride: int) -> None:
    """Where the target is faster, linear interpolation is exact on a line; where slower, nearly, at the ends too."""
    config = ClipConfig(frames=frames, stride_within=stride, target_tr=target)
    weights = time_weights(config, tr)
    duration = clip_duration(config, tr)
    if tr == target:
        assert weights is None
        assert duration == frames * stride
        return
    assert weights is not None
    assert weights.shape == (frames, duration)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    assert (weights >= 0).all()
    margin = (duration - clip_step(config, tr)) // 2
    line = weights @ ((np.arange(duration, dtype=np.float32) - margin) * tr)
    # Where frames are averaged, the run's points do not lie symmetrically around a wanted time; also not at the ends.
    np.testing.assert_allclose(line, np.arange(frames) * stride * target, atol=0.2 * tr if target > tr else 2e-3)


def test_no_clip_asks_for_frames_beyond_its_span() -> None:
    for tr, target in ((0.72, 2.0), (2.0, 0.72), (0.8, 3.0)):
        config = ClipConfig(frames=20, target_tr=target)
        seconds = (clip_step(config, tr) - 1) * tr
        assert 19 * target <= seconds + 1e-6 < 19 * target + tr + 1e-6


def test_what_a_slower_grid_cannot_hold_is_averaged_away() -> None:
    """A sine at 0.6 Hz, sampled every 0.72 s, would fold to 0.1 Hz at a TR of 2 s; one at 0.02 Hz passes."""
    config = ClipConfig(frames=40, target_tr=2.0)
    weights = time_weights(config, 0.72)
    assert weights is not None
    seconds = np.arange(weights.shape[1]) * 0.72

    def kept(hertz: float) -> float:
        wave = np.sin(2 * np.pi * hertz * seconds)
        return float((weights @ wave)[2:-2].std() / wave.std())

    assert kept(0.6) < 0.1
    assert kept(0.02) > 0.95
    picked = np.sin(2 * np.pi * 0.6 * seconds)[np.rint(np.arange(40) * 2.0 / 0.72).astype(int)]
    assert picked.std() > 0.6, "taking frames as they come would have kept it"


def test_seconds_make_frames() -> None:
    assert ClipConfig(seconds=40.0, target_tr=2.0).frames == 20
    assert ClipConfig(seconds=30.0, target_tr=0.75, stride_within=2).frames == 20
    again = ClipConfig.model_validate(ClipConfig(seconds=40.0, target_tr=2.0).model_dump())
    assert again.frames == 20
    with pytest.raises(ValueError, match=r"clip\.seconds needs clip\.target_tr"):
        ClipConfig(seconds=40.0)
    assert ClipConfig.model_validate({"seconds": 40.0, "target_tr": 2.0, "frames": None}).frames == 20
    with pytest.raises(ValueError, match="shorter than two frames"):
        ClipConfig(seconds=0.1, target_tr=2.0)
    with pytest.raises(ValueError, match=r"makes 20 frames, clip\.frames says 10: say clip\.frames=null"):
        ClipConfig(seconds=40.0, target_tr=2.0, frames=10)
    with pytest.raises(ValueError, match=r"clip\.gaps=avoid"):
        ClipConfig(displacement_mm=0.5)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(0, 10), st.integers(1, 12), st.floats(0.2, 1.5))
def test_no_clip_holds_a_censored_frame(flags: list[bool], first: int, length: int, between: float) -> None:
    censored = np.array(flags)
    first = min(first, len(flags) - 1)
    for gaps in ("avoid", "between"):
        config = ClipConfig.model_validate({"frames": length, "stride_between": between, "gaps": gaps})
        starts = starts_around(censored, first, config, 2.0)
        assert all(start >= first and start + length <= len(flags) for start in starts)
        assert not any(censored[start : start + length].any() for start in starts)
        assert starts.tolist() == sorted(set(starts.tolist()))
        if gaps == "avoid":
            usual = [first + s for s in clip_starts(len(flags) - first, config).tolist()]
            assert starts.tolist() == [s for s in usual if not censored[s : s + length].any()]
    # Between gaps every stretch that is long enough gives clips, however it lies.
    stretches = "".join("x" if flag else "." for flag in flags[first:]).split("x")
    expected = sum(len(clip_starts(len(s), config)) for s in stretches)
    assert len(starts) == expected
