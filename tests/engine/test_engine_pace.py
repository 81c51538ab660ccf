"""Slow ranks: named by what they are slow at, and only where it matters."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ranks
from hypothesis import given
from hypothesis import strategies as st

from swiftv2.engine.pace import SLOW_RATIO, SLOW_SHARE, RankPace, compare

SECONDS = st.floats(0.001, 100.0)
PACES = st.lists(st.tuples(SECONDS, SECONDS, SECONDS), min_size=1, max_size=9)


def paces(*values: tuple[float, float, float]) -> list[RankPace]:
    return [RankPace(rank, f"node{rank}", *own) for rank, own in enumerate(values)]


def named(report: dict[str, Any]) -> list[tuple[int, str]]:
    return [(one["rank"], one["what"]) for one in report["slow"]]


@pytest.mark.parametrize(
    ("values", "slow"),
    [
        ([(0.1, 0.4, 1.0)], []),
        ([(0.1, 0.4, 1.0), (0.2, 0.4, 1.0)], [(1, "data")]),
        ([(0.1, 0.4, 1.0), (0.1, 0.7, 1.0), (0.1, 0.4, 1.0)], [(1, "compute")]),
        ([(0.01, 0.4, 1.0), (0.04, 0.4, 1.0)], []),  # four times as long, but 3 % of a step
        ([(0.4, 0.4, 1.0), (0.5, 0.5, 1.0)], []),  # 10 % of a step, but a quarter longer
        ([(0.0, 0.4, 1.0), (0.0, 0.4, 1.0), (0.5, 0.7, 1.0)], [(2, "data"), (2, "compute")]),
    ],
)
def test_a_rank_is_slow_where_it_is_far_from_the_others_and_costs_time(
    values: list[tuple[float, float, float]], slow: list[tuple[int, str]]
) -> None:
    assert named(compare(paces(*values))) == slow


@given(PACES)
def test_who_is_named_is_slow_by_both_measures(values: list[tuple[float, float, float]]) -> None:
    all_paces = paces(*values)
    report = compare(all_paces)
    step = report["step_seconds"]["median"]
    for one in report["slow"]:
        assert one["seconds"] == getattr(all_paces[one["rank"]], one["what"])
        assert one["host"] == f"node{one['rank']}"
        assert one["seconds"] > SLOW_RATIO * one["median"]
        assert one["share"] * step == pytest.approx(one["seconds"] - one["median"])
        assert one["share"] > SLOW_SHARE * 0.999
    for what in ("data", "compute"):
        assert sum(one["what"] == what for one in report["slow"]) <= len(values) // 2, "most ranks are never slow"
        spread = report[f"{what}_seconds"]
        assert spread["least"] <= spread["median"] <= spread["most"]


@given(PACES, st.sampled_from([0.25, 2.0, 64.0]), st.randoms(use_true_random=False))
def test_neither_units_nor_the_order_of_ranks_matter(
    values: list[tuple[float, float, float]], unit: float, random: Any
) -> None:
    all_paces = paces(*values)
    scaled = [RankPace(one.rank, one.host, one.data * unit, one.compute * unit, one.step * unit) for one in all_paces]
    random.shuffle(scaled)
    assert sorted(named(compare(scaled))) == sorted(named(compare(all_paces)))


@pytest.mark.slow
def test_ranks_measure_themselves_and_agree(tmp_path: Path) -> None:
    words = ranks.worker(2, "watched.py", str(tmp_path), json.dumps({"slow": True}))
    subprocess.run(words, env=ranks.environment(), check=True, timeout=120, capture_output=True)
    first, second = (json.loads((tmp_path / f"slow-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert named(first) == [(1, "data"), (1, "compute")]
    data, compute = first["slow"]
    assert data["seconds"] == pytest.approx(0.05)
    assert data["share"] == pytest.approx(0.49)
    assert 0.03 <= compute["seconds"] < 0.06, "one forward pass a step: evaluations do not count"
    assert first["step_seconds"] == {"median": 0.1, "least": 0.1, "most": 0.1}
