"""The interval between saves: the least time is lost with it, and it is told from what a run has measured."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swiftv2 import cli
from swiftv2.config.engine import TrainConfig
from swiftv2.config.load import dump, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine.interval import Costs, Failures, llama3, optimal_interval, suggest, useful_share
from swiftv2.errors import SwiftError

DEMO = Path(__file__).parents[2] / "configs" / "pretrain" / "demo.yaml"
DAY = 86400.0
Rows = list[dict[str, Any]]


@given(
    blocking=st.floats(1e-3, 600.0),
    failures=st.floats(60.0, 1e8),
    behind=st.floats(0.0, 300.0),
    factor=st.floats(0.02, 50.0).filter(lambda f: abs(f - 1) > 0.05),
)
def test_no_other_interval_loses_less(blocking: float, failures: float, behind: float, factor: float) -> None:
    best = optimal_interval(blocking, failures)
    other = best * factor
    assume(other > blocking)
    mine, theirs = (useful_share(interval, blocking, behind, failures) for interval in (best, other))
    assert 0.0 <= mine <= 1.0
    # Daly's form is the optimum to the fourth order in sqrt(blocking / failures): beyond that it is off by little.
    assert mine >= theirs * (1.0 - (0.0 if blocking < 0.1 * failures else 2e-2))


@given(blocking=st.floats(1e-3, 60.0), failures=st.floats(3600.0, 1e8))
def test_it_is_youngs_where_saves_are_short(blocking: float, failures: float) -> None:
    young = math.sqrt(2 * blocking * failures)
    assert optimal_interval(blocking, failures) == pytest.approx(young, rel=0.4 * math.sqrt(blocking / failures) + 1e-9)


def test_the_expected_share_is_what_a_simulation_loses() -> None:
    """Poisson failures against saves that count late: the formula is within a few percent of playing it through."""
    blocking, late, restart, failures, interval = 2.0, 20.0, 60.0, 7200.0, 240.0
    generator, clock, done = np.random.default_rng(0), 0.0, 0.0
    for gap in generator.exponential(failures, 20_000):
        begun = max(gap - restart, 0.0)  # time in which steps are done in this life
        counted = math.floor(max(begun - late, 0.0) / interval)
        done += counted * (interval - blocking)
        clock += gap
    costs = Costs(blocking, late, restart, blocking, interval, 1.0)
    assert costs.expect(interval, failures).share == pytest.approx(1 - done / clock, rel=0.03)


def _saved(attempt: int, kind: str, seconds: float, blocking: float) -> dict[str, Any]:
    timing = {"seconds": seconds, "blocking_seconds": blocking, "bytes": 12_000_000}
    return {"step": 1, "attempt": attempt, "time": 0.0, "event": "saved", "kind": kind, **timing}


def _lines(blocking: float = 0.5, seconds: float = 10.0, permanent: float = 0.5, ranks: int = 256) -> tuple[Rows, Rows]:
    """Two attempts with steps of 2 s; each began its first step after 30 s."""
    events: Rows = []
    metrics: Rows = []
    for attempt, before in ((1, 0), (2, 40)):
        at = 1000.0 * attempt
        events.append({"step": None, "attempt": attempt, "time": at, "event": "start", "world_size": ranks})
        if before:
            events.append({"step": before, "attempt": attempt, "time": at + 5, "event": "resumed"})
        metrics += [
            {"step": s, "attempt": attempt, "time": at + 30 + 2 * (s - before), "step_seconds": 2.0}
            for s in range(before + 1, before + 41)
        ]
        events += [_saved(attempt, "ephemeral", seconds, blocking) for _ in range(5)]
        events.append(_saved(attempt, "permanent", 3 * seconds, permanent))
    return events, metrics


def _train(**settings: Any) -> TrainConfig:
    return TrainConfig(max_steps=10_000, global_batch=8, **{"save_every": 100_000, **settings})


def test_it_is_measured_on_the_lines_of_a_run() -> None:
    made = suggest(*_lines(), _train())
    assert made.failures == llama3(256)
    assert made.failures.seconds == pytest.approx(54 * DAY * 64 / 419)
    assert "Llama 3" in made.failures.source
    assert made.saves == {"ephemeral": 10, "permanent": 2}
    assert (made.costs.blocking, made.costs.seconds, made.costs.step) == (0.5, 10.0, 2.0)
    assert made.costs.restart == pytest.approx(30.0)
    assert made.optimum == pytest.approx(math.sqrt(2 * 0.5 * made.failures.seconds), rel=1e-3)
    assert made.configured.interval == 120.0
    assert made.configured.lost_most == pytest.approx(120 + 10 + 30)
    assert made.configured.blocking == pytest.approx(0.5 / 120, rel=1e-3)
    assert made.configured.keeps_blocking
    assert made.configured.keeps_lost


def test_five_minutes_a_failure_come_before_the_last_of_efficiency() -> None:
    made = suggest(*_lines(), _train())
    assert made.optimum > 800, "alone it would lose a quarter of an hour at each failure"
    assert made.suggested.keeps_lost
    assert made.suggested.keeps_blocking
    assert 60 * made.save_minutes == pytest.approx(260, abs=10)
    often = suggest(*_lines(), _train(), Failures(4 * 3600.0, "told"))
    assert 60 * often.save_minutes == pytest.approx(often.optimum, rel=0.05), "within both rules it is the optimum"
    assert often.suggested.share <= often.configured.share


def test_saves_that_block_for_long_are_told() -> None:
    made = suggest(*_lines(blocking=8.0, seconds=30.0), _train())
    assert any("no interval keeps both" in note for note in made.notes)
    assert made.suggested.keeps_blocking
    assert not made.suggested.keeps_lost
    costly = suggest(*_lines(permanent=40.0), _train(save_every=100))
    assert any("permanent saves alone" in note for note in costly.notes)
    assert costly.configured.blocking == pytest.approx(0.5 / 120 + 39.5 / 200)


def test_an_interval_shorter_than_a_save_is_told() -> None:
    made = suggest(*_lines(seconds=45.0), _train(save_minutes=0.5))
    assert any("shorter than a save takes (45.0 s)" in note for note in made.notes)
    assert made.configured.interval == 45.0
    never = suggest(*_lines(), _train(save_minutes=0.0, save_every=300))
    assert any("only every 300 steps" in note for note in never.notes)
    assert never.configured.interval == 600.0
    assert not never.configured.keeps_lost


@given(
    blocking=st.floats(1e-3, 20.0),
    seconds=st.floats(0.0, 400.0),
    hours=st.floats(0.01, 1e4),
    save_minutes=st.floats(0.0, 1000.0),
    save_every=st.integers(1, 10**6),
)
def test_whatever_was_measured_something_is_suggested(
    blocking: float, seconds: float, hours: float, save_minutes: float, save_every: int
) -> None:
    settings = _train(save_minutes=save_minutes, save_every=save_every)
    made = suggest(*_lines(blocking, seconds + blocking, blocking), settings, Failures(3600 * hours, "told"))
    assert made.save_minutes > 0
    assert not made.notes or all("\n" not in note for note in made.notes)
    for one in (made.configured, made.suggested):
        assert one.blocking >= 0.0
        assert 0.0 <= one.failures <= 1.0
    if not any("no interval" in note or "alone" in note for note in made.notes) and made.suggested.interval < 2 * save_every:
        assert made.suggested.lost_most <= 1.001 * 300 + 0.1 * made.suggested.interval


def test_nothing_measured_is_one_line() -> None:
    events, metrics = _lines()
    with pytest.raises(SwiftError, match="nothing measured yet: a save"):
        suggest([row for row in events if row["event"] != "saved"], metrics, _train())
    with pytest.raises(SwiftError, match="nothing measured yet: a step"):
        suggest(events, [], _train())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(load(PretrainConfig, DEMO, [f"run.dir={run}", "train.save_every=100000"])))
    for name, rows in zip(("events", "metrics"), _lines(), strict=True):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_command_says_what_to_give(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "suggest", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "train.save_minutes=4.3  (now 2)" in text
    assert "Llama 3" in text
    assert cli.main(["checkpoint", "suggest", str(run_dir), "--json", "--mtbf-hours", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["mtbf_seconds"], told["mtbf_source"]) == (4 * 3600.0, "--mtbf-hours")
    assert told["suggested"]["save_minutes"] == pytest.approx(told["optimum_seconds"] / 60, rel=0.05)
    assert cli.main(["checkpoint", "suggest", str(run_dir), "--json", "--nodes", "64", "--node-mtbf-days", "320"]) == 0
    assert json.loads(capsys.readouterr().out)["mtbf_seconds"] == 5 * DAY
    assert cli.main(["checkpoint", "suggest", str(run_dir), "--json", "--failures-per-day", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["mtbf_seconds"] == DAY / 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "4"], "--nodes and --node-mtbf-days go together"),
        (["--mtbf-hours", "0"], "a number above 0"),
        (["--mtbf-hours", "nan"], "a number above 0"),
        (["--mtbf-hours", "1", "--failures-per-day", "1"], "not allowed with"),
    ],
)
def test_wrong_rates_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["checkpoint", "suggest", str(run_dir), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_saved_nothing_is_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "events.jsonl").unlink()
    assert cli.main(["checkpoint", "suggest", str(run_dir)]) == 1
    line = capsys.readouterr().err.strip()
    assert str(run_dir) in line
    assert "nothing measured yet" in line
    assert "\n" not in line
