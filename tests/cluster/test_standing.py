"""How runs stand: real runs of a toy that finish, stop, fail, hang and are killed; Slurm's word is given as it writes it."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from crew import complete, events, job, options

from swiftv2.cluster.alarms import Alarm
from swiftv2.cluster.book import Entry, note
from swiftv2.cluster.slurm import Job
from swiftv2.cluster.standing import Standing, seconds, stand
from swiftv2.cluster.traces import find_runs, read_traces
from swiftv2.errors import UsageError
from swiftv2.records import STALE_SECONDS, append_line, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

STEPS = 12
JOB = {"SLURM_JOB_ID": "117"}
EVALUATE = {"parts": 1, "seconds": 0.0}


def slurm_job(state: str, **values: Any) -> Job:
    """What squeue says of job 117."""
    usual = {"reason": "None", "nodes": "nid[1-2]", "time_left": "1-02:03:04", "start": "2026-01-02T03:04:05", "node_count": 2}
    return Job(**{"name": "117", "number": "117", "state": state, "title": "pretrain_806M", **usual, **values})


def look(run: Path, one: Job | None = None, *, after: float = 0.0, silent: str | None = None) -> Standing:
    """How a run stands so many seconds from now."""
    return stand(read_traces(run), one, time.time() + after, silent)


def kinds(standing: Standing) -> list[str]:
    return [one.kind for one in standing.alarms]


def alarm(standing: Standing, kind: str) -> Alarm:
    return next(one for one in standing.alarms if one.kind == kind)


def asked(steps: int = STEPS, **rest: Any) -> dict[str, Any]:
    train = {"save_every": 4, "evaluate_every": 3} | rest.pop("train", {})
    return options(steps=steps, evaluate=EVALUATE, train=train, **rest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    complete(run, asked(), 1, variables=JOB)
    return run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in step 7 or so, with a checkpoint of step 4 at least."""
    run = tmp_path_factory.mktemp("killed") / "run"
    with job(run, asked(1000, seconds=0.05), 1, variables=JOB) as one:
        one.until_step(7)
        one.send(signal.SIGKILL)
        one.wait()
    return run


def test_a_finished_run(finished: Path) -> None:
    standing, rows = look(finished), read_metrics(finished / "metrics.jsonl")
    assert (standing.state, standing.step, standing.max_steps, standing.over) == ("finished", STEPS, STEPS, True)
    assert (standing.loss, standing.seconds_left) == (rows[-1]["loss"], 0.0)
    assert standing.clips_per_second == rows[-1]["clips_per_second"]
    heldout = {row["step"]: row["heldout/loss"] for row in rows if "heldout/loss" in row}
    assert list(heldout) == [3, 6, 9, 12]
    assert (standing.heldout_best, standing.heldout_best_step) == min((value, step) for step, value in heldout.items())
    assert standing.heldout_loss == heldout[STEPS]
    assert (standing.attempts, standing.requeues, standing.world_size, standing.holder) == (1, 0, 1, None)
    assert standing.checkpoint is not None
    assert (standing.checkpoint.step, standing.checkpoint.kind, standing.checkpoint.steps_since) == (STEPS, "permanent", 0)
    assert standing.checkpoint.whole
    assert 0 <= standing.checkpoint.age_seconds < 200
    assert standing.job is not None
    assert (standing.job.number, standing.job.state) == ("117", None)
    assert standing.alarms == []
    assert json.loads(json.dumps(standing.to_dict()))["checkpoint"]["step"] == STEPS


def test_a_run_that_goes_on_and_is_stopped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, asked(1000, seconds=0.05), 1, variables=JOB) as one:
        one.until_step(5)
        going = look(run, slurm_job("RUNNING"))
        assert (going.state, going.over, going.alarms) == ("running", False, [])
        assert going.step is not None
        assert 5 <= going.step <= 1000
        assert going.heartbeat_seconds is not None
        assert going.heartbeat_seconds < 60
        assert f"process {one.ranks[0].pid} on " in (going.holder or "")
        assert going.job is not None
        assert (going.job.nodes, going.job.node_count, going.job.seconds_left) == ("nid[1-2]", 2, 93784.0)
        assert look(run).state == "running", "without Slurm too"
        one.send(signal.SIGUSR1)
        assert one.wait() == [75]
    stopped = look(run)
    assert (stopped.state, stopped.why, stopped.over) == ("stopped", "SIGUSR1", True)
    assert stopped.step == events(run, "stopped")[0]["step"]
    assert not look(run, slurm_job("COMPLETING")).over, "its job may queue itself again"
    append_line(run / "events.jsonl", event(time.time(), "requeued", reason="time limit", excluded=["nid3"]))
    requeued = look(run, silent="squeue has not answered for 30 s")
    assert (requeued.state, requeued.requeues, requeued.over) == ("requeued", 1, False)
    assert kinds(requeued) == ["slurm", "requeued"]
    assert alarm(requeued, "requeued").text == "queued again without nid3"
    waits = look(run, slurm_job("PENDING", reason="BeginTime", nodes="", start="2030-01-02T03:04:05"))
    assert (waits.state, waits.why) == ("pending", "BeginTime, expected to start 2030-01-02 03:04:05")
    assert waits.job is not None
    assert waits.job.nodes is None
    cancelled = look(run, slurm_job("CANCELLED"))
    assert (cancelled.state, cancelled.over) == ("stopped", True)
    assert "117 no more" in (cancelled.why or "")
    started = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 5))
    assert look(run, slurm_job("RUNNING", start=started)).state == "running", "begun anew since"


def event(when: float, name: str, attempt: int = 1, step: int | None = None, **values: Any) -> dict[str, Any]:
    return {"step": step, "attempt": attempt, "time": when, "event": name, **values}


def test_a_killed_run(killed: Path) -> None:
    dead = look(killed)
    assert (dead.state, dead.over) == ("dead", True), "told at once, since its process was here"
    assert "give the same command again" in (dead.why or "")
    assert dead.checkpoint is not None
    assert dead.step is not None
    assert dead.checkpoint.steps_since == dead.step - dead.checkpoint.step >= 0
    assert look(killed, slurm_job("PENDING", reason="Priority")).why == "Priority, expected to start 2026-01-02 03:04:05"
    assert look(killed, slurm_job("CANCELLED")).state == "dead"
    held = look(killed, slurm_job("RUNNING"), after=STALE_SECONDS + 60)
    assert held.state == "running", "what Slurm says counts"
    assert "Slurm says RUNNING" in alarm(held, "heartbeat").text
    assert (alarm(held, "heartbeat").age_seconds or 0) > STALE_SECONDS


def test_a_lease_of_another_host_counts_while_its_heart_beats(killed: Path, tmp_path: Path) -> None:
    run = copied(killed, tmp_path)
    values = json.loads((run / "lease.json").read_text())
    (run / "lease.json").write_text(json.dumps(values | {"host": "nid000123", "job": None}))
    assert look(run).state == "running"
    assert look(run, after=STALE_SECONDS + 1).state == "dead"
    append_line(run / "events.jsonl", event(time.time(), "hang", cause="rank 1 has not got on", suspects=[1], behind=[]))
    assert look(run).state == "stopped", "the hang was written down by the process that ended by it"
    assert look(run).why == "rank 1 has not got on"
    assert look(run, after=STALE_SECONDS + 1).state == "stopped"
    (run / "lease.json").write_text(json.dumps(values | {"started": "another-boot/1"}))
    assert look(run, after=STALE_SECONDS + 1).state == "stopped", "before this host was booted"
    (run / "lease.json").write_text("{")
    assert "lease.json" in alarm(look(run), "damaged").text


def copied(run: Path, folder: Path) -> Path:
    """A copy that may be changed."""
    new = folder / "copy"
    for path in run.rglob("*"):
        to = new / path.relative_to(run)
        if path.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    return new


def test_numbers_that_go_wrong_end_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    poison = dict.fromkeys([*range(40, 200), *range(100_000, 100_200)], float("nan"))
    complete(run, options(steps=16, poison=poison, train={"save_every": 4}, faults={"most_rewinds": 1}), 1, status=1)
    failed = look(run)
    assert (failed.state, failed.over) == ("failed", True)
    assert "went back 1 times" in (failed.why or "")
    assert kinds(failed)[:4] == ["loss", "left_out", "failed", "skipped"], "what holds now, then the newest"
    assert alarm(failed, "failed").text == failed.why
    assert kinds(failed).count("skipped") == len(events(run, "skipped"))
    refused = alarm(failed, "skipped")
    assert (refused.step, refused.attempt, refused.present) == (events(run, "skipped")[-1]["step"], 1, False)
    rewound = alarm(failed, "rewound")
    assert rewound.text.startswith("went back to step 4: steps 6 to 8 were refused, 24 samples are left out")
    assert failed.loss is None
    assert "24 clips are left out" in alarm(failed, "left_out").text


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, options(steps=500, seconds=0.05, faults={"hang_seconds": 3.0})) as one:
        one.until_step(5)
        one.send(signal.SIGSTOP, 1)
        one.until(lambda: one.ranks[0].poll() == 75, "the end of rank 0", 60, meanwhile=False)
        hung = look(run)
    assert (hung.state, hung.over) == ("stopped", True)
    (told,) = [text for text in (one.text for one in hung.alarms if one.kind in {"hang", "lost"}) if text]
    assert f"most likely at fault: rank 1 on {os.uname().nodename}" in told


def test_a_damaged_checkpoint_is_seen_before_and_after_it_is_passed_over(killed: Path, tmp_path: Path) -> None:
    run = copied(killed, tmp_path)
    newest = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    shard = next((newest / "state").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    before = look(run)
    assert before.checkpoint is not None
    assert (before.checkpoint.step, before.checkpoint.whole) == (int(newest.name[5:]), False)
    assert shard.name in (before.checkpoint.problem or "")
    assert shard.name in alarm(before, "checkpoint").text
    assert before.heldout_best is not None, "of the checkpoint before, or of the metrics"
    complete(run, asked(STEPS), 1)
    after = look(run)
    assert (after.state, after.attempts) == ("finished", 2)
    assert kinds(after) == ["checkpoint_damaged"]
    assert after.checkpoint is not None
    assert after.checkpoint.whole
    manifest = run / "checkpoints" / f"step_{STEPS}" / "manifest.json"
    manifest.write_text("{")
    assert "manifest.json is damaged" in alarm(look(run), "checkpoint").text
    manifest.unlink()
    assert "manifest.json is missing" in alarm(look(run), "checkpoint").text


def test_a_step_that_does_not_come(killed: Path) -> None:
    """As long as the lease is held, on whichever host."""
    traces = read_traces(killed)
    now = time.time()
    held = dataclasses.replace(traces, alive=True, heartbeat=now + 600)
    assert "standstill" not in kinds(stand(held, None, traces.rows[-1]["time"] + 30))
    late = stand(held, None, now + 600)
    assert kinds(late) == ["standstill"]
    assert f"since step {late.step}" in late.alarms[0].text
    evaluates = {**traces.settings, "train": {**traces.settings["train"], "evaluate_every": (late.step or 0) + 1}}
    slow = dataclasses.replace(held, settings=evaluates)
    assert "standstill" not in kinds(stand(slow, None, now + 600)), "an evaluation may take long"
    start = event(now, "start", attempt=2)
    again = dataclasses.replace(held, events=[*traces.events, start])
    assert "standstill" not in kinds(stand(again, None, now + 600)), "so may the first step"
    assert "no step since the start of attempt 2" in alarm(stand(again, None, now + 3600), "standstill").text


def test_a_disk_that_is_nearly_full(killed: Path, finished: Path) -> None:
    traces = read_traces(killed)
    assert traces.largest > 0
    full = dataclasses.replace(traces, free=traces.largest)
    assert "make room" in alarm(stand(full, None, time.time()), "disk").text
    over = dataclasses.replace(read_traces(finished), free=0)
    assert stand(over, None, time.time()).alarms == []


def test_events_that_no_test_can_make_quickly(killed: Path, tmp_path: Path) -> None:
    run, now = copied(killed, tmp_path), time.time()
    path = run / "events.jsonl"
    slow = {"rank": 3, "host": "nid7", "what": "data", "share": 0.62}
    for row in (
        event(now - 50, "save_failed", step=8, folder="step_8", kind="ephemeral", problem="No space left on device"),
        event(now - 40, "slow", step=50, slow=[slow]),
        event(now - 30, "not_removed", folder="step_2", problem="Permission denied"),
        event(
            now - 20, "quarantined", step=9, clip=4, position=12, run="r0123456789abcdef", first=0, last=7, reason="constant"
        ),
        event(now - 15, "lost", rank=1, host="nid9", phase="compute"),
        event(now - 10, "failed", error="InterruptedRunError", problem="rank 1 on nid9 is gone"),
    ):
        append_line(path, row)
    with path.open("a") as file:
        file.write('{"step": null, "atte')
    told = look(run)
    assert (told.state, told.why) == ("stopped", "rank 1 on nid9 is gone"), "status 75: the same command goes on"
    texts = [one.text for one in told.alarms]
    assert texts == [
        "rank 1 on nid9 is gone",
        "rank 1 on nid9 is gone since compute of step None",
        "a clip of run r0123456789abcdef is left out: constant",
        "step_2 could not be deleted: Permission denied",
        "slow: rank 3 on nid7 (data, +62%)",
        "the checkpoint of step 8 could not be saved: No space left on device",
    ]
    ages = [one.age_seconds or 0.0 for one in told.alarms]
    assert ages == sorted(ages)
    for attempt in (2, 3, 4):
        append_line(path, event(now, "start", attempt))
    assert "damaged" in kinds(look(run)), "the torn line is no longer the last"
    assert "slow" not in kinds(look(run)), "of former attempts no more is said"


def test_a_job_that_has_not_come_to_training(killed: Path, tmp_path: Path) -> None:
    run = copied(killed, tmp_path)
    append_line(run / "events.jsonl", event(time.time() + 1, "job", job="118", restart=0))
    another = dataclasses.replace(slurm_job("RUNNING"), name="118", number="118")
    starting = look(run, another)
    assert (starting.state, starting.why) == ("running", "its job runs; training has not begun")
    assert starting.job is not None
    assert starting.job.number == "118"
    assert look(run, silent="no Slurm").state == "running"
    ended = look(run, dataclasses.replace(another, state="FAILED"))
    assert (ended.state, ended.over) == ("failed", True)
    assert "118 ended before training began" in (ended.why or "")


def test_what_has_not_begun(tmp_path: Path) -> None:
    for name in ("checkpoints", "logs", "figures"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert find_runs([tmp_path]) == [tmp_path / "run"]
    standing = look(tmp_path / "run")
    assert (standing.state, standing.step, standing.checkpoint, standing.over) == ("not begun", None, None, False)
    assert standing.alarms == []


def test_elements_of_a_sweep_that_wait_have_no_folder_yet(finished: Path, tmp_path: Path) -> None:
    copied(finished, tmp_path).rename(tmp_path / "lr_9")
    entry: dict[str, Any] = {"index": 1, "words": (), "when": "2026-01-01T00:00:00+00:00", "sweep": "sweep.yaml", "after": {}}
    note(tmp_path, {name: Entry(job=number, **entry) for name, number in {"lr_10": "200_1", "lr_9": "200_0"}.items()})
    done, waiting = found = find_runs([tmp_path])
    assert [path.name for path in found] == ["lr_9", "lr_10"]
    assert find_runs([waiting, tmp_path, done]) == [waiting, done]
    never = Job("200_1", "202", "PENDING", "DependencyNeverSatisfied", "", "30:00", "N/A", 1, "sweep")
    standing = look(waiting, never)
    assert (standing.state, standing.why) == ("pending", "DependencyNeverSatisfied")
    assert standing.job is not None
    assert (standing.job.number, standing.job.seconds_left) == ("200_1", 1800.0)
    assert "will not start by itself" in alarm(standing, "job").text
    assert look(waiting).state == "not begun"
    assert read_traces(done).job == "117", "the job that it ran in is later than its entry"
    with pytest.raises(UsageError, match="does not exist"):
        find_runs([tmp_path / "lr_11"])


def test_paths_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file", tmp_path / "gone"):
        with pytest.raises(UsageError, match=str(path)):
            find_runs([path])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1-02:03:04", 93784), ("2:03:04", 7384), ("3:04", 184), ("0:00", 0), ("UNLIMITED", None), ("INVALID", None), ("", None)],
)
def test_times_as_slurm_writes_them(text: str, value: float | None) -> None:
    assert seconds(text) == value


def test_the_best_evaluation_is_found_behind_many_lines(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    rows = read_metrics(run / "metrics.jsonl")
    best = look(run).heldout_best
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(STEPS + 1, 6000):
            file.write(json.dumps(rows[0] | {"step": step, "mfu": 0.41, "time": time.time()}) + "\n")
    far = look(run)
    assert (far.step, far.heldout_best, far.heldout_loss, far.mfu) == (5999, best, rows[-1]["heldout/loss"], 0.41)
    append_line(run / "metrics.jsonl", {**rows[0], "step": 6000, "heldout/loss": 1e-9})
    assert (look(run).heldout_best, look(run).heldout_best_step) == (1e-9, 6000), "not saved yet"


def test_the_environment_of_these_tests_is_no_job() -> None:
    assert "SLURM_JOB_ID" not in environment()
