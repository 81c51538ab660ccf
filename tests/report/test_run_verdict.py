"""The verdict of a run: what its files bear out, and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import BEGAN, evaluation, rows, write_run

from swiftv2.report.run.charts import averaged, smoothed, thinned
from swiftv2.report.run.reading import read_run
from swiftv2.report.run.verdict import Verdict, health, learned, resumes

WHOLE = {"step": 280, "age_seconds": 90.0, "whole": True, "problem": None}


def judged(folder: Path, what: Any, standing: dict[str, Any] | None = None, **files: Any) -> Verdict:
    named = {name.replace("_", "."): content for name, content in files.items()}
    answer: Verdict = what(read_run(write_run(folder / "run", made=named), standing=standing))
    return answer


@pytest.mark.parametrize(
    ("model", "baseline", "half", "subjects", "word"),
    [
        (0.10, -0.1, 0.02, 15, "yes"),
        (0.01, -0.1, 0.02, 15, "not yet"),  # Ahead of the baseline, but R2 may be 0.
        (-0.01, -0.1, 0.02, 15, "not yet"),
        (0.10, 0.09, 0.02, 15, "not yet"),  # The gain may be 0.
        (-0.30, -0.1, 0.02, 15, "no"),
        (0.50, -0.1, 0.02, 1, "cannot be told"),  # No interval.
    ],
)
def test_learned_goes_by_intervals(
    model: float, baseline: float, half: float, subjects: int, word: str, tmp_path: Path
) -> None:
    found = judged(tmp_path, learned, evaluation_json=evaluation(model, baseline, half=half, subjects=subjects))
    assert found.word == word
    assert f"{model:.1%}" in found.says
    assert f"{baseline:.1%}" in found.says


def test_cohorts_that_copying_wins_are_named(tmp_path: Path) -> None:
    tree = evaluation(0.3, -0.1, cohorts=("one", "two"))
    tree["groups"]["two"] = evaluation(-0.3, -0.1)["groups"]["all"]
    assert judged(tmp_path, learned, evaluation_json=tree).notes == ("Beyond copying in 1 of 2 cohorts; not in two.",)


def test_without_an_evaluation_nothing_is_claimed(tmp_path: Path) -> None:
    young = "".join(json.dumps(row) + "\n" for row in rows(30))
    found = judged(tmp_path / "young", learned, evaluation_json=None, metrics_jsonl=young)
    assert (found.mark, found.word) == ("unknown", "cannot be told")
    assert "step 100" in found.says
    found = judged(tmp_path / "lost", learned, evaluation_json=None)
    assert found.mark == "unknown"
    assert "evaluation.json is missing" in found.says, "it was judged: its metrics say so"


def test_leaks_take_the_answer_back(tmp_path: Path) -> None:
    leakage = {"subjects": 12, "families": None, "files": 0, "families_known": 0}
    found = judged(tmp_path, learned, datasheet_json={"leakage": leakage})
    assert (found.mark, found.word) == ("bad", "cannot be believed")
    assert "subjects in two parts: 12 subjects" in found.says


def test_a_damaged_data_sheet_leaves_no_clean_answer(tmp_path: Path) -> None:
    found = judged(tmp_path, learned, datasheet_json='{"leakage": ')
    assert (found.mark, found.word) == ("unknown", "cannot be told")
    assert "Leaks cannot be looked for" in found.notes[-1]


def test_an_undefined_metric_hides_no_leak_and_no_other_result(tmp_path: Path) -> None:
    def target(value: float | None) -> dict[str, Any]:
        low = None if value is None else value - 0.1
        return {
            "kind": "classification",
            "classes": ["0", "1"],
            "test": {"metrics": {"auroc": {"value": value, "low": low, "high": 1.0}}},
        }

    result = {"targets": {"sex": target(0.8), "site": target(None)}}
    found = judged(tmp_path / "clean", learned, result_json=result)
    assert (found.word, found.notes) == ("yes", ("site: auroc on test subjects is not defined.",))
    seen = {**result, "overlap": {"known": True, "counted": 8, "asked": 11, "why": None}}
    assert judged(tmp_path / "seen", learned, result_json=seen).word == "cannot be believed"
    undeclared = {**result, "overlap": {"known": False, "counted": 0, "asked": 11, "why": "no hashes"}}
    assert (
        "Not known: subjects that the weights were trained on."
        in judged(tmp_path / "no", learned, result_json=undeclared).notes
    )


@pytest.mark.parametrize(
    ("low", "word"), [(0.55, "yes"), (0.45, "not shown"), (None, "cannot be told")], ids=["above", "around", "no interval"]
)
def test_a_task_counts_as_learned_where_the_interval_lies_above_chance(low: float | None, word: str, tmp_path: Path) -> None:
    metrics = {"auroc": {"value": 0.7, "low": low, "high": 0.9}, "loss": {"value": 1.0, "low": 0.9, "high": 1.1}}
    target = {"kind": "classification", "classes": ["0", "1"], "test": {"n": 40, "metrics": metrics}}
    made = [{**row, "val/select": 1 / row["step"]} for row in rows(30)]
    lines = "".join(json.dumps(row) + "\n" for row in made)
    found = judged(tmp_path, learned, result_json={"targets": {"age": target}}, metrics_jsonl=lines)
    assert found.word == word
    seen = {"targets": {"age": target}, "overlap": {"known": True, "counted": 3, "asked": 9, "why": None}}
    assert judged(tmp_path / "seen", learned, result_json=seen, metrics_jsonl=lines).word == "cannot be believed"
    assert "age: auroc 0.700 on test subjects, chance 0.5" in found.says


def event(kind: str, step: int, **values: Any) -> str:
    return json.dumps({"step": step, "attempt": 1, "time": BEGAN + step, "event": kind, **values}) + "\n"


def test_a_quiet_run_is_healthy_and_its_trend_is_told(tmp_path: Path) -> None:
    found = judged(tmp_path, health, {"state": "running"})
    assert (found.mark, found.notes) == ("good", ())
    assert "still falls" in found.says or "is level" in found.says


@pytest.mark.parametrize(("last", "words"), [(-0.3, "still falls"), (0.3, "rises"), (0.0, "is level")])
def test_the_trend_is_that_of_the_last_steps_beyond_their_noise(last: float, words: str, tmp_path: Path) -> None:
    made = [{**row, "loss": 1.0 + 0.05 * (-1) ** row["step"] + (last if row["step"] > 240 else 0.0)} for row in rows(300)]
    lines = "".join(json.dumps(row) + "\n" for row in made)
    assert words in judged(tmp_path, health, metrics_jsonl=lines).says


def test_faults_are_counted_and_slow_ranks_named(tmp_path: Path) -> None:
    slow = [{"rank": 3, "host": "n", "what": "data", "share": 0.4}]
    lines = event("skipped", 5, reason="spike") + event("skipped", 6, reason="spike") + event("rewound", 4)
    lines += event("save_failed", 7, problem="full") + event("slow", 50, slow=slow) + event("slow", 100, slow=[])
    found = judged(tmp_path, health, events_jsonl=lines)
    assert found.mark == "look"
    assert "2 refused steps, 1 rewind and 1 failed save" in found.notes[0]
    assert "rank 3 (data)" in found.notes[1]


def test_waiting_for_data_and_clips_left_out_are_told(tmp_path: Path) -> None:
    made = [{**row, "seconds/data": 0.5, "step_seconds": 1.0, "clips_left_out": 2.0} for row in rows(300)]
    found = judged(tmp_path, health, metrics_jsonl="".join(json.dumps(row) + "\n" for row in made))
    assert found.notes == ("2 clips left out.", "It waits for data 50% of the time: see the throughput below.")


def test_outages_are_part_of_the_time(tmp_path: Path) -> None:
    # Of steps that the meter reckons without the outage.
    made = [{**row, "seconds/data": 300.0, "seconds/step": 301.0, "step_seconds": 1.0} for row in rows(300)]
    found = judged(tmp_path, health, metrics_jsonl="".join(json.dumps(row) + "\n" for row in made))
    assert "It waits for data 100% of the time: see the throughput below." in found.notes


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    lines = event("start", 0) + event("failed", 9, error="KeyboardInterrupt") + event("start", 10) + event("resumed", 11)
    assert judged(tmp_path, health, events_jsonl=lines).word == "yes"


def test_damaged_lines_are_counted_and_the_others_told(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows(100)).splitlines()
    lines[50:53] = ["{", "[1]", '{"step": null, "attempt": 1, "time": 1}']
    run = read_run(write_run(tmp_path / "run", made={"metrics.jsonl": "\n".join(lines) + "\n"}))
    assert [row["step"] for row in run.metrics] == [*range(1, 51), *range(54, 101)]
    assert run.damaged == (f"{run.path / 'metrics.jsonl'}: 3 lines left out, which cannot be read, the first of them line 51",)


def test_steps_of_a_killed_attempt_do_not_count_until_they_are_made_again(tmp_path: Path) -> None:
    again = [{**row, "attempt": 2, "time": row["time"] + 1000, "loss": 0.5} for row in rows(260) if row["step"] > 200]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows(300), *again])
    resumed = json.dumps({"step": 200, "attempt": 2, "time": BEGAN + 1100, "event": "resumed"}) + "\n"
    files = {"metrics.jsonl": lines, "events.jsonl": event("start", 0) + resumed}
    run = read_run(write_run(tmp_path / "run", made=files))
    assert (run.last("step"), run.last("loss")) == (260, 0.5)
    assert len(run.metrics) == 260


def test_a_run_that_was_to_go_on_has_not_finished(tmp_path: Path) -> None:
    lines = event("start", 0) + event("finished", 300) + event("start", 301)
    found = judged(tmp_path, resumes, {"state": "dead", "checkpoint": WHOLE}, events_jsonl=lines)
    assert "20 steps would be done again" in found.says
    assert judged(tmp_path / "unasked", resumes, events_jsonl=lines).word == "not yet"


def test_a_dead_run_is_not_healthy(tmp_path: Path) -> None:
    found = judged(tmp_path, health, {"state": "failed", "why": "the disk is full"})
    assert found.mark == "bad"
    assert "the disk is full." in found.says


def test_a_last_loss_that_is_no_number_is_bad(tmp_path: Path) -> None:
    made = [{**row, "loss": None if row["step"] > 290 else row["loss"]} for row in rows(300)]
    found = judged(tmp_path, health, metrics_jsonl="".join(json.dumps(row) + "\n" for row in made))
    assert found.mark == "bad"
    assert found.notes == ("10 steps without a finite loss, the last at step 300.",)


def test_resuming_tells_what_would_be_lost(tmp_path: Path) -> None:
    found = judged(
        tmp_path, resumes, {"state": "running", "checkpoint": WHOLE}, events_jsonl=event("start", 0) * 3 + event("resumed", 9)
    )
    assert found.mark == "good"
    assert "step 280, 1 min 30 s old; 20 steps would be done again" in found.says
    assert found.notes == ("It has gone on 1 time after a stop or a kill (3 attempts).",)


def test_a_damaged_or_missing_checkpoint_is_told(tmp_path: Path) -> None:
    damaged = {**WHOLE, "whole": False, "problem": "state is short"}
    found = judged(tmp_path / "a", resumes, {"checkpoint": damaged})
    assert (found.mark, found.word) == ("bad", "no")
    assert "a start would begin at step 0" in found.says
    older = tmp_path / "c" / "run" / "checkpoints" / "step_200"
    run = write_run(tmp_path / "c" / "run")
    older.mkdir(parents=True)
    (older / "manifest.json").write_text("{}")
    found = resumes(read_run(run, standing={"checkpoint": damaged}))
    assert found.word == "from an older one"
    assert "step 200" in found.says
    found = judged(tmp_path / "b", resumes, {"checkpoint": None}, resume_sh=None)
    assert (found.mark, found.word) == ("look", "not yet")
    assert "no resume.sh" in found.notes[0]


def test_long_curves_keep_their_ends_and_peaks_and_short_ones_all() -> None:
    x, y = list(range(1, 20_001)), [1.0] * 20_000
    y[7_777], y[123] = 9.0, -9.0
    kept_x, kept_y, less = thinned((x, y), 1000)
    assert less
    assert len(kept_x) <= 1000
    assert (kept_x[0], kept_x[-1]) == (1, 20_000)
    assert dict(zip(kept_x, kept_y, strict=True)).items() >= {7_778: 9.0, 124: -9.0}.items()
    assert thinned((x[:10], y[:10]), 1000) == (x[:10], y[:10], False)


def test_means_over_stretches_and_windows_keep_the_mean() -> None:
    x, y = list(range(1, 1001)), [float(one % 10) for one in range(1000)]
    places, means, each = averaged((x, y), 100)
    assert (len(places), each, places[-1]) == (100, 10, 1000)
    assert means == pytest.approx([4.5] * 100)
    assert smoothed([1.0, 1.0, 4.0, 1.0, 1.0], 3) == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.0])
