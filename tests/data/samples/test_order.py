import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.data import MixingConfig
from swiftv2.data.samples.mixing import Mixture
from swiftv2.data.samples.order import Exclusion, SampleOrder, rank_positions
from swiftv2.errors import SwiftError


def _clip_at(order: SampleOrder, position: int | np.integer) -> int:
    return int(order.clips_at(np.array([position]))[0])


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 80), st.integers(0, 3))
def test_every_epoch_holds_every_clip_once(seed: int, clips: int, epoch: int) -> None:
    order = SampleOrder(seed, clips)
    positions = np.arange(epoch * clips, (epoch + 1) * clips)
    assert sorted(order.clips_at(positions).tolist()) == list(range(clips))
    assert set(order.samples_at(positions)[1].tolist()) == {epoch}


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(0, 50)
    first, second = order.clips_at(np.arange(50)), order.clips_at(np.arange(50, 100))
    assert first.tolist() != second.tolist()
    assert first.tolist() != SampleOrder(1, 50).clips_at(np.arange(50)).tolist()


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 200), st.integers(1, 60), st.integers(1, 3))
def test_all_ranks_together_read_the_same_steps_from_any_sample_on(
    world: int, micro: int, accumulation: int, consumed: int, clips: int, steps: int
) -> None:
    batch = world * micro * accumulation
    alone = SampleOrder(4, clips).clips_at(np.arange(consumed, consumed + steps * batch))
    for step in range(steps):
        first = consumed + step * batch
        read = [
            SampleOrder(4, clips).clips_at(positions)
            for rank in range(world)
            for positions in rank_positions(first, micro, accumulation, rank, world)
        ]
        assert all(len(r) == micro for r in read)
        assert sorted(np.concatenate(read).tolist()) == sorted(alone[step * batch : (step + 1) * batch].tolist())


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 24), st.integers(1, 40))
def test_steps_are_slices_of_one_sequence(step: int, batch: int, clips: int) -> None:
    order = SampleOrder(9, clips)
    positions = np.arange(step * batch, (step + 1) * batch)
    assert order.clips_at(positions).tolist() == [_clip_at(order, p) for p in positions]


@settings(deadline=None)
@given(st.integers(2, 30), st.data())
def test_an_exclusion_changes_only_its_own_places_and_only_from_its_position_on(clips: int, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, clips - 1), min_size=1, max_size=clips - 1))
    since = data.draw(st.integers(0, 3 * clips))
    positions = np.arange(4 * clips)
    plain = SampleOrder(2, clips).clips_at(positions)
    order = SampleOrder(2, clips, [Exclusion(clip, since) for clip in sorted(gone)])
    changed = order.clips_at(positions)
    held = np.isin(plain, sorted(gone)) & (positions >= since)
    np.testing.assert_array_equal(changed[~held], plain[~held])
    assert not set(changed[held].tolist()) & gone
    again = [_clip_at(order, p) for p in reversed(positions)]
    assert again[::-1] == changed.tolist()


@settings(deadline=None)
@given(st.integers(2, 30), st.integers(1, 3), st.booleans(), st.data())
def test_what_is_excluded_later_is_as_if_it_had_been_from_the_start(
    clips: int, cohorts: int, mixed: bool, data: st.DataObject
) -> None:
    """What a run that went back reads is what one reads that was told in advance: substitutes and their passes too."""
    gone = data.draw(st.lists(st.integers(0, clips - 1), unique=True, max_size=clips - 1))
    since = [data.draw(st.integers(0, 3 * clips)) for _ in gone]
    known = data.draw(st.integers(0, len(gone)))
    exclusions = [Exclusion(clip, position, "asked") for clip, position in zip(gone, since, strict=True)]
    cohort = np.sort(np.arange(clips) % min(cohorts, clips))
    names = tuple(map(str, range(int(cohort.max()) + 1)))
    mixing = MixingConfig(kind="temperature", temperature=2.0) if mixed else MixingConfig()
    mixture = Mixture.make(mixing, names, cohort)
    positions = np.arange(4 * clips)
    told = SampleOrder(5, clips, exclusions, mixture, cohort)
    found = SampleOrder(5, clips, exclusions[:known], mixture, cohort)
    before = found.samples_at(positions)
    # In another order, by another cause, with later positions that do not count.
    again = [one._replace(cause="rewound") for one in data.draw(st.permutations(exclusions))]
    found.exclude([*(one._replace(position=one.position + 5) for one in again), *again])
    for one, other in zip(found.samples_at(positions), told.samples_at(positions), strict=True):
        np.testing.assert_array_equal(one, other)
    first = min((one.position for one in exclusions[known:]), default=4 * clips)
    for one, other in zip(before, told.samples_at(positions), strict=True):
        np.testing.assert_array_equal(one[:first], other[:first])


def test_of_two_exclusions_of_a_clip_the_earlier_holds_with_its_cause() -> None:
    order = SampleOrder(0, 9, [Exclusion(4, 7, "rewound"), Exclusion(4, 9), Exclusion(2, 3)])
    order.exclude([Exclusion(2, 1, "asked"), Exclusion(4, 7)])
    assert order.exclusions == ((2, 1, "asked"), (4, 7, "rewound"))


def test_exclusions_are_checked() -> None:
    with pytest.raises(ValueError, match="no clip 5"):
        SampleOrder(0, 5, [Exclusion(5, 0)])
    with pytest.raises(SwiftError, match="every clip"):
        SampleOrder(0, 2, [Exclusion(0, 0), Exclusion(1, 0)]).clips_at(np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="at least one clip"):
        SampleOrder(0, 0)


def test_a_substitute_comes_from_the_clip_s_cohort_and_is_drawn_for_as_nothing_else() -> None:
    cohort = np.repeat([0, 1], [44, 29])
    positions = np.arange(5 * 73)
    plain = SampleOrder(0, 73, cohort=cohort).clips_at(positions)
    order = SampleOrder(0, 73, [Exclusion(clip, 70) for clip in range(40, 60)], cohort=cohort)
    clips, passes = order.samples_at(positions)
    np.testing.assert_array_equal(cohort[plain], cohort[clips])
    held = (positions >= 70) & (plain >= 40) & (plain < 60)
    np.testing.assert_array_equal(passes[held], -1 - positions[held])
    np.testing.assert_array_equal(passes[~held], positions[~held] // 73)


def test_a_cohort_of_which_nothing_is_left_lends_its_turns_to_the_others() -> None:
    cohort = np.repeat([0, 1], [30, 3])
    order = SampleOrder(0, 33, [Exclusion(clip, 0) for clip in (30, 31, 32)], cohort=cohort)
    assert order.clips_at(np.arange(99)).max() < 30
