"""Splits of downstream tasks: nobody crosses, everybody has a place, shares hold, and a planted leak is caught."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.task import TaskSplitConfig
from swiftv2.data.samples.folds import Unit, check_leak, split_units
from swiftv2.data.samples.splits import PARTS, Splits
from swiftv2.errors import SwiftError, UsageError

KINDS: dict[str, dict[str, Any]] = {
    "seed": {"kind": "seed", "index": 2},
    "kfold": {"kind": "kfold", "count": 5, "index": 1},
    "site": {"kind": "site", "index": 1},
    "few_shot": {"kind": "few_shot", "shots": 20, "val_shots": 6, "index": 3},
    "file": {"kind": "file"},
}


def _config(kind: str, folder: Path | None = None, units: Sequence[Unit] = (), **more: Any) -> TaskSplitConfig:
    settings = KINDS[kind] | more
    if kind == "file":
        assert folder is not None
        path = folder / "split.txt"
        families = sorted({unit.family or unit.key for unit in units})
        part = {name: PARTS[i % 3] for i, name in enumerate(families)}
        lines = [f"{p}\n" + "".join(f"{u.key}\n" for u in units if part[u.family or u.key] == p) for p in PARTS]
        path.write_text("".join(lines), encoding="utf-8")
        settings |= {"file": path}
    return TaskSplitConfig.model_validate(settings)


def _cohort(count: int, families: int, seed: int, numbers: bool) -> list[Unit]:
    """People of 3 sites: some in families of up to 4 (who may live at other sites), some without a value."""
    rng = np.random.default_rng(seed)
    sizes: Counter[int] = Counter()
    units = []
    for i in range(count):
        family, site, value = int(rng.integers(0, 60)), i % 3, float(rng.integers(0, 12))
        sizes[family] += 1
        name = f"f{family}" if family < families and sizes[family] <= 4 else None
        shown = None if value == 11 else value if numbers else "case" if value < 4 else "control"
        units.append(Unit(f"s{i:03d}", f"s{i:03d}", name, f"site{site}", shown))
    return units


COHORTS = st.builds(_cohort, st.integers(60, 120), st.integers(0, 40), st.integers(0, 2**31), st.booleans())
FEW = settings(max_examples=30)


def _places(splits: Splits) -> dict[str, str]:
    return {key: part for part in PARTS for key in splits.part(part)} | dict.fromkeys(splits.unassigned, "unassigned")


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(COHORTS, st.integers(0, 1000), st.randoms())
def test_nobody_and_no_family_crosses_and_everybody_has_a_place(
    tmp_path_factory: pytest.TempPathFactory, kind: str, units: list[Unit], seed: int, chance: Any
) -> None:
    folder = tmp_path_factory.mktemp("split")
    config = _config(kind, folder, units, seed=seed)
    splits = split_units(config, units)
    keys = [key for part in (splits.train, splits.val, splits.test, splits.unassigned) for key in part]
    assert sorted(keys) == sorted(unit.key for unit in units)
    assert splits.train
    assert splits.val
    assert splits.test
    places = _places(splits)
    for family in {unit.family for unit in units} - {None}:
        assert len({places[u.key] for u in units if u.family == family} - {"unassigned"}) == 1
    if kind not in {"site", "few_shot"}:
        assert not splits.unassigned
    for part in ("train", "val"):
        assert any(u.value is not None and places[u.key] == part for u in units)
    # The order of the units is no part of the split.
    shuffled = list(units)
    chance.shuffle(shuffled)
    assert split_units(config, shuffled) == splits


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(COHORTS, st.integers(0, 1000), st.sampled_from(["unit", "subject", "family"]))
def test_a_planted_leak_is_caught(
    tmp_path_factory: pytest.TempPathFactory, kind: str, units: list[Unit], seed: int, what: str
) -> None:
    splits = split_units(_config(kind, tmp_path_factory.mktemp("split"), units, seed=seed), units)
    check_leak(splits, units)
    victim = next(unit for unit in units if unit.key in splits.train)
    if what == "unit":
        leaked, known = replace(splits, test=(*splits.test, victim.key)), units
    else:
        twin = Unit("twin", victim.subject if what == "subject" else "twin", victim.family or "f", victim.site)
        kin = [replace(unit, family=unit.family or "f") if unit is victim and what == "family" else unit for unit in units]
        leaked, known = replace(splits, test=(*splits.test, twin.key)), [*kin, twin]
    with pytest.raises(SwiftError, match=f"1 {what[:5]}.* in more than one of train and test"):
        check_leak(leaked, known, families=what == "family")


@FEW
@given(COHORTS, st.integers(0, 1000))
def test_each_unit_tests_once_over_the_folds_which_are_alike(units: list[Unit], seed: int) -> None:
    folds = [split_units(_config("kfold", seed=seed, index=i), units) for i in range(5)]
    assert sorted(key for fold in folds for key in fold.test) == [unit.key for unit in units]
    largest = max(Counter(unit.family for unit in units if unit.family).values(), default=1)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 2 * largest
    for name in {unit.value for unit in units if isinstance(unit.value, str)}:
        members = {unit.key for unit in units if unit.value == name}
        for fold in folds:
            assert abs(len(members & set(fold.test)) - len(members) / 5) <= largest


@FEW
@given(st.integers(0, 1000), st.integers(30, 90), st.integers(30, 90))
def test_strata_of_people_who_stand_alone_are_exact_to_one(seed: int, cases: int, others: int) -> None:
    units = [Unit(f"s{i}", f"s{i}", value="case" if i < cases else "control") for i in range(cases + others)]
    sick = {f"s{i}" for i in range(cases)}
    folds = [split_units(_config("kfold", seed=seed, index=i), units).test for i in range(5)]
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    for fold in folds:
        assert abs(len(sick & set(fold)) - cases / 5) < 1
    splits = split_units(_config("seed", seed=seed), units)
    for part, share in zip(PARTS, (0.7, 0.15, 0.15), strict=True):
        assert abs(len(sick & set(splits.part(part))) - share * cases) <= 1
        assert abs(len(splits.part(part)) - share * len(units)) <= 2


def test_numbers_are_stratified_by_fifths() -> None:
    units = [Unit(f"s{i:03d}", f"s{i:03d}", value=float(i % 97) ** 2) for i in range(300)]
    ranks = {unit.key: place for place, unit in enumerate(sorted(units, key=lambda u: float(u.value or 0.0)))}
    for index in range(5):
        splits = split_units(_config("kfold", index=index), units)
        assert all(abs(n - 12) <= 3 for n in Counter(ranks[key] // 60 for key in splits.test).values())
    loose = [split_units(_config("kfold", index=i, stratify=False), units).test for i in range(5)]
    spread = [abs(n - 12) for fold in loose for n in Counter(ranks[key] // 60 for key in fold).values()]
    assert max(spread) > 3


def test_who_tests_is_left_to_chance() -> None:
    """Over draws a subject tests about as often as the test part's share, in a family or not."""
    units = [Unit(f"s{i:02d}", f"s{i:02d}", f"f{i // 3}" if i < 30 else None, value="ab"[i % 2]) for i in range(60)]
    draws = [split_units(_config("seed", index=i, count=400, fractions=(0.5, 0.2, 0.3)), units) for i in range(400)]
    counts = Counter(key for draw in draws for key in draw.test)
    related = sum(counts[f"s{i:02d}"] for i in range(30)) / 30 / 400
    alone = sum(counts[f"s{i:02d}"] for i in range(30, 60)) / 30 / 400
    assert related == pytest.approx(0.3, abs=0.02)
    assert alone == pytest.approx(0.3, abs=0.02)
    assert all(abs(counts[unit.key] / 400 - 0.3) < 5 * (0.3 * 0.7 / 400) ** 0.5 for unit in units)


@FEW
@given(COHORTS, st.integers(0, 1000))
def test_few_shots_are_exact_matched_and_differ_between_draws(units: list[Unit], seed: int) -> None:
    draws = [split_units(_config("few_shot", seed=seed, index=i), units) for i in range(10)]
    value = {unit.key: unit.value for unit in units}
    labelled = [unit for unit in units if unit.value is not None]
    for draw in draws:
        assert (len(draw.train), len(draw.val)) == (20, 6)
        assert None not in {value[key] for key in (*draw.train, *draw.val)}
        if isinstance(labelled[0].value, str):
            share = sum(unit.value == "case" for unit in labelled) / len(labelled)
            trained = sum(value[key] == "case" for key in draw.train)
            assert abs(trained - 20 * share) < 1
            assert abs(sum(value[key] == "case" for key in draw.val) - 6 * trained / 20) < 1
    assert len({draw.train for draw in draws}) == 10


def test_whole_sites_test_and_relatives_elsewhere_are_left_out() -> None:
    units = [Unit(f"s{i:02d}", f"s{i:02d}", None, f"site{i % 3}", "ab"[i % 2]) for i in range(30)]
    units += [Unit("t0", "t0", "f", "site0", "a"), Unit("t1", "t1", "f", "site1", "a"), Unit("lost", "lost", None, None, "a")]
    splits = split_units(_config("site", index=1), units)
    assert set(splits.test) == {u.key for u in units if u.site == "site1"}
    assert splits.unassigned == ("lost", "t0")
    both = split_units(_config("site", index=0, test_sites=("site0", "site2")), units)
    assert set(both.test) == {u.key for u in units if u.site in {"site0", "site2"}}
    with pytest.raises(UsageError, match="not among the 3 sites"):
        split_units(_config("site", index=0, test_sites=("Mars",)), units)
    with pytest.raises(UsageError, match="index=3 is beyond the 3 sites"):
        split_units(_config("site", index=3), units)


def test_runs_are_divided_whoever_they_are_of() -> None:
    units = [Unit(f"r{i:02d}", "one", "f", None) for i in range(12)]
    folds = [split_units(_config("kfold", index=i, unit="run", count=6), units) for i in range(6)]
    assert sorted(key for fold in folds for key in fold.test) == [unit.key for unit in units]
    with pytest.raises(UsageError, match="1 subjects or families"):
        split_units(_config("kfold", count=6), units)
    with pytest.raises(UsageError, match="unit=subject"):
        split_units(_config("site", unit="run"), units)


def test_runs_of_one_subject_stay_together_where_subjects_are_divided() -> None:
    units = [Unit(f"r{i:02d}", f"s{i // 3}", None, None, "ab"[i % 2]) for i in range(60)]
    for index in range(5):
        splits = split_units(_config("kfold", index=index), units)
        for part in PARTS:
            subjects = {unit.subject for unit in units if unit.key in splits.part(part)}
            assert len(splits.part(part)) == 3 * len(subjects)


def test_a_file_that_parts_a_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "split.txt"
    path.write_text("train\nname-a\nb\nval\nc\ntest\nd\n", encoding="utf-8")
    units = [Unit(k, k, "f" if k in "ad" else None) for k in "abcde"]
    config = TaskSplitConfig(kind="file", file=path)
    with pytest.raises(SwiftError, match=r"1 families are in more than one of train and test.*split\.families=false"):
        split_units(config, units, {"name-a": "a"})
    splits = split_units(config.model_copy(update={"families": False}), units, {"name-a": "a"})
    assert splits == Splits(("a", "b"), ("c",), ("d",), ("e",))
    path.write_text("train\na\ntest\nd\n", encoding="utf-8")
    with pytest.raises(UsageError, match="header val"):
        split_units(config, units)


def test_too_few_subjects_are_told() -> None:
    units = [Unit(f"s{i}", f"s{i}", None, "x", "ab"[i % 2]) for i in range(4)]
    with pytest.raises(UsageError, match="4 subjects or families with a value cannot fill 5 parts"):
        split_units(_config("kfold"), units)
    with pytest.raises(UsageError, match="there are 4"):
        split_units(_config("few_shot"), units)
    with pytest.raises(UsageError, match="names 1 sites"):
        split_units(_config("site"), units)
    with pytest.raises(UsageError, match="2 subjects or families with a value cannot fill 3 parts"):
        split_units(_config("seed"), units[:2])
    related = [replace(unit, family="f") for unit in units]
    with pytest.raises(UsageError, match="1 subjects or families"):
        split_units(_config("seed"), related)
