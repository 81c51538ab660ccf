"""Labels as numbers, scaled and weighted by the training subjects alone."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from swiftv2.config.task import TargetConfig
from swiftv2.downstream.targets import Scale, class_weights, encode
from swiftv2.errors import UsageError


def test_classes_are_sorted_or_as_configured_and_others_are_missing() -> None:
    sex = TargetConfig(column="sex", kind="classification")
    found = encode(sex, ["m", None, "f", "m"])
    assert found.classes == ("f", "m")
    np.testing.assert_array_equal(found.numbers, [1, np.nan, 0, 1])
    some = TargetConfig(column="dx", kind="classification", classes=("well", "asd"))
    np.testing.assert_array_equal(encode(some, ["asd", "well", "adhd", None]).numbers, [1, 0, np.nan, np.nan])
    assert encode(sex, ["10", "9", "2"]).classes == ("2", "9", "10")


def test_numbers_keep_their_units() -> None:
    age = TargetConfig(column="age", kind="regression")
    found = encode(age, ["61.5", None, " 70 ", "1e1"])
    assert found.classes == ()
    np.testing.assert_array_equal(found.numbers, [61.5, np.nan, 70.0, 10.0])


@pytest.mark.parametrize(
    ("kind", "classes", "values", "words"),
    [
        ("regression", None, ["3", "old"], "target x: a value is no number; say kind=classification"),
        ("regression", None, ["inf"], "is no number"),
        ("classification", None, ["a", "a", None], "target x: a in all subjects; two classes are needed"),
        ("classification", None, [None], "no value in all subjects"),
        ("classification", ("a", "c"), ["a", "b"], "no subject has c; the column has a, b: correct classes"),
    ],
)
def test_what_cannot_be_learned_is_told_with_its_column(
    kind: str, classes: tuple[str, ...] | None, values: list[str | None], words: str
) -> None:
    config = TargetConfig.model_validate({"column": "x", "kind": kind, "classes": classes})
    with pytest.raises(UsageError, match=words) as caught:
        encode(config, values)
    assert "old" not in str(caught.value)


def test_scale_is_of_the_known_training_numbers_and_undone_exactly() -> None:
    train = np.array([3.0, np.nan, 7.0, 8.0])
    scale = Scale.fit(train)
    known = StandardScaler().fit(train[~np.isnan(train), None])
    others = np.array([1.0, 100.0, np.nan])
    np.testing.assert_allclose(scale.apply(others)[:2], known.transform(others[:2, None])[:, 0], rtol=1e-12)
    np.testing.assert_allclose(scale.undo(scale.apply(others)), others, rtol=1e-12)
    np.testing.assert_array_equal(Scale().apply(others), others)
    with pytest.raises(UsageError, match="target iq: 3 training subjects have one and the same value"):
        Scale.fit(np.array([0.1, 0.1, 0.1]), "iq")
    with pytest.raises(UsageError, match="0 training subjects have no value"):
        Scale.fit(np.array([np.nan]), "iq")


def test_class_weights_are_scikit_learns() -> None:
    numbers = np.array([0, 0, 1, 2, 2, 2, np.nan])
    known = numbers[:-1]
    expected = compute_class_weight("balanced", classes=np.array([0.0, 1.0, 2.0]), y=known)
    np.testing.assert_allclose(class_weights(numbers, "abc"), expected, rtol=1e-15)
    with pytest.raises(UsageError, match="target dx: no training subject has d"):
        class_weights(numbers, "abcd", "dx")
