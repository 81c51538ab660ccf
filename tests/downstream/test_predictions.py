"""Clips to runs to subjects, over any number of ranks, and to a file and back."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import clips

from swiftv2.downstream.predictions import Predictions, by_subject, gather, read, write
from swiftv2.errors import SwiftError


def _same(one: Predictions, other: Predictions) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("unit", "run", "clip", "truth", "score")]
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def test_a_subject_is_the_mean_over_runs_of_means_over_clips() -> None:
    p = clips(0, 40, 3)
    table = pd.DataFrame({"unit": p.unit, "run": p.run, "score": p.score[:, 1]})
    expected = table.groupby(["unit", "run"])["score"].mean().groupby("unit").mean()
    found = by_subject(p)
    assert list(found.unit) == list(expected.index)
    np.testing.assert_allclose(found.score[:, 1], expected.to_numpy(), rtol=1e-12)
    # Were clips averaged at once, long runs would count more.
    assert np.abs(found.score[:, 1] - table.groupby("unit")["score"].mean().to_numpy()).max() > 1e-3
    assert _same(by_subject(found), found)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_what_ranks_share_out_unevenly_and_twice_is_joined_alike(seed: int, ranks: int) -> None:
    p = clips(seed, 12, 2)
    rng = np.random.default_rng(seed)
    owner = np.minimum(rng.integers(0, 2 * ranks, len(p)), ranks - 1)
    parts = [p.rows(rng.permutation(np.flatnonzero(owner == rank))) for rank in range(ranks)]
    # Clips that only fill an uneven end come again, on another rank and with another rounding.
    again = p.rows(np.array([0, len(p) - 1]))
    parts[-1] = gather([parts[-1], again])
    assert _same(gather(parts), gather([p]))
    assert _same(by_subject(gather(parts)), by_subject(p))


def test_a_copy_of_another_rounding_is_dropped_whoever_made_it() -> None:
    p = clips(1, 3, 2)
    other = Predictions(p.unit, p.run, p.clip, p.truth, p.score + 1e-7)
    assert _same(gather([p, other]), gather([other, p]))
    assert len(gather([p, other])) == len(p)


def test_a_rank_without_clips_and_a_subject_without_a_truth() -> None:
    p = clips(2, 5, 1)
    none = p.rows(np.zeros(len(p), dtype=np.bool_))
    assert _same(gather([none, p]), gather([p]))
    assert len(by_subject(none)) == 0
    truth = np.where(p.unit == "s003", np.nan, p.truth)
    assert list(by_subject(Predictions(p.unit, p.run, p.clip, truth, p.score)).unit) == ["s000", "s001", "s002", "s004"]


def test_what_cannot_be_a_prediction_is_refused() -> None:
    p = clips(3, 4, 1)
    score = p.score.copy()
    score[1] = np.nan
    with pytest.raises(SwiftError, match=f"1 of {len(p)} clips have predictions that are not finite"):
        by_subject(Predictions(p.unit, p.run, p.clip, p.truth, score))
    truth = p.truth.copy()
    truth[np.flatnonzero(p.unit == p.unit[0])[-1]] += 1
    with pytest.raises(SwiftError, match="different truths"):
        by_subject(Predictions(p.unit, p.run, p.clip, truth, p.score))


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    dx, age = clips(4, 6, 3), clips(5, 6, 1)
    odd = Predictions(
        np.array(["NA", "007"]), np.array(["nan", ""]), np.array([0, -1]), np.array([np.nan, 1.0]), np.ones((2, 1))
    )
    parts = {"val": {"dx": dx, "age": odd}, "test": {"dx": dx, "age": age}}
    write(tmp_path / "predictions.csv", parts)
    found = read(tmp_path / "predictions.csv")
    assert {part: list(targets) for part, targets in found.items()} == {part: list(t) for part, t in parts.items()}
    assert all(_same(found[part][target], p) for part, targets in parts.items() for target, p in targets.items())
    header = (tmp_path / "predictions.csv").read_text(encoding="utf-8").partition("\n")[0]
    assert header == "part,target,unit,run,clip,truth,score_0,score_1,score_2"


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "part,target,unit,run,clip,truth,score_0\nval,x,u,r,0,1,high\n"])
def test_a_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SwiftError, match="not a table of predictions"):
        read(path)
    with pytest.raises(SwiftError, match="No such file"):
        read(tmp_path / "other.csv")
