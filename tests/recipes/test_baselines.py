from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.recipes.baselines import METHODS, FluctuationScore, time_interpolation, visible_mean

RNG = np.random.default_rng(11)


def _obvious(signal: np.ndarray, hidden: np.ndarray, brain: np.ndarray, method: str) -> np.ndarray:
    """One voxel after the other, as one would say it."""
    found = np.zeros_like(signal)
    clips, frames, voxels = signal.shape
    for b in range(clips):
        seen = [signal[b, t, v] for v in range(voxels) if brain[b, v] for t in range(frames) if not hidden[b, t, v]]
        fallback = np.mean(seen) if seen else 0.0
        for v in range(voxels):
            times = np.flatnonzero(~hidden[b, :, v])
            if not len(times):
                found[b, :, v] = fallback
            elif method == "mean":
                found[b, :, v] = signal[b, times, v].mean()
            else:
                found[b, :, v] = np.interp(np.arange(frames), times, signal[b, times, v])
    return found


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 12), st.floats(0.0, 1.0), st.integers(0, 10_000))
def test_baselines_equal_the_obvious_implementation(clips: int, frames: int, voxels: int, ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((clips, frames, voxels))
    hidden = rng.random((clips, frames, voxels)) < ratio
    brain = rng.random((clips, voxels)) < 0.7
    tensors = (torch.from_numpy(signal), torch.from_numpy(hidden), torch.from_numpy(brain))
    np.testing.assert_allclose(visible_mean(*tensors), _obvious(signal, hidden, brain, "mean"), atol=1e-12)
    np.testing.assert_allclose(time_interpolation(*tensors), _obvious(signal, hidden, brain, "line"), atol=1e-12)


def test_interpolation_is_exact_on_lines_and_copies_what_is_visible() -> None:
    times = torch.arange(12.0).view(1, 12, 1)
    signal = 3.0 + torch.randn(2, 1, 30) * times
    hidden = torch.rand(2, 12, 30) < 0.6
    hidden[:, [0, -1]] = False
    brain = torch.ones(2, 30, dtype=torch.bool)
    found = time_interpolation(signal, hidden, brain)
    torch.testing.assert_close(found, signal, rtol=0, atol=1e-5)
    assert (found[~hidden] == signal[~hidden]).all()


def test_what_is_hidden_does_not_leak_into_the_baselines() -> None:
    signal, hidden = torch.randn(2, 10, 20), torch.rand(2, 10, 20) < 0.5
    brain = torch.rand(2, 20) < 0.8
    poisoned = signal.masked_fill(hidden, torch.nan)
    for method in (visible_mean, time_interpolation):
        torch.testing.assert_close(method(poisoned, hidden, brain), method(signal, hidden, brain))


def _scored(score: FluctuationScore, slices: list[slice], data: dict[str, Any]) -> FluctuationScore:
    for s in slices:
        score.update(
            {name: values[s] for name, values in data["predictions"].items()},
            data["target"][s],
            data["counted"][s],
            data["subject"][s],
            data["weight"][s],
        )
    return score


def _data(clips: int = 24) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    shape = (clips, 8, 15)
    still, moving = (torch.randn(*s, generator=generator) for s in ((clips, 1, 15), shape))
    target = 10 * still + moving
    hidden = torch.rand(shape, generator=generator) < 0.5
    brain = torch.rand(clips, 15, generator=generator) < 0.8
    weight = torch.ones(clips)
    weight[-1] = 0
    return {
        "target": target,
        "counted": hidden & brain[:, None],
        "subject": torch.arange(clips) % 6,
        "weight": weight,
        "predictions": {
            "model": target + 0.5 * torch.randn(shape, generator=generator),
            "visible_mean": visible_mean(target, hidden, brain),
            "time_interpolation": time_interpolation(target, hidden, brain),
        },
    }


COHORTS = np.array([0, 0, 0, 1, 1, 1, 2])
NAMES = ("A", "B", "C")


def test_scores_follow_their_definitions() -> None:
    data = _data()
    report = _scored(FluctuationScore(COHORTS, NAMES), [slice(None)], data).report(seed=0, resamples=200)
    assert list(report) == ["all", "A", "B"]
    target, counted = data["target"].double().numpy(), data["counted"].numpy()
    for cohort, subjects in {"all": range(6), "A": range(3), "B": range(3, 6)}.items():
        losses = {}
        for name in METHODS:
            guess = data["predictions"][name].double().numpy()
            r2, absolute, square = [], [], []
            for subject in subjects:
                own = [b for b in range(23) if b % 6 == subject]
                error = sum(((guess[b] - target[b])[counted[b]] ** 2).sum() for b in own)
                total = sum(((target[b] - target[b].mean(0))[counted[b]] ** 2).sum() for b in own)
                r2.append(1 - error / total)
                absolute += [np.abs((guess[b] - target[b])[counted[b]]).mean() for b in own]
                square += [((guess[b] - target[b])[counted[b]] ** 2).mean() for b in own]
            found = report[cohort].methods[name]
            assert found.r2 is not None
            assert found.r2.low is not None
            assert found.r2.high is not None
            assert found.r2.mean == pytest.approx(np.mean(r2), abs=1e-5)
            assert min(r2) - 1e-5 <= found.r2.low <= found.r2.mean <= found.r2.high <= max(r2) + 1e-5
            assert found.l1 == pytest.approx(np.mean(absolute), rel=1e-5)
            assert found.l2 == pytest.approx(np.mean(square), rel=1e-5)
            losses[name] = found
        best = min(losses[name].l1 for name in METHODS[1:])
        assert report[cohort].l1_ratio == pytest.approx(losses["model"].l1 / best)
        assert report[cohort].subjects == len(subjects)
    assert report["all"].clips == 23
    gain, model, mean = report["all"].r2_gain["visible_mean"], *(report["all"].methods[m].r2 for m in METHODS[:2])
    assert gain is not None
    assert model is not None
    assert mean is not None
    assert gain.mean == pytest.approx(model.mean - mean.mean)


def test_copying_the_mean_explains_nothing_of_the_fluctuation() -> None:
    """Under a large static image its R2 of masked voxels would be near 1: this is the trap."""
    report = _scored(FluctuationScore(COHORTS, NAMES), [slice(None)], _data()).report(seed=0, resamples=50)
    r2 = {name: report["all"].methods[name].r2 for name in METHODS}
    assert r2["visible_mean"] is not None
    assert r2["visible_mean"].mean < 0
    assert r2["model"] is not None
    assert r2["model"].mean > 0.5


def test_sums_of_ranks_and_batches_are_those_of_all_clips() -> None:
    data = _data()
    whole = _scored(FluctuationScore(COHORTS, NAMES), [slice(None)], data)
    parts = [
        _scored(FluctuationScore(COHORTS, NAMES), [slice(0, 5), slice(5, 9)], data),
        _scored(FluctuationScore(COHORTS, NAMES), [slice(9, 24)], data),
    ]
    torch.testing.assert_close(parts[0].totals + parts[1].totals, whole.totals, rtol=1e-12, atol=1e-12)


def test_clips_and_subjects_without_anything_to_score_do_no_harm() -> None:
    data = _data(6)
    data["counted"][2] = False
    data["predictions"]["model"][5] = torch.nan
    score = _scored(FluctuationScore(COHORTS, NAMES), [slice(None)], data)
    report = score.report(seed=0, resamples=50)
    assert torch.isfinite(score.totals).all()
    assert report["all"].clips == 5, "the clip of weight 0 does not count, the one without masked brain does"
    found = report["A"].methods["model"].r2
    assert found is not None
    assert np.isfinite(found.mean)
    assert FluctuationScore(COHORTS, NAMES).report(seed=0) == {}


def test_one_subject_has_no_interval() -> None:
    data = _data(1)
    data["weight"][:] = 1
    report = _scored(FluctuationScore(COHORTS, NAMES), [slice(None)], data).report(seed=0)
    estimate = report["A"].methods["model"].r2
    assert estimate is not None
    assert estimate.low is None
    assert estimate.high is None


def test_intervals_are_a_function_of_the_seed() -> None:
    score = _scored(FluctuationScore(COHORTS, NAMES), [slice(None)], _data())
    assert score.report(seed=1, resamples=50) == score.report(seed=1, resamples=50)
    assert score.report(seed=1, resamples=50) != score.report(seed=2, resamples=50)
