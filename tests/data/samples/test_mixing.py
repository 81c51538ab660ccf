"""Cohorts in one run: shares that papers define, epochs that are the same wherever they are computed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.data import MixingConfig
from swiftv2.data.samples.mixing import Mixture, cohort_shares
from swiftv2.data.samples.order import Exclusion, SampleOrder, rank_positions
from swiftv2.errors import UsageError

NAMES = ("abcd", "hcp", "ukb")
KINDS = st.one_of(
    st.floats(1.0, 20.0).map(lambda t: MixingConfig(kind="temperature", temperature=t)),
    st.tuples(*[st.floats(0.05, 10.0)] * 3).map(
        lambda w: MixingConfig(kind="weights", weights=dict(zip(NAMES, w, strict=True)))
    ),
)
COUNTS = st.tuples(*[st.integers(1, 40)] * 3)


def _mixture(config: MixingConfig, counts: tuple[int, ...]) -> tuple[Mixture | None, np.ndarray]:
    cohort = np.repeat(np.arange(len(counts)), counts)
    return Mixture.make(config, NAMES[: len(counts)], cohort), cohort


def test_shares_follow_their_definitions() -> None:
    counts = [100, 400, 2500]
    np.testing.assert_allclose(cohort_shares(MixingConfig(), NAMES, counts), np.array(counts) / 3000)
    square = MixingConfig(kind="temperature", temperature=2.0)
    np.testing.assert_allclose(cohort_shares(square, NAMES, counts), np.array([10, 20, 50]) / 80)
    flat = MixingConfig(kind="temperature", temperature=1e9)
    np.testing.assert_allclose(cohort_shares(flat, NAMES, counts), np.full(3, 1 / 3), rtol=1e-6)
    stated = MixingConfig(kind="weights", weights={"ukb": 1.0, "abcd": 2.0, "hcp": 1.0})
    np.testing.assert_allclose(cohort_shares(stated, NAMES, counts), [0.5, 0.25, 0.25])


@pytest.mark.parametrize("weights", [{"abcd": 1.0, "hcp": 1.0}, {"abcd": 1.0, "hcp": 1.0, "ukb": 1.0, "hbn": 2.0}])
def test_weights_that_do_not_name_just_the_cohorts_are_refused(weights: dict[str, float]) -> None:
    config = MixingConfig(kind="weights", weights=weights)
    with pytest.raises(UsageError, match="name each cohort of the run once, abcd, hcp, ukb"):
        cohort_shares(config, NAMES, [1, 1, 1])


@pytest.mark.parametrize("values", [{"kind": "weights"}, {"weights": {"a": 1}}, {"kind": "temperature"}, {"temperature": 2}])
def test_a_kind_and_its_number_go_together(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="go together"):
        MixingConfig.model_validate(values)


@settings(deadline=None)
@given(KINDS, COUNTS, st.integers(0, 5))
def test_an_epoch_has_the_share_of_each_cohort(config: MixingConfig, counts: tuple[int, int, int], epoch: int) -> None:
    mixture, cohort = _mixture(config, counts)
    order = SampleOrder(3, sum(counts), mixture=mixture, cohort=cohort)
    shares = cohort_shares(config, NAMES, counts)
    composition = order.composition(epoch)
    assert sum(composition.values()) == sum(counts)
    for place, share in enumerate(shares):
        assert abs(composition.get(place, 0) - share * sum(counts)) < 1


@settings(deadline=None)
@given(KINDS, COUNTS)
def test_the_clips_of_a_cohort_are_used_equally_often(config: MixingConfig, counts: tuple[int, int, int]) -> None:
    mixture, cohort = _mixture(config, counts)
    order = SampleOrder(1, sum(counts), mixture=mixture)
    clips, passes = order.samples_at(np.arange(4 * sum(counts)))
    for place in range(3):
        used = Counter(clips[cohort[clips] == place].tolist())
        uses = [used.get(int(clip), 0) for clip in np.flatnonzero(cohort == place)]
        assert max(uses) - min(uses) <= 1
    assert len(set(zip(clips.tolist(), passes.tolist(), strict=True))) == len(clips), "a clip and its pass name one sample"


@settings(deadline=None)
@given(KINDS, COUNTS, st.integers(1, 8), st.integers(1, 3), st.integers(0, 100), st.data())
def test_ranks_agree_on_mixed_samples_from_any_position(
    config: MixingConfig, counts: tuple[int, int, int], world: int, micro: int, consumed: int, data: st.DataObject
) -> None:
    mixture, cohort = _mixture(config, counts)
    total = sum(counts)
    gone = data.draw(st.sets(st.integers(0, total - 1), max_size=total // 4))
    exclusions = [Exclusion(clip, consumed) for clip in sorted(gone)]
    alone = SampleOrder(7, total, exclusions, mixture, cohort).clips_at(np.arange(consumed, consumed + world * micro))
    read = [
        SampleOrder(7, total, exclusions, mixture, cohort).clips_at(positions)
        for rank in range(world)
        for positions in rank_positions(consumed, micro, 1, rank, world)
    ]
    assert sorted(np.concatenate(read).tolist()) == sorted(alone.tolist())
    assert not set(alone.tolist()) & gone


def test_a_substitute_comes_from_the_same_cohort() -> None:
    mixture, cohort = _mixture(MixingConfig(kind="temperature", temperature=3.0), (30, 5, 20))
    plain, passes = SampleOrder(0, 55, mixture=mixture, cohort=cohort).samples_at(np.arange(110))
    gone = [Exclusion(clip, 0) for clip in (0, 31, 40)]
    changed, again = SampleOrder(0, 55, gone, mixture, cohort).samples_at(np.arange(110))
    np.testing.assert_array_equal(cohort[plain], cohort[changed])
    np.testing.assert_array_equal(passes[plain == changed], again[plain == changed])
    assert (plain != changed).sum() == np.isin(plain, [0, 31, 40]).sum() > 3


def test_proportional_mixing_is_the_plain_order() -> None:
    mixture, _ = _mixture(MixingConfig(), (3, 4, 5))
    assert mixture is None
    clips, passes = SampleOrder(0, 12).samples_at(np.arange(24))
    assert sorted(clips[:12].tolist()) == list(range(12))
    assert passes.tolist() == [0] * 12 + [1] * 12
