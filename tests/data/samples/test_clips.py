from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.data import ClipConfig
from swiftv2.data.samples.clips import clip_starts, index_clips, select_runs, spread_clips
from swiftv2.errors import SwiftError, UsageError


@dataclass(frozen=True)
class BareRun:
    key: str
    frames: int
    tr: float = 2.0
    subject: str = "s0"
    cohort: str = "A"
    steady_from: int = 0
    since: int = 1
    withdrawn: int = 0


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 4), st.floats(0.01, 3.0))
def test_starts_follow_the_published_rule(frames: int, length: int, within: int, between: float) -> None:
    config = ClipConfig(frames=length, stride_within=within, stride_between=between)
    duration = length * within
    expected = list(range(0, frames - duration + 1, max(round(between * duration), 1)))
    starts = clip_starts(frames, config)
    assert starts.tolist() == expected
    assert not len(starts) or starts[-1] + (length - 1) * within < frames


def test_starts_of_a_known_run() -> None:
    assert clip_starts(61, ClipConfig(frames=20)).tolist() == [0, 20, 40]
    assert clip_starts(61, ClipConfig(frames=20, stride_between=0.5)).tolist() == [0, 10, 20, 30, 40]
    assert clip_starts(61, ClipConfig(frames=20, stride_within=3)).tolist() == [0]
    assert clip_starts(19, ClipConfig(frames=20)).tolist() == []


def test_index_numbers_clips_by_run_and_start_and_reports_short_runs() -> None:
    runs = [BareRun("r0", 45), BareRun("r1", 10), BareRun("r2", 60), BareRun("r3", 40)]
    index = index_clips(runs, ClipConfig(frames=20), [3, 0, 1])
    assert index.run.tolist() == [0, 0, 3, 3]
    assert index.start.tolist() == [0, 20, 0, 20]
    assert index.too_short == ("r1",)
    assert len(index) == 4


def test_runs_that_are_all_too_short_are_refused_by_key() -> None:
    runs = [BareRun(f"r{i}", 10) for i in range(12)]
    with pytest.raises(UsageError, match=r"clip of 40 frames.*r0, r1, .* and 2 more are too short"):
        index_clips(runs, ClipConfig(frames=20, stride_within=2))


def test_mixed_repetition_times_are_refused_unless_allowed() -> None:
    runs = [BareRun("r0", 40, 0.72), BareRun("r1", 40, float(np.float32(0.72))), BareRun("r2", 40, 2.0)]
    with pytest.raises(UsageError, match=r"0\.72 s \(2 runs\), 2 s \(1 runs\).*data\.allow_mixed_tr=true"):
        index_clips(runs, ClipConfig(frames=20))
    assert len(index_clips(runs, ClipConfig(frames=20), allow_mixed_tr=True)) == 6
    assert len(index_clips(runs, ClipConfig(frames=20), [0, 1])) == 4
    close = [BareRun("r0", 40, 2.0), BareRun("r1", 40, 2.004), BareRun("r2", 40, 1.9996)]
    assert len(index_clips(close, ClipConfig(frames=20))) == 6


def test_withdrawn_runs_keep_the_number_of_their_clips_though_nobody_knows_their_gaps() -> None:
    config = ClipConfig(frames=5, gaps="between")
    flags = np.zeros(30, dtype=bool)
    flags[[3, 14]] = True
    runs = [BareRun("r0", 30), BareRun("r1", 30), BareRun("r2", 30)]
    before = index_clips(runs, config, censored=lambda _: flags)
    counts = {run.key: int((before.run == i).sum()) for i, run in enumerate(runs)}
    later = [runs[0], BareRun("r1", 30, withdrawn=2), runs[2]]
    after = index_clips(later, config, censored=lambda i: None if later[i].withdrawn else flags, counts=counts)
    np.testing.assert_array_equal(after.run, before.run)
    np.testing.assert_array_equal(after.start[after.run != 1], before.start[before.run != 1])
    with pytest.raises(SwiftError, match="run r2 gives 5 clips, not the 9 that it gave"):
        index_clips(later, config, censored=lambda _: flags, counts=counts | {"r2": 9})


def test_no_run_is_refused() -> None:
    with pytest.raises(UsageError, match="no run is left"):
        index_clips([BareRun("r0", 40)], ClipConfig(), [])


def test_runs_are_selected_by_subject_and_cohort() -> None:
    runs = [BareRun(f"r{i}", 40, subject=f"s{i % 2}", cohort="AB"[i // 2]) for i in range(4)]
    assert select_runs(runs, ["s1"]).tolist() == [1, 3]
    assert select_runs(runs, ["s0", "s1"], ["B"]).tolist() == [2, 3]
    with pytest.raises(UsageError, match="no cohort 'C'; it has A, B"):
        select_runs(runs, ["s0"], ["C"])


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60))
def test_clips_are_spread_evenly_over_subjects(counts: list[int], wanted: int) -> None:
    subject = np.repeat(np.arange(len(counts)), counts)
    chosen = spread_clips(subject, wanted)
    assert len(chosen) == min(wanted, len(subject))
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen.tolist() == sorted(chosen.tolist())
    quota = np.bincount(subject[chosen], minlength=len(counts))
    most = quota.max()
    for own, taken in zip(counts, quota, strict=True):
        assert taken >= most - 1 or taken == own


def test_a_subject_s_clips_are_taken_over_the_whole_run() -> None:
    assert spread_clips(np.zeros(9, dtype=np.int64), 3).tolist() == [1, 4, 7]
    assert spread_clips(np.arange(9), 3).tolist() == [1, 4, 7]


def test_leading_non_steady_volumes_are_in_no_clip() -> None:
    config = ClipConfig(frames=10, stride_between=1.0)
    index = index_clips([BareRun("r0", 32, steady_from=3), BareRun("r1", 32)], config)
    assert index.start[index.run == 0].tolist() == [3, 13]
    assert index.start[index.run == 1].tolist() == [0, 10, 20]


def test_withdrawn_runs_are_never_selected() -> None:
    runs = [BareRun("r0", 20), BareRun("r1", 20, withdrawn=2)]
    assert select_runs(runs, {"s0"}).tolist() == [0]


def test_shorter_scans_are_the_first_steady_frames_of_each_run() -> None:
    runs = [BareRun("r0", 100), BareRun("r1", 100, steady_from=3), BareRun("r2", 45)]
    index = index_clips(runs, ClipConfig(frames=20), frames=50)
    assert index.run.tolist() == [0, 0, 1, 1, 2, 2]
    assert index.start.tolist() == [0, 20, 3, 23, 0, 20]
    with pytest.raises(UsageError, match=r"raise data.frames_per_run=19"):
        index_clips(runs, ClipConfig(frames=20), frames=19)
