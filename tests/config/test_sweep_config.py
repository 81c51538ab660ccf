"""What a sweep's file may say, and which runs come of it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from swiftv2.config.load import build, dump, load, override
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.sweep import SweepConfig, expand, load_sweep
from swiftv2.errors import UsageError

BASE = {"config": "5M", "folder": "runs/x"}
KEYS = st.lists(
    st.sampled_from(["optimizer.lr", "schedule.lr", "mask.ratio", "run.seed", "model", "mask.patch_size"]),
    min_size=1,
    max_size=3,
    unique=True,
)
VALUES = st.one_of(
    st.integers(0, 50),
    st.floats(1e-6, 1.0),
    st.booleans(),
    st.text("abc /.:", min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)


def sweep(**values: Any) -> SweepConfig:
    return build(SweepConfig, BASE | values, "x.yaml")


def elements(*names: str, **after: list[str]) -> list[dict[str, Any]]:
    return [{"name": name, "after": after.get(name, [])} for name in names]


def test_a_grid_makes_all_combinations_the_last_setting_changing_fastest() -> None:
    grid = yaml.safe_load("{optimizer.lr: [3e-4, 0.001], mask.patch_size: [[6, 6, 6, 2], [12, 12, 12, 4]]}")
    made = sweep(grid=grid)
    assert made.names() == (
        "lr_3e-4-patch_size_6-6-6-2",
        "lr_3e-4-patch_size_12-12-12-4",
        "lr_0.001-patch_size_6-6-6-2",
        "lr_0.001-patch_size_12-12-12-4",
    )
    assert made.runs()[1].set == ("optimizer.lr=3e-4", "mask.patch_size=[12, 12, 12, 4]")


def test_settings_that_end_alike_are_told_apart_in_names() -> None:
    assert sweep(grid={"model.patch_size": [1], "mask.patch_size": [2]}).names() == ("model.patch_size_1-mask.patch_size_2",)


@given(keys=KEYS, data=st.data())
def test_words_of_a_grid_say_its_values_and_names_are_safe_for_paths(keys: list[str], data: st.DataObject) -> None:
    grid = {key: data.draw(st.lists(VALUES, min_size=1, max_size=3, unique_by=repr)) for key in keys}
    runs = expand(grid)
    assert len(runs) == math.prod(len(values) for values in grid.values())
    said: list[dict[str, Any]] = []
    for run in runs:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", run.name)
        tree: dict[str, Any] = {}
        for word in run.set:
            override(tree, word)
        said.append(tree)
        assert [key for key, _, _ in (word.partition("=") for word in run.set)] == keys
    for tree in said:
        for key in keys:
            value: Any = tree
            for part in key.split("."):
                value = value[part]
            assert value in grid[key]


def test_what_comes_later_counts_and_the_run_directory_is_the_sweeps(tmp_path: Path) -> None:
    made = sweep(
        common=["train.max_steps=1", "optimizer.lr=1"],
        elements=[{"name": "a"}, {"name": "b", "set": ["optimizer.lr=2", "clip.frames=10"]}],
    )
    words = made.words(1, ["data.store=x", "clip.frames=8"])
    config = load(PretrainConfig, Path("configs/pretrain/5M.yaml").resolve(), words)
    assert (config.train.max_steps, config.optimizer.lr, config.clip.frames) == (1, 2.0, 8)
    assert config.run.dir == Path("runs/x/b")
    path = tmp_path / "again.yaml"
    path.write_text(dump(made))
    assert load_sweep(path) == made


def test_a_folder_that_looks_like_a_number_stays_a_path() -> None:
    words = sweep(folder="2026", elements=elements("1")).words(0)
    assert load(PretrainConfig, Path("configs/pretrain/5M.yaml").resolve(), words).run.dir == Path("2026/1")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "a sweep has elements or a grid"),
        ({"elements": elements("a"), "grid": {"run.seed": [1]}}, "a sweep has elements or a grid"),
        ({"elements": elements("a", "a")}, "the name a is there more than once"),
        ({"grid": {"run.seed": [1, 1]}}, "the name seed_1 is there more than once"),
        ({"elements": elements("a", "b", b=["c"])}, "element b comes after c, which is no element of this sweep"),
        ({"elements": elements("a", "b", "c", a=["c"], b=["a"], c=["b"])}, "in a circle: "),
        ({"elements": elements("a", a=["a"])}, "in a circle: a -> a"),
        ({"elements": elements("../a")}, "elements.0.name: '../a' cannot name a folder"),
        ({"elements": elements(".a")}, "'.a' cannot name a folder"),
        ({"elements": elements("sweep.json")}, "'sweep.json' cannot name a folder"),
        ({"elements": elements("a=1")}, "'a=1' cannot name a folder"),
        ({"elements": [{"name": "a", "sett": []}]}, "elements.0: unknown key sett; keys of an element are name, set, after"),
        ({"elements": [{"name": "a", "set": ["lr"]}]}, "elements.0.set: override 'lr': write it as section.key=value"),
        ({"elements": [{"name": "a", "set": ["run.dir=x"]}]}, "run.dir=x: the run directory of an element is"),
        ({"grid": {"run.dir": ["x"]}}, "run.dir=x: the run directory of an element is"),
        ({"grid": {"run.seed": []}}, "grid.run.seed has no values"),
        ({"grid": {"run.seed": list(range(40)), "mask.ratio": list(range(40))}}, "1600 combinations"),
        ({"grid": {"run.seed": [1]}, "comon": []}, "unknown key comon; did you mean common?"),
        ({"grid": {"run.seed": [1]}, "common": ["run={dir: x}"]}, "common: run={dir: x}: the run directory"),
        ({"grid": {"run.seed": [1]}, "time": 43200}, "time: 43200 is no time limit: write it in quotes, such as '12:00:00'"),
        ({"grid": {"run.seed": [1]}, "time": "noon"}, "time: 'noon' is no time limit"),
        ({"grid": {"run.seed": [1]}, "at_most": 0}, "at_most takes a number above 0, not 0"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        sweep(**values)
    assert says in str(caught.value)
    assert str(caught.value).startswith("x.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("time", ["30", "30:00", "12:00:00", "2-00", "2-00:00", "2-00:00:00"])
def test_times_are_written_as_slurm_does(time: str) -> None:
    assert sweep(grid={"run.seed": [1]}, time=time).time == time


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_of_no_element_is_refused(index: int) -> None:
    with pytest.raises(UsageError, match=rf"no element {index}: its elements are 0 to 1"):
        sweep(grid={"run.seed": [1, 2]}).words(index)
