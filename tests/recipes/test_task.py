"""Opening a task: who is judged, what is known of them, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftv2.config.load import build
from swiftv2.config.task import TaskConfig
from swiftv2.data.samples.splits import PARTS
from swiftv2.data.store.reader import Store
from swiftv2.errors import UsageError
from swiftv2.recipes.task import TaskData, open_task

Opened = Callable[..., TaskData]


@pytest.fixture
def opened(generated_store: Path) -> Opened:
    def open_with(**changes: Any) -> TaskData:
        tree: dict[str, Any] = {
            "name": "t",
            "targets": [{"column": "slope", "kind": "regression"}],
            "data": {"store": str(generated_store), "normalisation": {"kind": "per_voxel"}},
            "clip": {"frames": 4},
            "split": {"kind": "kfold", "count": 3},
        }
        return open_task(build(TaskConfig, tree | changes, "task"))

    return open_with


def labelled(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, dict[str, str | None]], None]) -> None:
    """Let every store's label tables say something else, run by run."""
    honest = Store.labels

    def labels(self: Store) -> tuple[dict[str, str | None], ...]:
        rows = tuple(dict(row) for row in honest(self))
        for index, row in enumerate(rows):
            change(index, row)
        return rows

    monkeypatch.setattr(Store, "labels", labels)


def test_parts_hold_the_clips_of_their_subjects_and_each_its_truth(opened: Opened) -> None:
    data = opened(clips_per_run=3)
    cuts = {part: data.cut(part) for part in PARTS}
    for part, cut in cuts.items():
        assert set(cut.unit) == set(data.splits.part(part))
        _, counts = np.unique(cut.clips.run, return_counts=True)
        assert counts.max() == 3
        for key, truth in zip(cut.unit.tolist(), cut.truth[:, 0].tolist(), strict=True):
            row = data.labels[data.place[key]]
            assert truth == float(row["slope"] or "nan")
    labelled_units = sum(not np.isnan(number) for number in data.encoded["slope"].numbers)
    assert len({key for cut in cuts.values() for key in cut.unit}) == labelled_units


def test_covariates_are_taken_out_by_training_subjects_alone(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(monkeypatch, lambda _, row: row.update(age=str(3 * float(row["slope"] or 0) + 1)))
    data = opened(covariates=["age"])
    left = data.judged(data.config.targets[0])
    train = np.array([data.place[key] for key in data.splits.train])
    assert np.abs(left[train] - left[train].mean()).max() < 1e-9
    # What explains the label wholly leaves nothing to predict, of those who test either.
    assert np.nanmax(np.abs(left - left[train].mean())) < 1e-9
    assert np.nanstd(data.encoded["slope"].numbers) > 0.5


def test_names_and_codes_become_indicators_and_numbers_stay_numbers(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled(monkeypatch, lambda _, row: row.update(code=(row["site"] or "")[-1] or None))
    sites = len({row["site"] for row in opened().labels})
    assert opened(covariates=["site"]).covariates.shape[1] == sites - 1
    assert opened(covariates=["C(code)"]).covariates.shape[1] == sites - 1
    codes = opened(covariates=["code"]).covariates
    assert codes.shape[1] == 1
    assert set(np.unique(codes)) == {float(site + 1) for site in range(sites)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"covariates": ["nothing"]}, "no training subject has a value of 'nothing'"),
        ({"targets": [{"column": "slop", "kind": "regression"}]}, "no column 'slop'"),
        ({"targets": [{"column": "site", "kind": "regression"}]}, "a value is no number"),
        ({"sessions": ["9"]}, "no run"),
        ({"clip": {"frames": 400}}, "no run holds a clip"),
    ],
)
def test_what_the_store_does_not_have_is_said(opened: Opened, changes: dict[str, Any], said: str) -> None:
    def use() -> None:
        data = opened(**changes)
        assert data.covariates.shape[0] == len(data.units)
        data.cut("train")

    with pytest.raises(UsageError, match=said):
        use()


def test_labels_that_differ_between_visits_are_refused_wherever_they_count(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled(monkeypatch, lambda i, row: row.update(age=str(20 + i), family_id=f"f{i}"))
    with pytest.raises(UsageError, match="age differs between the runs"):
        opened(targets=[{"column": "age", "kind": "regression"}], split={"families": False})
    with pytest.raises(UsageError, match="age differs between a subject's runs"):
        _ = opened(covariates=["age"], split={"families": False}).covariates
    with pytest.raises(UsageError, match="family_id differs"):
        opened()


def test_runs_can_be_divided_and_intervals_then_draw_subjects(opened: Opened) -> None:
    data = opened(split={"unit": "run", "count": 3})
    assert {unit.key for unit in data.units} == {run.key for run in data.store.runs}
    cut = data.cut("test")
    groups = data.together(cut)
    owner = {run.key: run.subject for run in data.store.runs}
    assert groups == {key: owner[key] for key in cut.unit.tolist()}
