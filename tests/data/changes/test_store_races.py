"""Two changes of one store at once: the second one to take the lock sees that the first one came between."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_changes import append_tiny, build_tiny, drop_tiny, everything, save_cohort
from store_files import contents

from swiftv2.data.changes import append as append_module
from swiftv2.data.changes import build as build_module
from swiftv2.data.changes import drop as drop_module
from swiftv2.data.keys import subject_key
from swiftv2.data.store.reader import Store
from swiftv2.data.store.verify import verify
from swiftv2.errors import SwiftError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("races")
    save_cohort(root / "one", "abc")
    save_cohort(root / "two", "de", first=5, frames=15)
    save_cohort(root / "three", "fg", first=9, frames=14)
    build_tiny(root / "one", root / "store")
    return root


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "store", tmp_path / "store"))


def before_it(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, other: Callable[[], object]) -> None:
    """Let another change run whole just before a step of a change, once."""
    step = getattr(module, name)

    def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, step)
        other()
        return step(*arguments, **options)

    monkeypatch.setattr(module, name, late)


def test_a_drop_while_an_append_looks_for_files(original: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_it(monkeypatch, append_module, "discover", lambda: drop_tiny(store, "b"))
    with pytest.raises(SwiftError, match=r"changed meanwhile .*: give the command again"):
        append_tiny(original / "two", store)
    assert not list(store.glob(".*"))
    assert [run.withdrawn for run in Store.open(store).runs].count(2) == 1
    assert append_tiny(original / "two", store).version == 3
    assert [run.withdrawn for run in Store.open(store).runs].count(2) == 1
    assert verify(store).ok


def test_an_append_within_an_append(original: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_it(monkeypatch, append_module, "discover", lambda: append_tiny(original / "three", store, cohort="three"))
    with pytest.raises(SwiftError, match="changed meanwhile"):
        append_tiny(original / "two", store)
    first = everything(store)
    assert append_tiny(original / "two", store).version == 3
    after = everything(store)
    assert len(after) == len(first) + 2
    assert first.keys() < after.keys()
    assert verify(store).ok


def test_an_append_that_takes_nothing_keeps_what_came_meanwhile(
    original: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_it(monkeypatch, append_module, "discover", lambda: append_tiny(original / "three", store, cohort="three"))
    with pytest.raises(SwiftError, match="changed meanwhile"):
        append_tiny(original / "one", store, cohort="one")
    assert (store / "build_report.jsonl").read_text().count('"version": 2') == 2


def test_an_append_while_a_drop_begins(original: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_it(monkeypatch, drop_module, "make_staging", lambda: append_tiny(original / "two", store))
    report = drop_tiny(store, "b")
    assert (report.version, len(report.runs)) == (3, 1)
    opened = Store.open(store)
    key = subject_key("0123456789abcdef", "one", "b")
    assert [run.withdrawn for run in opened.runs if run.subject == key] == [3]
    assert len(opened.runs) == 5
    assert verify(store).ok


def test_a_build_within_a_build(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_it(monkeypatch, build_module, "take", lambda: build_tiny(original / "two", tmp_path / "new"))
    with pytest.raises(SwiftError):
        build_tiny(original / "one", tmp_path / "new")
    before = contents(tmp_path / "new")
    assert build_tiny(original / "two", tmp_path / "new").nothing_to_do
    assert contents(tmp_path / "new") == before
    assert verify(tmp_path / "new").ok
