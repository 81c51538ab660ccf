"""Pictures of downstream results show what the results say; the same results give the same picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from swiftv2.downstream.compare import compare
from swiftv2.downstream.metrics import judge
from swiftv2.downstream.predictions import Predictions
from swiftv2.report.downstream import _forest, draw_forest, draw_result


def _subjects(truth: Any, score: Any, first: int = 0) -> Predictions:
    n = len(truth)
    unit = np.array([f"u{first + i:04d}" for i in range(n)])
    return Predictions(unit, np.full(n, ""), np.full(n, -1), np.asarray(truth, dtype=np.float64), np.asarray(score))


def _target(p: Predictions, kind: Any, classes: list[str]) -> dict[str, Any]:
    return {"kind": kind, "classes": classes, "threshold": None, "test": judge(p, kind, classes, bootstrap=100), "val": None}


def test_each_kind_of_target_has_its_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = {
        "sex": (_subjects(rng.integers(0, 2, 60), rng.dirichlet([1, 1], 60)), "classification", ["f", "m"]),
        "task / state": (_subjects(rng.integers(0, 4, 80), rng.dirichlet(np.ones(4), 80)), "classification", list("wxyz")),
        "age": (_subjects(rng.normal(50, 10, 40), rng.normal(50, 10, (40, 1))), "regression", []),
        "flat": (_subjects(rng.normal(50, 10, 40), np.full((40, 1), 50.0)), "regression", []),
        "one class": (_subjects(np.zeros(9), rng.dirichlet([1, 1], 9)), "classification", ["f", "m"]),
    }
    tree = {"targets": {name: _target(*target) for name, target in made.items()}}
    subjects = {name: {"truth": p.truth, "score": p.score} for name, (p, _, _) in made.items()}
    paths = draw_result(tree, subjects, tmp_path)
    assert sorted(path.name for path in paths if path.suffix == ".png") == [
        "test_age.png",
        "test_flat.png",
        "test_one_class.png",
        "test_sex.png",
        "test_task_state.png",
    ]
    assert all(path.stat().st_size > 5000 for path in paths)
    words = (tmp_path / "test_sex.svg").read_text(encoding="utf-8")
    value = tree["targets"]["sex"]["test"]["metrics"]["auroc"]["value"]
    assert f"AUROC {value:.3g}" in words
    assert "predicted probability of m" in words
    assert "all predictions are the same" in (tmp_path / "test_flat.svg").read_text(encoding="utf-8")
    assert "all units are of one class" in (tmp_path / "test_one_class.svg").read_text(encoding="utf-8")
    # No key of a subject is in a picture, and drawing is repeatable.
    assert all(f"u{i:04d}" not in words for i in range(60))
    again = draw_result(tree, {"sex": subjects["sex"]}, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths if path.stem == "test_sex"]
    assert draw_result(tree, subjects, tmp_path / "val", part="val") == []


@pytest.fixture
def comparison() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    results, predictions = [], []
    for index in range(5):
        truth = rng.normal(size=30)
        for name, noise in (("connectivity", 1.5), ("frozen", 0.7), ("mean", None)):
            said = np.zeros(30) if noise is None else truth + noise * rng.normal(size=30)
            p = _subjects(truth, said[:, None], first=30 * index)
            results.append(
                {
                    "task": "made",
                    "name": name,
                    "split": {"kind": "kfold", "index": index, "count": 5, "seed": 0, "unit": "subject"},
                    "subjects": {"train": 100, "val": 20, "test": 30},
                    "targets": {"slope": _target(p, "regression", [])},
                    "seed": 0,
                }
            )
            predictions.append({"test": {"slope": p}})
    ceiling = {"metric": "pearson_r", "oracle": 0.93, "standard_error": 0.01, "chance": 0.0}
    return compare(results, predictions, "connectivity", ceilings={"slope": ceiling}, bootstrap=200)


def test_a_forest_has_every_method_where_its_numbers_are(comparison: dict[str, Any], tmp_path: Path) -> None:
    svg, png = draw_forest(comparison, tmp_path / "forest.png")
    assert (svg.name, png.name) == ("forest.svg", "forest.png")
    words = svg.read_text(encoding="utf-8")
    for text in ("connectivity", "frozen", "mean", "slope (5 splits)", "perfect reader", "not defined on 5 of 5 splits"):
        assert text in words
    with mpl.rc_context():
        left, right = _forest(comparison, {"regression": "pearson_r"}).axes
    methods = comparison["targets"]["slope"]["metrics"]["pearson_r"]["methods"]
    marked = [np.asarray(line.get_xydata())[0] for line in left.lines if line.get_marker() == "o"]
    points = {float(place): float(value) for value, place in marked}
    assert points == {0.0: methods["connectivity"]["mean"], 1.0: methods["frozen"]["mean"]}
    ends = [tuple(path.get_segments()[0][:, 0]) for path in right.collections]  # type: ignore[attr-defined]
    difference = methods["frozen"]["difference"]
    assert ends == [(difference[kind]["low"], difference[kind]["high"]) for kind in ("corrected_t", "bootstrap")]
    assert 0.93 in [np.asarray(line.get_xydata())[0, 0] for line in left.lines]
