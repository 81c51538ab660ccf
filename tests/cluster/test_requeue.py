"""Whether a job is started again: by the run it leaves, one rule at a time."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from swiftv2.cluster.requeue import IDLE_STARTS, Attempt, begin, judge_checkup, judge_run, judge_store, run_mark, store_mark
from swiftv2.data.store import layout
from swiftv2.errors import SwiftError
from swiftv2.records import EVENTS, LEASE, Holder, append_line, read_lines

FIRST = Attempt("117", 0, "nid[000001-000002]")
MOST = 3


def leave(run: Path, event: str, attempt: int = 1, **values: Any) -> None:
    append_line(run / EVENTS, {"step": None, "attempt": attempt, "time": time.time(), "event": event, **values})


def save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    append_line(run / EVENTS, {"step": step, "attempt": 1, "time": time.time(), "event": "saved", "kind": "ephemeral"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose job has begun, and that has saved steps 0 and 10."""
    begin(tmp_path / "run", FIRST, MOST)
    leave(tmp_path / "run", "start")
    save(tmp_path / "run", 0)
    save(tmp_path / "run", 10)
    return tmp_path / "run"


@pytest.mark.parametrize("status", [75, 137, 143, 0])
def test_a_run_that_was_stopped_and_came_further_is_started_again(run: Path, status: int) -> None:
    """0 is what srun says, too, where it has lost a node: without an end of the run it is none."""
    leave(run, "stopped")
    verdict = judge_run(run, FIRST, status, 0, MOST)
    assert verdict.again
    assert (verdict.status, verdict.exclude) == (75, ())
    *_, last = read_lines(run / EVENTS)
    assert (last["event"], last["job"], last["restart"]) == ("requeued", "117", 0)


@pytest.mark.parametrize(
    ("status", "mark", "said"),
    [
        (75, 10, "no checkpoint was made since"),
        (137, 10, "no checkpoint was made since"),
        (1, 0, "a person must look"),
        (2, 0, "a person must look"),
    ],
)
def test_others_are_not(run: Path, status: int, mark: int, said: str) -> None:
    before = read_lines(run / EVENTS)
    verdict = judge_run(run, FIRST, status, mark, MOST)
    assert not verdict.again
    assert verdict.status in {1, 2}
    assert said in verdict.reason
    assert read_lines(run / EVENTS) == before


def test_a_run_that_went_back_comes_further_from_there(run: Path) -> None:
    save(run, 100)
    begin(run, Attempt("117", 1, ""), MOST)
    save(run, 60)
    assert judge_run(run, Attempt("117", 1, ""), 75, 100, MOST).again


def test_a_finished_run_is_done(run: Path) -> None:
    leave(run, "finished")
    leave(run, "figure")
    assert judge_run(run, FIRST, 0, 0, MOST).status == 0


def test_restarts_are_counted(run: Path) -> None:
    leave(run, "stopped")
    assert judge_run(run, Attempt("117", MOST - 1, ""), 75, 0, MOST).again
    assert "as often as is allowed" in judge_run(run, Attempt("117", MOST, ""), 75, 0, MOST).reason
    with pytest.raises(SwiftError, match="requeued 4 times, more than 3"):
        begin(run, Attempt("117", MOST + 1, ""), MOST)


def test_an_error_that_the_run_wrote_down_is_for_a_person_even_where_a_rank_was_killed(run: Path) -> None:
    leave(run, "failed", error="SwiftError", problem="the store was changed")
    verdict = judge_run(run, FIRST, 137, 0, MOST)
    assert (verdict.again, "the store was changed" in verdict.reason) == (False, True)


def test_a_failed_rank_is_heard_beside_those_that_lost_it(run: Path) -> None:
    """srun gives the highest of all statuses: 75 of the others covers its 1."""
    leave(run, "failed", error="SwiftError", problem="the store was changed")
    leave(run, "lost", rank=0)
    assert not judge_run(run, FIRST, 75, 0, MOST).again


def test_a_rank_that_is_gone_is_no_error_of_the_run(run: Path) -> None:
    leave(run, "failed", error="InterruptedRunError", problem="rank 1 is gone")
    assert judge_run(run, FIRST, 137, 0, MOST).again


def test_the_script_of_a_lost_node_asks_for_nothing(run: Path) -> None:
    leave(run, "stopped")
    later = Holder("nid000003", 1, "", "117", 1, 2, "token", "now")
    (run / LEASE).write_text(json.dumps(later.__dict__))
    verdict = judge_run(run, FIRST, 75, 0, MOST)
    assert (verdict.again, "has taken the run over" in verdict.reason) == (False, True)


def test_a_second_job_is_refused_and_leaves_no_trace(run: Path) -> None:
    living = Holder("elsewhere", 1, "", "117", 0, 1, "token", "now")
    (run / LEASE).write_text(json.dumps(living.__dict__))
    before = (run / EVENTS).read_bytes()
    with pytest.raises(SwiftError, match="is being written by process 1 on elsewhere, Slurm job 117"):
        begin(run, Attempt("118", 0, ""), MOST)
    assert (run / EVENTS).read_bytes() == before
    assert begin(run, Attempt("117", 1, ""), MOST) == 10, "its own next start takes over"


def test_a_torn_line_of_a_node_that_went_down_spoils_nothing(run: Path) -> None:
    with (run / EVENTS).open("a") as file:
        file.write('{"step": nul')
    begin(run, Attempt("117", 1, ""), MOST)
    assert [row["event"] for row in read_lines(run / EVENTS)] == ["job", "start", "saved", "saved", "job"]


def test_starts_without_a_newer_checkpoint_are_ended_after_some(run: Path) -> None:
    """Node failures and operators requeue without asking; each start here is one of theirs."""
    for restart in range(1, IDLE_STARTS + 1):
        assert begin(run, Attempt("117", restart, ""), 30) == 10
    with pytest.raises(SwiftError, match="in a row without a checkpoint after step 10"):
        begin(run, Attempt("117", IDLE_STARTS + 1, ""), 30)
    assert begin(run, Attempt("118", 0, ""), 30) == 10, "another job may try"
    save(run, 20)
    assert begin(run, Attempt("117", IDLE_STARTS + 2, ""), 30) == 20


def test_sick_hosts_are_left_out(run: Path, tmp_path: Path) -> None:
    report = tmp_path / "doctor.json"
    checks = [{"name": "store", "verdict": "sick", "what": "rank 2 on nid000001: no store"}]
    report.write_text(json.dumps({"checks": checks, "sick_hosts": ["nid000001"]}))
    verdict = judge_checkup(run, FIRST, 1, report, MOST)
    assert (verdict.again, verdict.exclude) == (True, ("nid000001",))
    assert read_lines(run / EVENTS)[-1]["excluded"] == ["nid000001"]
    assert not judge_checkup(run, Attempt("117", MOST, ""), 1, report, MOST).again
    report.write_text(json.dumps({"checks": checks, "sick_hosts": []}))
    verdict = judge_checkup(run, FIRST, 1, report, MOST)
    assert (verdict.status, "store: rank 2" in verdict.reason) == (1, True)
    report.write_text("")
    for again in (True, True, False):
        verdict = judge_checkup(run, FIRST, 137, report, MOST)
        assert "without a report" in verdict.reason
        assert verdict.again == again


def test_a_build_goes_on_where_runs_were_added(tmp_path: Path) -> None:
    staged = tmp_path / "cohort.zarr" / layout.STAGING / "rows"
    staged.mkdir(parents=True)
    (staged / "0.json").touch()
    store = tmp_path / "cohort.zarr"
    assert (store_mark(store), store_mark(tmp_path / "new.zarr")) == (1, 0)
    assert judge_store(store, FIRST, 75, 0, MOST).again
    assert "no run was finished since" in judge_store(store, FIRST, 75, 1, MOST).reason
    assert judge_store(store, FIRST, 0, 0, MOST).again, "what srun says where it has lost a node"
    assert judge_store(tmp_path / "done.zarr", FIRST, 0, 0, MOST).status == 0
    assert judge_store(store, FIRST, 1, 0, MOST).status == 1


def test_a_run_without_checkpoints_stands_at_its_beginning(tmp_path: Path) -> None:
    assert run_mark(tmp_path) == 0
