from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.data import SplitConfig
from swiftv2.data.samples.splits import PARTS, Splits, split_by_seed, split_subjects, take_share
from swiftv2.errors import UsageError

FRACTIONS = (0.7, 0.15, 0.15)
SUBJECTS = [f"s{i:04d}" for i in range(400)]


def _places(splits: Splits) -> dict[str, str]:
    return {subject: part for part in PARTS for subject in splits.part(part)}


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=3, max_size=60))
def test_parts_are_disjoint_complete_never_empty_and_deterministic(seed: int, subjects: set[str]) -> None:
    splits = split_by_seed(seed, FRACTIONS, subjects)
    parts = [splits.train, splits.val, splits.test]
    assert sorted(s for part in parts for s in part) == sorted(subjects)
    assert all(parts)
    assert split_by_seed(seed, FRACTIONS, sorted(subjects, reverse=True)) == splits


def test_shares_are_about_those_asked_for_and_the_seed_matters() -> None:
    splits = split_by_seed(0, FRACTIONS, SUBJECTS)
    assert abs(len(splits.train) / 400 - 0.7) < 4 * (0.7 * 0.3 / 400) ** 0.5
    assert abs(len(splits.val) / 400 - 0.15) < 4 * (0.15 * 0.85 / 400) ** 0.5
    assert split_by_seed(1, FRACTIONS, SUBJECTS) != splits


def test_a_subject_who_joins_or_leaves_moves_no_other() -> None:
    few, many = _places(split_by_seed(5, FRACTIONS, SUBJECTS[:300])), _places(split_by_seed(5, FRACTIONS, SUBJECTS))
    assert few == {subject: many[subject] for subject in few}


@settings(deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 8), min_size=12, max_size=40))
def test_families_stay_together(seed: int, members: list[int]) -> None:
    families = {f"s{i}": f"f{family}" for i, family in enumerate(members) if family}
    subjects = [f"s{i}" for i in range(len(members))]
    units = len(set(families.values())) + members.count(0)
    if units < 3:
        return
    places = _places(split_by_seed(seed, FRACTIONS, subjects, families))
    assert set(places) == set(subjects)
    for family in set(families.values()):
        assert len({places[s] for s in subjects if families.get(s) == family}) == 1


def test_a_part_without_a_share_stays_empty() -> None:
    splits = split_by_seed(0, (0.5, 0.5, 0.0), SUBJECTS)
    assert not splits.test
    assert split_by_seed(0, (1.0, 0.0, 0.0), ["a"]).train == ("a",)


def test_too_few_subjects_are_refused() -> None:
    with pytest.raises(UsageError, match="2 subjects or families cannot fill the 3 parts"):
        split_by_seed(0, FRACTIONS, ["a", "b"])


def _file(tmp_path: Path, text: str) -> SplitConfig:
    path = tmp_path / "split.txt"
    path.write_text(text, encoding="utf-8")
    return SplitConfig(file=path)


IDS = {"sub-1": "k1", "A/1": "k1", "2": "k2", "3": "k3", "4": "k4"}
KEYS = ["k1", "k2", "k3", "k4"]


@pytest.mark.parametrize("tail", ["", "_subjects"])
def test_a_file_divides_by_ids_or_keys_and_reports_the_rest(tmp_path: Path, tail: str) -> None:
    text = f"# made by hand\ntrain{tail}\nsub-1\nA/1\n\nval{tail}\nk2\r\ntest{tail}\n3\n"
    splits = split_subjects(_file(tmp_path, text), KEYS, ids=IDS)
    assert splits == Splits(("k1",), ("k2",), ("k3",), unassigned=("k4",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train\n2\nval\nsecret\n", r"line 4: this subject is not in the store"),
        ("train\n2\nval\n3\nk2\n", r"line 5: this subject is in train and in val"),
        ("2\ntrain\n", r"line 1: a subject before any header"),
        ("val\n2\n", r"no subject under the header train"),
    ],
)
def test_a_wrong_file_is_refused_without_naming_the_subject(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        split_subjects(_file(tmp_path, text), KEYS, ids=IDS)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        split_subjects(SplitConfig(file=tmp_path / "none.txt"), KEYS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="not a text file"):
        split_subjects(SplitConfig(file=tmp_path / "binary"), KEYS)


def test_without_a_file_the_seed_decides() -> None:
    assert split_subjects(SplitConfig(seed=3), SUBJECTS) == split_by_seed(3, FRACTIONS, SUBJECTS)


@given(st.integers(0, 2**31), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_smaller_shares_of_the_training_subjects_lie_within_larger_ones(seed: int, one: float, other: float) -> None:
    whole = split_by_seed(seed, FRACTIONS, SUBJECTS[:60])
    small, large = (take_share(whole, share, seed) for share in sorted((one, other)))
    assert set(small.train) <= set(large.train) <= set(whole.train)
    assert len(small.train) == max(round(min(one, other) * len(whole.train)), 1)
    assert (small.val, small.test) == (whole.val, whole.test)
    assert sorted((*small.train, *small.unassigned)) == sorted(whole.train)
    assert split_subjects(SplitConfig(seed=seed, fractions=FRACTIONS, train_share=one), SUBJECTS[:60]) == take_share(
        whole, one, seed
    )
