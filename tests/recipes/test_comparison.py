"""Folders of results that do not hold together are told in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from swiftv2.downstream.metrics import REGRESSION
from swiftv2.downstream.predictions import Predictions, write
from swiftv2.errors import SwiftError
from swiftv2.recipes.comparison import Source, compare_folders


def _result(folder: Path, name: str, part: str) -> None:
    """A result of test subjects, with predictions of some part beside it."""
    folder.mkdir(parents=True)
    metrics = {metric: {"value": 0.5} for metric in REGRESSION}
    target = {"kind": "regression", "classes": None, "threshold": None, "val": None, "test": {"n": 12, "metrics": metrics}}
    tree = {
        "task": "made",
        "name": name,
        "seed": 0,
        "split": {"kind": "fractions", "count": 1, "index": 0, "seed": 0, "unit": "subject"},
        "subjects": {"train": 20, "val": 5, "test": 12},
        "targets": {"age": target},
    }
    (folder / "result.json").write_text(json.dumps(tree))
    keys = np.array([f"s{i:02}" for i in range(12)])
    values = np.arange(12.0)
    predictions = Predictions(keys, keys, np.zeros(12, dtype=np.int64), values, values[:, None] + 1)
    write(folder / "predictions.csv", {part: {"age": predictions}})


def test_a_table_without_the_test_rows_that_its_result_judges_is_told(tmp_path: Path) -> None:
    _result(tmp_path / "whole", "majority", "test")
    _result(tmp_path / "torn", "model", "val")
    with pytest.raises(SwiftError, match=r"torn/predictions\.csv: no rows of test subjects for age"):
        compare_folders([Source(tmp_path)], "majority", bootstrap=0)
    (tmp_path / "torn" / "predictions.csv").unlink()
    assert compare_folders([Source(tmp_path)], "majority", bootstrap=0)["methods"] == ["model", "majority"]
