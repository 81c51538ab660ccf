"""Which elements of a sweep are queued, behind which others, and how each of them stands."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import environment

from swiftv2.cluster.book import LOCK, OTHER_JOB, Entry, alone_in, note, now, read_book
from swiftv2.cluster.elements import ElementState, State, element_states
from swiftv2.cluster.slurm import Job
from swiftv2.cluster.sweep import Request, array_indices, choose, element, group, resolve
from swiftv2.config.load import build
from swiftv2.config.sweep import SweepConfig
from swiftv2.errors import SwiftError, UsageError

CHAIN = [{"name": "a"}, {"name": "b"}, {"name": "c", "after": ["a", "b"]}, {"name": "d", "after": ["c"]}]


def sweep(folder: Path | str = "runs/x", elements: Any = CHAIN, **values: Any) -> SweepConfig:
    return build(SweepConfig, {"config": "5M", "folder": str(folder), "elements": elements, **values}, "x.yaml")


def stands(name: str, index: int, state: State, job: str | None = "9_0") -> ElementState:
    return ElementState(name, index, Path("runs/x") / name, state, "", job, queued=False, step=None, steps=None, loss=None)


def entry(job: str, **after: str) -> Entry:
    return Entry(job, int(job.partition("_")[2]), ("data.store=x",), now(), "sweep_0.yaml", after)


def job(name: str, state: str, reason: str = "None") -> Job:
    return Job(name, "500" + name.partition("_")[2], state, reason, "", "1:00", "N/A", 1, "x")


def run(folder: Path, *events: Mapping[str, Any], steps: int = 0) -> None:
    """A run directory as `swiftv2 pretrain` leaves it, as far as it tells how the run stands."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {max_steps: 7}\n")
    with (folder / "events.jsonl").open("w") as file:
        for row in events:
            file.write(json.dumps({"step": None, "attempt": 1, "time": time.time() + 1, **row}) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps({"step": step, "attempt": 1, "time": time.time(), "loss": 1 / step}) + "\n")


def states(made: SweepConfig, *jobs: Job) -> dict[str, tuple[str, str]]:
    queue = {one.name: one for one in jobs}
    return {one.name: (one.state, one.reason) for one in element_states(made, read_book(made.folder), lambda _: queue)}


# What an element runs


def test_an_element_is_the_preset_with_its_words() -> None:
    made = sweep(common=["train.max_steps=5"], elements=[{"name": "a"}, {"name": "b", "set": ["run.seed=3"]}])
    path, words = element(made, 1, ["data.store=x"])
    assert path.name == "5M.yaml"
    assert words == ("train.max_steps=5", "run.seed=3", "data.store=x", "run.dir=runs/x/b")


@pytest.mark.parametrize(
    ("elements", "words", "says"),
    [
        ([{"name": "a"}, {"name": "b", "set": ["mask.ratio=2"]}], [], "element b: .* with mask.ratio=2: mask.ratio takes"),
        ([{"name": "a", "set": ["mask.rato=2"]}], [], "element a: .*unknown key mask.rato; did you mean mask.ratio"),
        ([{"name": "a"}], ["train.max_steps=0"], "element a: .*train.max_steps takes a number above 0"),
        ([{"name": "a"}], ["run.dir=x"], "run.dir=x: the run directory of an element is"),
        ([{"name": "a"}], ["steps"], "override 'steps': write it as section.key=value"),
    ],
)
def test_wrong_settings_of_an_element_are_told_with_its_name(elements: Any, words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        resolve(sweep(elements=elements), words)


def test_ranks_that_cannot_share_the_batch_are_told_before_anything_is_queued() -> None:
    with pytest.raises(UsageError, match=r"element a: train.global_batch=10 cannot be split over 4 ranks"):
        resolve(sweep(nodes=2, tasks_per_node=2, common=["train.global_batch=10"]))


# Which are queued


@given(st.sets(st.integers(0, 99), min_size=1))
def test_array_indices_say_exactly_the_elements(indices: set[int]) -> None:
    said: list[int] = []
    for part in array_indices(sorted(indices)).split(","):
        first, _, last = part.partition("-")
        said += range(int(first), int(last or first) + 1)
    assert said == sorted(indices)


@given(data=st.data())
def test_every_element_is_queued_once_behind_its_parents(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    order = data.draw(st.permutations(range(count)))
    elements = []
    for place in range(count):
        # Parents stand before it in some other order than that of the file.
        before = [other for other in range(count) if order[other] < order[place]]
        parents = data.draw(st.lists(st.sampled_from(before), unique=True)) if before else []
        elements.append({"name": f"e{place}", "after": [f"e{one}" for one in parents]})
    made = sweep(elements=elements)
    finished = set(data.draw(st.lists(st.sampled_from(made.names()), unique=True)))
    found = [stands(name, index, "finished" if name in finished else "not begun") for index, name in enumerate(made.names())]
    chosen, passed_over = choose(found, Request())
    assert set(passed_over) == finished
    queued: set[str] = set()
    arrays = group(made, chosen, found)
    for parents_of, names in arrays:
        assert set(parents_of) <= queued
        for name in names:
            assert set(made.runs()[made.names().index(name)].after) - finished == set(parents_of)
        assert not queued & set(names)
        queued |= set(names)
    assert queued == chosen
    assert len({parents_of for parents_of, _ in arrays}) == len(arrays)


@pytest.mark.parametrize(
    ("request_", "queued"),
    [
        (Request(), {"not begun", "failed"}),
        (Request(failed=True), {"failed"}),
        (Request(only=("e0", "e4")), {"not begun"}),
        (Request(only=("e4", "e5"), failed=True), {"failed"}),
    ],
)
def test_what_is_done_queued_or_running_is_passed_over(request_: Request, queued: set[str]) -> None:
    kinds: list[State] = ["not begun", "pending", "waiting", "running", "finished", "failed"]
    chosen, passed_over = choose([stands(f"e{index}", index, kind) for index, kind in enumerate(kinds)], request_)
    assert {kinds[int(name[1:])] for name in chosen} == queued
    assert chosen | set(passed_over) == set(request_.only or [f"e{index}" for index in range(len(kinds))])
    assert not chosen & set(passed_over)


@pytest.mark.parametrize(
    ("state", "job_", "says"),
    [
        ("failed", "9_0", "element c comes after a, which is failed: queue that one, too"),
        ("not begun", None, "element c comes after a, which is not begun: queue that one, too"),
        ("running", None, "element c comes after a, which runs without a Slurm job"),
    ],
)
def test_an_element_is_not_queued_behind_one_that_will_not_come(state: State, job_: str | None, says: str) -> None:
    found = [stands(name, index, "finished", None) for index, name in enumerate("abcd")]
    found[0] = replace(found[0], state=state, job=job_)
    with pytest.raises(UsageError, match=says):
        group(sweep(), {"c"}, found)


# The book of jobs


WRITER = """
import sys, time
from pathlib import Path
from swiftv2.cluster.book import Entry, alone_in, note, now, read_book
folder, mine = Path(sys.argv[1]), sys.argv[2]
for turn in range(6):
    with alone_in(folder):
        assert f"{mine}_{turn}" not in read_book(folder)
        note(folder, {f"{mine}_{turn}": Entry(f"{turn}_0", 0, (), now(), "sweep_0.yaml", {})})
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from swiftv2.cluster.book import alone_in
with alone_in(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_submissions_at_once_lose_none_of_one_anothers_entries(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*words, name], env=environment()) for name in ("x", "y", "z")]
    assert [one.wait(timeout=60) for one in writers] == [0, 0, 0]
    assert set(read_book(tmp_path)) == {f"{name}_{turn}" for name in "xyz" for turn in range(6)}


def test_a_submission_waits_for_another_and_says_so_in_the_end(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path),
        pytest.raises(SwiftError, match="another `swiftv2 sweep submit` is at work"),
        alone_in(tmp_path, 0.2),
    ):
        pass
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment(), check=False, timeout=30)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    with alone_in(tmp_path, 0.0):
        pass


def test_a_damaged_book_is_told(tmp_path: Path) -> None:
    note(tmp_path, {"a": entry("3_0")})
    assert read_book(tmp_path)["a"].job == "3_0"
    (tmp_path / "sweep.json").write_text('{"elements": {"a": {}}}')
    with pytest.raises(SwiftError, match=r"sweep\.json is damaged"):
        read_book(tmp_path)


# How elements stand


def test_elements_stand_as_their_jobs_and_runs_do(tmp_path: Path) -> None:
    made = sweep(tmp_path, [{"name": name} for name in ("new", "waits", "runs", "done", "broke", "gone", "memory", "time")])
    run(tmp_path / "done", {"event": "start"}, {"event": "finished", "step": 7}, {"event": "figure"}, steps=7)
    run(tmp_path / "broke", {"event": "start"}, {"event": "failed", "error": "X", "problem": "no such store"}, steps=3)
    run(tmp_path / "time", {"event": "start"}, {"event": "stopped", "step": 2, "signal": "its time is up"}, steps=2)
    note(tmp_path, {name: entry(f"5_{index}") for index, name in enumerate(made.names()) if name != "new"})
    (tmp_path / "slurm-5_6.out").write_text(
        "swiftv2: 2026-11-22 10:00:00 job 506\nswiftv2 (rank 1): too little memory\nswiftv2: 2026-11-22 10:00:01 ranks ended\n"
    )
    queue = (
        job("5_1", "PENDING", "Resources"),
        job("5_2", "RUNNING"),
        job("5_4", "FAILED"),
        job("5_6", "OUT_OF_MEMORY"),
        job("5_7", "TIMEOUT"),
    )
    assert states(made, *queue) == {
        "new": ("not begun", ""),
        "waits": ("pending", "Resources"),
        "runs": ("running", ""),
        "done": ("finished", ""),
        "broke": ("failed", "no such store"),
        "gone": ("failed", f"job 5_5 is over, and Slurm has forgotten it: see {tmp_path / 'slurm-5_5.out'}"),
        "memory": ("failed", "out of memory: too little memory"),
        "time": ("failed", "timeout: stopped after step 2: its time is up"),
    }
    found = {one.name: one for one in element_states(made, read_book(tmp_path), lambda _: {})}
    assert (found["broke"].step, found["broke"].steps, found["broke"].loss) == (3, 7, 1 / 3)
    # What an earlier job wrote down is not why the last one failed.
    note(tmp_path, {"broke": replace(entry("8_4"), when="2999-01-01T00:00:00+00:00")})
    assert states(made)["broke"] == ("failed", f"job 8_4 is over, and Slurm has forgotten it: see {tmp_path / 'slurm-8_4.out'}")


def test_who_waits_for_whom_and_who_waits_in_vain(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    note(tmp_path, {"a": entry("5_0"), "b": entry("5_1"), "c": entry("6_2", a="5_0", b="5_1"), "d": entry("7_3", c="6_2")})
    behind = (job("6_2", "PENDING"), job("7_3", "PENDING", "Dependency"))
    found = states(made, job("5_0", "RUNNING"), job("5_1", "PENDING", "Priority"), *behind)
    assert found["c"] == ("waiting", "for a (job 5_0), b (job 5_1)")
    assert found["d"] == ("waiting", "for c (job 6_2)")
    run(tmp_path / "a", {"event": "start"}, {"event": "finished", "step": 7})
    assert states(made, job("5_1", "RUNNING"), *behind)["c"] == ("waiting", "for b (job 5_1)")
    # Slurm has not noticed yet that b's failure leaves the others without hope; and when it has, it ends them.
    for left in (behind, (job("6_2", "CANCELLED"), job("7_3", "CANCELLED")), ()):
        found = states(made, job("5_1", "FAILED"), *left)
        assert found["c"] == ("failed", "b, for which it waited, has failed")
        assert found["d"] == ("failed", "c, for which it waited, has failed")
    # b is queued again alone: c still waits for the job that failed.
    note(tmp_path, {"b": entry("9_1")})
    again = job("9_1", "RUNNING")
    assert states(made, again, job("5_1", "FAILED"), *behind)["c"][0] == "failed"
    assert "job 5_1 of b, for which it waited, has failed" in states(made, again, job("5_1", "FAILED"), *behind)["c"][1]
    # Both are queued again.
    note(tmp_path, {"c": entry("10_2", b="9_1"), "d": entry("11_3", c="10_2")})
    found = states(made, again, job("10_2", "PENDING", "Dependency"), job("11_3", "PENDING", "Dependency"))
    assert (found["c"], found["d"]) == (("waiting", "for b (job 9_1)"), ("waiting", "for c (job 10_2)"))


def test_an_element_waits_for_a_job_that_is_none_of_the_sweeps(tmp_path: Path) -> None:
    made = sweep(tmp_path, [{"name": "a"}])
    note(tmp_path, {"a": replace(entry("5_0"), after={OTHER_JOB: "3"})})
    waits = ("waiting", "for job 3")
    assert states(made, job("5_0", "PENDING", "Dependency")) == {"a": waits}
    assert states(made, job("5_0", "PENDING", "None"), job("3", "RUNNING")) == {"a": waits}
    assert states(made, job("5_0", "PENDING", "Resources"), job("3", "COMPLETED")) == {"a": ("pending", "Resources")}
    found = states(made, job("5_0", "PENDING", "DependencyNeverSatisfied"))
    assert found == {"a": ("failed", "what it waits for has failed: job 3")}


def test_what_was_queued_and_is_no_longer_in_the_file_is_shown_too(tmp_path: Path) -> None:
    note(tmp_path, {"a": entry("5_0"), "old": entry("5_1")})
    made = sweep(tmp_path, [{"name": "a"}])
    queue = {name: job(name, "RUNNING") for name in ("5_0", "5_1")}
    found = element_states(made, read_book(tmp_path), lambda _: queue)
    assert [(one.name, one.index, one.state) for one in found] == [("a", 0, "running"), ("old", None, "running")]


def test_without_slurm_the_run_directories_tell_what_they_know(tmp_path: Path) -> None:
    made = sweep(tmp_path, [{"name": "done"}, {"name": "queued"}, {"name": "new"}])
    run(tmp_path / "done", {"event": "start"}, {"event": "finished", "step": 7})
    note(tmp_path, {"done": entry("5_0"), "queued": entry("5_1")})
    found = {one.name: one for one in element_states(made, read_book(tmp_path), lambda _: None)}
    assert [found[name].state for name in ("done", "queued", "new")] == ["finished", "pending", "not begun"]
    assert "cannot be told without Slurm" in found["queued"].reason
