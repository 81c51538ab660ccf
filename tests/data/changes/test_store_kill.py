"""Changes of a store killed at any moment and given again: the bytes are those of a change that nobody disturbed.

Once at every single step that renames, removes or makes a file, in this process; and for real, ranks and all, by SIGKILL.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ranks import command, environment, kill
from store_changes import (
    BOX,
    SALT,
    TINY,
    Killed,
    append_tiny,
    assert_same,
    build_tiny,
    dies_at,
    drop_tiny,
    everything,
    save_cohort,
)
from store_files import bold_values, contents, save_run

from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.data.store.verify import verify
from swiftv2.errors import SwiftError

STRIDE = int(os.environ.get("SWIFTV2_KILL_STRIDE", "4"))
"""An append has many steps: every fourth is tried, all of them where the variable says 1."""
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    save_cohort(root / "one", "abc")
    save_cohort(root / "two", "xy", first=5, frames=31)
    save_run(root / "two", "bad", bold_values(1, 9, TINY).clip(700, 700))
    return root


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs share a file, so that the changes meet shards that stay, change, come and go."""
    monkeypatch.setattr(layout, "ROWS_PER_SHARD", 2)


def survives_every_kill(before: Path, change: Change, scratch: Path, monkeypatch: pytest.MonkeyPatch, every: int = 1) -> int:
    """Kill a change at every (n-th) step, give it again, and compare; returns the number of steps."""
    expected = Path(shutil.copytree(before, scratch / "expected"))
    change(expected)
    wanted, old, new = contents(expected), everything(before), everything(expected)
    versions = (Store.open(before).version, Store.open(expected).version)
    for step in range(1, 10_000, every):
        store = Path(shutil.copytree(before, scratch / f"at{step}"))
        try:
            with dies_at(step, monkeypatch):
                change(store)
        except Killed:
            opened = Store.open(store)
            if opened.version == versions[0]:
                assert_same(everything(store), old)
            else:
                assert opened.version == versions[1]
                assert_same(everything(store), new)
            change(store)
            assert contents(store) == wanted, f"killed before step {step}"
            shutil.rmtree(store)
        else:
            assert contents(store) == wanted
            return step
    raise AssertionError("it never ended")


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_an_append_killed_at_every_step(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny(sources / "one", tmp_path / "before")
    steps = survives_every_kill(
        tmp_path / "before", lambda store: append_tiny(sources / "two", store), tmp_path, monkeypatch, STRIDE
    )
    assert steps > 50
    assert verify(tmp_path / "expected").ok


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_a_drop_killed_at_every_step(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny(sources / "one", tmp_path / "before")
    append_tiny(sources / "two", tmp_path / "before")

    def change(store: Path) -> None:
        drop_tiny(store, "b", "y", users=[{"path": "runs/a", "kind": "run", "subjects": 2, "this_store": True}])

    assert survives_every_kill(tmp_path / "before", change, tmp_path, monkeypatch) > 25
    assert verify(tmp_path / "expected").ok


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_an_append_finishes_a_drop_that_was_killed(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny(sources / "one", tmp_path / "before")
    expected = Path(shutil.copytree(tmp_path / "before", tmp_path / "expected"))
    drop_tiny(expected, "b")
    append_tiny(sources / "two", expected)
    wanted = contents(expected)
    killed = 0
    for step in range(1, 100, 2):
        store = Path(shutil.copytree(tmp_path / "before", tmp_path / f"at{step}"))
        try:
            with dies_at(step, monkeypatch):
                drop_tiny(store, "b")
        except Killed:
            if layout.unfinished(store) is None and Store.open(store).version == 1:
                continue  # Killed before it began: nothing tells of it.
            killed += 1
            append_tiny(sources / "two", store)
            assert contents(store) == wanted, f"killed before step {step}"
    assert killed > 5


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_a_build_killed_at_every_few_steps(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny(sources / "two", tmp_path / "expected")
    wanted = contents(tmp_path / "expected")
    for step in range(1, 10_000, 3 * STRIDE):
        store = tmp_path / f"at{step}"
        try:
            with dies_at(step, monkeypatch):
                build_tiny(sources / "two", store)
        except Killed:
            build_tiny(sources / "two", store)
            assert contents(store) == wanted, f"killed before step {step}"
        else:
            assert step > 50
            return


def killed_until_done(words: list[str], store: Path, ranks: list[int], seed: int) -> int:
    """Kill a command's ranks at random moments, and start it again by other numbers of ranks; returns the kills."""
    rng, kills = np.random.default_rng(seed), 0
    for number, count in enumerate([*ranks, ranks[0]]):
        process = subprocess.Popen(
            command(words, count, "mpiexec" if count > 1 else "alone"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        last = number == len(ranks)
        goal, deadline = int(rng.integers(1, 8)), time.monotonic() + 120
        before = progress_of(store)
        while not last and process.poll() is None and time.monotonic() < deadline:
            if progress_of(store) >= before + goal:
                time.sleep(rng.random() * 0.05)
                kill(process.pid)
                kills += 1
                break
            time.sleep(0.002)
        said, _ = process.communicate(timeout=240)
        if last:
            assert process.returncode == 0, said
        if layout.is_complete(store):
            everything(store)
        else:
            with pytest.raises(SwiftError, match=r"unfinished|is no store"):
                Store.open(store)
    return kills


def progress_of(store: Path) -> int:
    """Counts files that a change leaves on its way."""
    return sum(1 for staging in (layout.STAGING, layout.DROPPING) for _ in (store / staging).rglob("*"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    shape = (28, 32, 30)
    for number in range(70):
        save_run(root / "one" if number < 40 else root / "two", f"m{number}", bold_values(number, 6 + number % 9, shape))
    return root


@pytest.mark.slow
def test_ranks_killed_at_random_moments(many: Path, tmp_path: Path) -> None:
    if not (Path(sys.executable).parent / "mpiexec").exists():
        pytest.skip("no mpiexec in this environment")
    undisturbed, store = tmp_path / "undisturbed", tmp_path / "store"
    listed = tmp_path / "withdrawn.txt"
    listed.write_text("\n".join(f"m{number}" for number in range(0, 70, 3)) + "\n")
    grid = [f"grid.{name}={value}" for name, value in BOX.model_dump(exclude_unset=True).items()]

    def words(verb: str, folder: Path) -> list[str]:
        if verb == "drop":
            return ["store", "drop", str(folder), "--subjects", str(listed)]
        source = many / ("one" if verb == "build" else "two")
        return ["store", verb, str(source), str(folder), "--cohort", source.name, "--salt", SALT, *grid]

    kills = 0
    for seed, (verb, ranks) in enumerate([("build", [2, 2, 1]), ("append", [2, 1, 2]), ("drop", [1, 1])]):
        done = subprocess.run(command(words(verb, undisturbed)), env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        before = everything(store) if verb != "build" else {}
        kills += killed_until_done(words(verb, store), store, ranks, seed)
        assert contents(store) == contents(undisturbed), verb
        after = everything(store)
        common = before.keys() & after.keys()
        assert_same({key: after[key] for key in common}, {key: before[key] for key in common})
    assert kills >= 3
    assert verify(store).ok
