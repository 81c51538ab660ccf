"""Presets of fine-tuning, and what the configuration of tasks and runs refuses."""

from pathlib import Path

import pytest

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import build, dump, load, override, presets_root
from swiftv2.config.task import TaskConfig
from swiftv2.errors import UsageError

PRESETS = sorted((presets_root() / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_on_every_kind_of_task_and_is_read_back_as_written(path: Path, tmp_path: Path) -> None:
    words = ["task={name: t, targets: [{column: age, kind: regression}], data: {store: s.zarr}}", "encoder.weights=w"]
    config = load(FinetuneConfig, path, words)
    written = tmp_path / "config.yaml"
    written.write_text(dump(config), encoding="utf-8")
    assert load(FinetuneConfig, written) == config


def test_a_task_may_be_a_preset_with_changes(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("{name: mine, targets: [{column: sex, kind: classification}], data: {store: a.zarr}}", encoding="utf-8")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"run: {{dir: r}}\ntask: {task}\nencoder: {{weights: w}}\ntrain: {{max_steps: 1, global_batch: 1}}", encoding="utf-8"
    )
    config = load(FinetuneConfig, run, ["task.data.store=b.zarr", "task.split.index=2"])
    assert (config.task.name, str(config.task.data.store), config.task.split.index) == ("mine", "b.zarr", 2)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("targets=[]", "targets"),
        ("targets=[{column: a, kind: regression}, {column: a, kind: regression}]", "a column comes twice"),
        ("targets=[{column: a, kind: regression, classes: [x, y]}]", "classes are for kind=classification"),
        ("split={kind: few_shot, count: 3}", "take 10 or more"),
        ("split={kind: kfold, count: 5, index: 5}", "index=5 is beyond count=5"),
        ("split={kind: file}", "kind=file and file go together"),
        ("select=r2", "select=r2 is for tasks whose targets are all of kind regression"),
        ("events={folder: bids}", "statistics of the whole run"),
        ("split.fold=3", "fold"),
    ],
)
def test_tasks_that_make_no_sense_are_refused_by_name(word: str, said: str) -> None:
    tree: dict[str, object] = {
        "name": "t",
        "targets": [{"column": "sex", "kind": "classification"}],
        "data": {"store": "s.zarr"},
    }
    override(tree, word)
    with pytest.raises(UsageError, match=said):
        build(TaskConfig, tree, "task", (word,))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["encoder={regime: full}"], "give encoder.weights"),
        (["encoder={regime: scratch}"], "give one"),
        (["encoder={regime: full, weights: w, model: tiny}"], "leave out encoder.model"),
    ],
)
def test_regimes_that_lack_their_weights_are_refused(words: list[str], said: str) -> None:
    path_words = ["task={name: t, targets: [{column: age, kind: regression}], data: {store: s.zarr}}", *words]
    with pytest.raises(UsageError, match=said):
        load(FinetuneConfig, presets_root() / "finetune" / "full.yaml", path_words)
