"""A store that vanishes while batches are read, and comes back: waited for, never filled in, never taken for damaged."""

import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_changes import build_tiny, save_cohort

from swiftv2.config.data import ClipConfig, NormalisationConfig
from swiftv2.config.model import MaskConfig
from swiftv2.data.samples import patience
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.batches import BatchReader, Prefetcher, evaluation_batches
from swiftv2.data.samples.clips import index_clips
from swiftv2.data.samples.order import SampleOrder
from swiftv2.data.samples.patience import Absence
from swiftv2.data.samples.reading import Reading
from swiftv2.data.store import absence, layout, shards
from swiftv2.data.store.reader import Store
from swiftv2.errors import InterruptedRunError, RankError, SwiftError

CLIP = ClipConfig(frames=4, stride_between=0.25)
MASK = MaskConfig(ratio=0.5, patch_size=(2, 2, 2, 2))
SCALING = NormalisationConfig(kind="per_voxel")
BATCHES = 30


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("patience")
    save_cohort(root / "files", "abcdefgh")
    build_tiny(root / "files", root / "store")
    return root / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of which two files are kept open, as of a large one: what is open would be read on."""
    monkeypatch.setattr(shards, "MOST_OPEN", 4)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.05)
    return Path(shutil.copytree(original, tmp_path / "mount" / "store"))


def training(path: Path, seconds: float = 600.0, **how: Any) -> BatchReader:
    store = Store.open(path)
    clips = index_clips(store.runs, CLIP)
    reading = Reading(patience_seconds=seconds, absence=Absence(f"rank 3: store {path}"), **how)
    return BatchReader(store, clips, SampleOrder(3, len(clips)), MASK, SCALING, seed=3, micro_batch=4, reading=reading)


def evaluation(path: Path, seconds: float = 600.0) -> Prefetcher:
    store = Store.open(path)
    clips = index_clips(store.runs, CLIP)
    return evaluation_batches(store, clips, MASK, SCALING, seed=3, batch=2, reading=Reading(patience_seconds=seconds))


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for field in fields(one):
            name = field.name
            np.testing.assert_array_equal(np.asarray(getattr(one, name)), np.asarray(getattr(other, name)), err_msg=name)


def away(store: Path) -> Path:
    """Let the file system that holds the store vanish, as far as paths tell."""
    return store.parent.rename(store.parent.with_name("elsewhere"))


def back(store: Path) -> None:
    store.parent.with_name("elsewhere").rename(store.parent)


def later(seconds: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


@pytest.mark.parametrize(("opened", "how"), [(training, {}), (training, {"on_bad_clip": "quarantine"}), (evaluation, {})])
def test_batches_are_the_same_where_the_store_vanished_and_came_back(
    opened: Callable[..., Prefetcher], how: dict[str, Any], store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(store, **how) as batches:
        expected = take(batches, BATCHES)
    with opened(store, **how) as batches:
        found = take(batches, 3)
        for _ in range(3):
            away(store)
            timer = later(0.3, lambda: back(store))
            found += take(batches, 5)
            timer.join()
        found += take(batches, BATCHES - len(found))
        assert batches.faults() == []
    assert_same(found, expected)
    told = capfd.readouterr().err.splitlines()
    # Of three absences within a minute one is told.
    assert len(told) == 2
    assert "cannot be reached (No such file or directory): waiting for it, 0 s of at most 600 s" in told[0]
    assert told[1].endswith(" is back after 0 s")
    if opened is training:
        assert all(f"rank 3: store {store} " in line for line in told)


def test_a_store_that_comes_and_goes_is_never_taken_for_damaged(store: Path) -> None:
    with training(store) as batches:
        expected = take(batches, BATCHES)
    ended = threading.Event()

    def flicker() -> None:
        for _ in range(5):
            away(store)
            ended.wait(0.2)
            back(store)
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=flicker)
    with training(store, on_bad_clip="quarantine", threads=4) as batches:
        thread.start()
        found = []
        for batch in itertools.islice(batches, BATCHES):
            found.append(batch)
            time.sleep(0.03)
        assert batches.faults() == []
    ended.set()
    thread.join()
    assert_same(found, expected)


@pytest.mark.parametrize("again", [False, True])
def test_a_file_is_not_damaged_that_was_away_for_the_moment_in_which_it_was_read(
    again: bool, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is back by the time that anybody looks why a file is missing; or is so, and gone again."""
    with training(store) as batches:
        expected = take(batches, 4)
    look, calls = absence.look, itertools.count()

    def late(*arguments: Any) -> None:
        call = next(calls)
        if call in (0, 2) and not store.exists():
            back(store)
        look(*arguments)
        if call == 0 and again:
            away(store)

    with training(store, on_bad_clip="quarantine", prefetch=1, threads=1) as batches:
        monkeypatch.setattr(absence, "look", late)
        away(store)
        found = take(batches, 4)
        assert batches.faults() == []
    assert_same(found, expected)


@pytest.mark.parametrize("opened", [training, evaluation])
def test_a_store_that_stays_away_ends_the_run_in_one_line(opened: Callable[..., Prefetcher], store: Path) -> None:
    with opened(store, seconds=0.6) as batches:
        take(batches, 1)
        away(store)
        began = time.monotonic()
        with pytest.raises(InterruptedRunError) as told:
            take(batches, BATCHES)
        assert 0.5 < time.monotonic() - began < 5
    assert f"waited 1 s (data.patience_seconds): store {store}: run " in str(told.value)
    assert "cannot be read now (No such file or directory)" in str(told.value)
    assert "\n" not in str(told.value)


def test_without_patience_nothing_waits(store: Path) -> None:
    with training(store, seconds=0.0) as batches:
        away(store)
        with pytest.raises(InterruptedRunError, match=rf"^store {store}: .* cannot be read now"):
            take(batches, BATCHES)


def test_one_missing_file_of_a_store_that_is_there_is_damage_at_once(store: Path) -> None:
    run = Store.open(store).runs[2]
    layout.bold_shards(store, run.dtype, run.row)[0].unlink()
    began = time.monotonic()
    with training(store) as batches, pytest.raises(SwiftError, match=f"run {run.key}, frames .*its shard file is missing"):
        take(batches, BATCHES)
    with training(store, on_bad_clip="quarantine") as batches:
        take(batches, BATCHES)
        assert {fault.run for fault in batches.faults()} == {run.key}
    (store / "brain" / "c.0.0").unlink()
    with training(store) as batches, pytest.raises(SwiftError, match=r"brain cannot be read \(brain is missing\)"):
        take(batches, BATCHES)
    assert time.monotonic() - began < 10


def test_closing_ends_the_waiting_at_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY", 300.0)
    threads = threading.active_count()
    batches = training(store, threads=3)
    away(store)
    answers: list[Batch | None] = []
    waiting = threading.Thread(target=lambda: answers.append(next(batches, None)))
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    began = time.monotonic()
    batches.close()
    waiting.join()
    assert time.monotonic() - began < 1
    assert answers == [None]
    assert threading.active_count() == threads


def test_what_was_open_is_opened_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a file system that was mounted anew: every descriptor answers with an input/output error."""
    monkeypatch.setattr(shards, "MOST_OPEN", 1024)
    with training(store, prefetch=1) as batches:
        expected = take(batches, BATCHES)
    with training(store, seconds=20.0, prefetch=1) as batches:
        found = take(batches, 10)
        time.sleep(0.2)  # What is read ahead is there.
        broken = os.open("/proc/self/mem", os.O_RDONLY)
        stale = [int(link.name) for link in Path("/proc/self/fd").iterdir() if str(store) in os.path.realpath(link)]
        assert stale
        for descriptor in stale:
            os.dup2(broken, descriptor, inheritable=False)
        os.close(broken)
        found += take(batches, BATCHES - 10)
    assert_same(found, expected)


def test_another_store_in_its_place_is_refused(store: Path, tmp_path: Path) -> None:
    save_cohort(tmp_path / "others", "abcdefgh", first=20)
    with training(store) as batches:
        take(batches, 1)
        away(store)

        def replaced() -> None:
            build_tiny(tmp_path / "others", tmp_path / "other", cohort="two")
            store.parent.mkdir()
            (tmp_path / "other").rename(store)

        timer = later(0.1, replaced)
        with pytest.raises(RankError, match="another store is in its place now"):
            take(batches, BATCHES)
        timer.join()


def test_any_source_may_say_that_it_is_away(store: Path) -> None:
    """Whatever answers with an error of the file system is waited for; its clips are as if it had not."""
    with training(store) as batches:
        expected = take(batches, 6)
    source = Store.open(store)
    plain, answers = source.read_bold, itertools.count()

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(answers) % 3 == 0:
            raise TimeoutError(110, "Connection timed out")
        return plain(*arguments, **options)

    source.read_bold = failing  # type: ignore[method-assign]
    clips = index_clips(source.runs, CLIP)
    reading = replace(Reading(), patience_seconds=60.0)
    with BatchReader(
        source, clips, SampleOrder(3, len(clips)), MASK, SCALING, seed=3, micro_batch=4, reading=reading
    ) as batches:
        assert_same(take(batches, 6), expected)


def test_one_line_is_said_a_minute(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Absence("rank 0: store x")
    for _ in range(50):
        store.goes_on("Stale file handle", 600.0)
    assert capfd.readouterr().err.count("\n") == 1
    monkeypatch.setattr(patience, "LINE_SECONDS", 0.0)
    store.goes_on("Stale file handle", 600.0)
    store.ends()
    store.ends()
    told = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 2)[2] for line in told] == [
        "rank 0: store x cannot be reached (Stale file handle): waiting for it, 0 s of at most 600 s",
        "rank 0: store x is back after 0 s",
    ]
