"""The loop and its checkpoints in one process: damage, best, stops, ends; many ranks are in test_engine_resume."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine import saver
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.checkpoint import latest, list_checkpoints, load_newest, read_weights, verify_checkpoint
from swiftv2.engine.launch import World
from swiftv2.engine.loop import FitResult, fit
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.shards import shard_name
from swiftv2.engine.stream import Exclusion, Stream
from swiftv2.errors import SwiftError
from swiftv2.records import read_lines, read_metrics

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from toy import DECAY, Batches, Micro, Toy

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ENGINE = EngineConfig(backend="plain", device="cpu")
SHARD = shard_name(0, 1)


def _backend() -> Backend:
    return build_backend(ENGINE, OptimizerConfig(lr=1e-2), Toy(), DECAY, ALONE, 8, 1)


def _stream(samples: int, exclusions: list[Exclusion]) -> Batches:
    return Batches(samples, ALONE, 1, exclusions=exclusions)


class Hooked(Batches):
    """Hands every micro-batch, with its number, to a hook before it is used."""

    def __init__(self, hook: Callable[[int, Micro], Micro], samples: int, exclusions: list[Exclusion]) -> None:
        super().__init__(samples, ALONE, 1, exclusions=exclusions)
        self.closed, self._hook, self._index = False, hook, -1

    def __next__(self) -> Micro:
        self._index += 1
        return self._hook(self._index, super().__next__())

    def close(self) -> None:
        self.closed = True


def _fit(path: Path, max_steps: int, stream: Callable[[int, list[Exclusion]], Stream] = _stream, **options: Any) -> FitResult:
    steps = {"save_every": 4, "evaluate_every": 2} | options.pop("train", {})
    train = TrainConfig(max_steps=max_steps, global_batch=8, **steps)
    with (
        RunDirectory.open(path, f"train: {{max_steps: {max_steps}}}\n", ALONE) as run,
        Sentinel.over(run, ALONE, train, options.get("faults") or FaultsConfig()) as watch,
    ):
        return fit(
            backend=_backend(),
            world=ALONE,
            run=run,
            watch=watch,
            batches=stream,
            train=train,
            schedule=ScheduleConfig(warmup_steps=2),
            peak_lr=1e-2,
            seed=0,
            **options,
        )


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda c: _flip(c / SHARD), "rank_0_of_1.safetensors does not match its hash"),
    "truncated": (lambda c: _truncate(c / SHARD), "rank_0_of_1.safetensors has .* bytes, not"),
    "missing shard": (lambda c: (c / SHARD).unlink(), "rank_0_of_1.safetensors is missing"),
    "missing": (lambda c: (c / "trainer.json").unlink(), "trainer.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda c: _truncate(c / "manifest.json"), "manifest.json: not valid JSON"),
    "other manifest": (lambda c: (c / "manifest.json").write_text("{}"), "not a manifest of format 2"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8."""
    path = tmp_path_factory.mktemp("loop") / "run"
    result = _fit(path, 8)
    assert (result.step, result.samples, result.stopped_early, result.exit_status) == (8, 64, False, 0)
    return path


def test_a_finished_run_has_lines_and_checkpoints(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"learning_rate", "gradient_norm", "clips_per_second", "data_wait", "seconds_left"} <= rows[0].keys()
    assert rows[-1]["seconds_left"] == 0
    assert [c.step for c in list_checkpoints(finished)] == [8, 4]
    newest = latest(finished)
    assert newest is not None
    verify_checkpoint(newest.path)
    state = newest.trainer()
    assert (state.step, state.samples, state.world_size, state.micro_batch, state.exclusions) == (8, 64, 1, 8, [])


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(finished: Path, tmp_path: Path, kind: str) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    act, message = DAMAGE[kind]
    act(run / "checkpoints" / "step_8")
    with pytest.raises(SwiftError, match=message):
        verify_checkpoint(run / "checkpoints" / "step_8")
    result = _fit(run, 8)
    assert result.step == 8
    damaged, resumed = (
        next(e for e in read_lines(run / "events.jsonl") if e["event"] == kind) for kind in ("checkpoint_damaged", "resumed")
    )
    assert resumed["step"] == 4
    assert str(run / "checkpoints" / "step_8") in damaged["problem"]
    verify_checkpoint(run / "checkpoints" / "step_8")
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (finished, run)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("keep_last", [1, 3])
def test_a_damaged_checkpoint_takes_no_good_ones_place(finished: Path, tmp_path: Path, keep_last: int) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    _flip(run / "checkpoints" / "step_8" / SHARD)
    _fit(run, 7, train={"save_every": 1, "keep_last": keep_last})
    assert [c.step for c in list_checkpoints(run)] == [7, 6, 5][: max(keep_last, 2)], "the newest two are always kept"
    for checkpoint in list_checkpoints(run):
        verify_checkpoint(checkpoint.path)
    assert (run / "checkpoints" / "damaged_step_8").is_dir()


def test_with_all_checkpoints_damaged_nothing_begins_afresh(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("step_4", "step_8"):
        _flip(run / "checkpoints" / name / SHARD)
    with pytest.raises(SwiftError, match=r"no checkpoint is whole .*step_8.*step_4") as caught:
        _fit(run, 8)
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_point_outside(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "checkpoints" / "step_8" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../config.yaml"] = {"size": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(SwiftError, match=r"the entry of '\.\./\.\./config\.yaml' is damaged"):
        verify_checkpoint(path.parent)


def test_another_model_is_refused(finished: Path) -> None:
    module = Toy()
    module.second = torch.nn.Linear(31, 9)
    other = build_backend(ENGINE, OptimizerConfig(), module, DECAY, ALONE, 8, 1)
    with pytest.raises(SwiftError, match=r"second.bias has shape \(7,\) there and \(9,\) in the model"):
        load_newest(finished, other, ALONE)


def test_saves_that_fail_are_told_and_leave_the_former_ones(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")

    def full(path: Path, *_: object) -> NoReturn:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_shard", full)
        with pytest.raises(
            SwiftError, match=r"step 11 could not be saved: .*No space left on device .*; former ones are whole"
        ):
            _fit(run, 20, train={"save_every": 1})
    told = [e["step"] for e in read_lines(run / "events.jsonl") if e["event"] == "save_failed"]
    assert told == [9, 10, 11], "faults.failed_saves in a row end the run"
    assert [c.step for c in list_checkpoints(run)] == [8, 4]
    for checkpoint in list_checkpoints(run):
        verify_checkpoint(checkpoint.path)
    assert _fit(run, 12).step == 12
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_ephemeral_checkpoints_come_by_the_clock_and_go(tmp_path: Path) -> None:
    result = _fit(tmp_path, 9, train={"save_every": 5, "save_minutes": 1e-9, "keep_last": 1})
    assert result.checkpoint == tmp_path / "checkpoints" / "step_9"
    saved = [(e["step"], e["kind"]) for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "saved"]
    assert {(5, "permanent"), (9, "permanent")} < set(saved)
    assert any(kind == "ephemeral" for _, kind in saved)
    kept = list_checkpoints(tmp_path)
    assert len(kept) == 2, "the newest two, and the last permanent one is among them"
    assert (kept[0].step, kept[0].kind) == (9, "permanent")


def test_some_permanent_checkpoints_are_kept_for_ever(tmp_path: Path) -> None:
    _fit(tmp_path, 9, train={"save_every": 1, "keep_last": 1, "keep_every": 3})
    assert [c.step for c in list_checkpoints(tmp_path)] == [9, 8, 6, 3]


def test_the_best_is_kept_beside_the_last(tmp_path: Path) -> None:
    scores = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 2.0, 12: 2.0}
    result = _fit(
        tmp_path,
        12,
        evaluate=lambda step, _: {"heldout/loss": scores[step]},
        best_metric="heldout/loss",
        train={"keep_last": 1, "save_every": 3},
    )
    assert result.values["heldout/loss"] == 2.0
    assert [c.step for c in list_checkpoints(tmp_path)] == [12, 9, 4]
    assert list_checkpoints(tmp_path)[0].trainer().best_value == 1.0
    assert [e["removed"] for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "saved"] == [
        [],
        [],
        [0],
        [2],
        [3],
        [],
        [6],
    ]
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert {s: row["heldout/loss"] for s, row in rows.items() if "heldout/loss" in row} == scores


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(finished: Path, tmp_path: Path, number: signal.Signals) -> None:
    def interrupt(index: int, batch: Micro) -> Micro:
        if index == 2:
            os.kill(os.getpid(), number)
        return batch

    former = signal.getsignal(number)
    result = _fit(tmp_path, 8, partial(Hooked, interrupt))
    assert (result.step, result.stopped_early, result.exit_status) == (3, True, 75)
    assert signal.getsignal(number) is former
    assert [c.step for c in list_checkpoints(tmp_path)] == [3, 0]
    assert _fit(tmp_path, 8).exit_status == 0
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (finished, tmp_path)]
    assert losses[0] == losses[1]


def test_a_signal_in_an_evaluation_breaks_it_off_and_it_is_made_up_for(tmp_path: Path) -> None:
    seen: list[int] = []

    def evaluate(step: int, tick: Callable[[], None]) -> dict[str, float]:
        if not seen:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(step)
        tick()
        return {"heldout/loss": float(step)}

    assert _fit(tmp_path, 4, evaluate=evaluate, best_metric="heldout/loss").exit_status == 75
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 0]
    assert _fit(tmp_path, 4, evaluate=evaluate, best_metric="heldout/loss").exit_status == 0
    assert seen == [2, 2, 4]
    values = {row["step"]: row.get("heldout/loss") for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert values[2] == 2.0
    assert values[4] == 4.0
    assert list_checkpoints(tmp_path)[0].trainer().best_step == 2


def test_a_stop_that_was_asked_before_the_first_step_loses_nothing(tmp_path: Path) -> None:
    def begun(samples: int, exclusions: list[Exclusion]) -> Batches:
        os.kill(os.getpid(), signal.SIGUSR1)
        return _stream(samples, exclusions)

    result = _fit(tmp_path, 4, begun)
    assert (result.step, result.exit_status) == (0, 75)
    assert _fit(tmp_path, 4).step == 4


def test_the_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = _fit(tmp_path, 4, train={"time_limit_minutes": 1e-3})
    assert result.exit_status == 75
    stopped = next(e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "stopped")
    assert stopped["signal"] == "time limit"


def _poisoned(steps: Sequence[int]) -> Callable[[int, list[Exclusion]], Stream]:
    """The fourth clip of each of these steps has targets that are not finite."""
    clips = {8 * (step - 1) + 3: float("nan") for step in steps}
    return lambda samples, exclusions: Batches(samples, ALONE, 1, exclusions=exclusions, poison=clips)


def _weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read_weights(run / "checkpoints" / f"step_{step}")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_poisoned_step_is_as_if_it_had_been_passed_over(tmp_path: Path) -> None:
    """Bit for bit, and its samples are written down."""
    refused, passed_over = tmp_path / "refused", tmp_path / "passed_over"
    _fit(refused, 8, _poisoned([4]))
    _fit(passed_over, 8, train={"skip_steps": [4]})
    rows = {row["step"]: row for row in read_metrics(refused / "metrics.jsonl")}
    assert [step for step, row in rows.items() if row["skipped"]] == [4]
    assert rows[4]["loss"] is None
    assert rows[6]["loss"] is not None
    (told,) = [e for e in read_lines(refused / "events.jsonl") if e["event"] == "skipped"]
    assert (told["step"], told["samples"]) == (4, 8)
    assert "loss is not finite" in told["reason"]
    assert {one["run"] for one in told["worst"]} == {f"r{clip}" for clip in range(24, 32)}
    assert _same(_weights(refused, 8), _weights(passed_over, 8))


def test_a_spike_is_refused_and_written_down(tmp_path: Path) -> None:
    faults = FaultsConfig(spike_window=8, spike_sigma=6.0)
    spike = {8 * 11 + 2: 1e4}
    stream = lambda samples, exclusions: Batches(samples, ALONE, 1, exclusions=exclusions, poison=spike)  # noqa: E731
    _fit(tmp_path / "refused", 16, stream, faults=faults)
    _fit(tmp_path / "passed_over", 16, faults=faults, train={"skip_steps": [12]})
    (told,) = [e for e in read_lines(tmp_path / "refused" / "events.jsonl") if e["event"] == "skipped"]
    assert told["step"] == 12
    assert "mean + 6 sigma of 8 steps" in told["reason"]
    assert _same(_weights(tmp_path / "refused", 16), _weights(tmp_path / "passed_over", 16))


def test_refused_steps_in_a_row_take_the_run_back_without_their_samples(tmp_path: Path) -> None:
    """As a clean run that was told to leave those samples out: bit for bit."""
    rewound, told = tmp_path / "rewound", tmp_path / "told"
    _fit(rewound, 12, _poisoned([6, 7, 8]))
    (back,) = [e for e in read_lines(rewound / "events.jsonl") if e["event"] == "rewound"]
    assert (back["step"], back["refused"], back["samples"]) == (4, [6, 8], 24)
    left_out = list_checkpoints(rewound)[0].trainer().exclusions
    assert left_out == [Exclusion(clip, clip, "rewound") for clip in range(40, 64)]
    _fit(told, 12, lambda samples, exclusions: _stream(samples, exclusions or left_out))
    assert _same(_weights(rewound, 12), _weights(told, 12))
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (rewound, told)]
    assert losses[0] == losses[1], "of steps done again the last line counts"


def test_checkpoints_ahead_of_a_rewind_are_gone_before_it_goes_on(tmp_path: Path) -> None:
    _fit(tmp_path, 9, _poisoned([6, 7, 8]), train={"save_every": 1, "keep_last": 5})
    steps = [e["step"] for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "saved"]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]
    assert all(c.trainer().rewinds == 1 for c in list_checkpoints(tmp_path) if c.step >= 5)


def test_a_run_that_does_not_recover_ends_with_a_diagnosis(tmp_path: Path) -> None:
    def nan(samples: int, exclusions: list[Exclusion]) -> Stream:
        poison = dict.fromkeys([*range(40, 200), *range(100_000, 100_200)], float("nan"))
        return Batches(samples, ALONE, 1, exclusions=exclusions, poison=poison)

    with pytest.raises(SwiftError, match=r"steps 6 to 8 were refused .*went back 2 times.*diagnosis.json") as caught:
        _fit(tmp_path, 12, nan, faults=FaultsConfig(most_rewinds=2))
    assert "\n" not in str(caught.value)
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    assert diagnosis["rewinds"] == 2
    assert [one["step"] for one in diagnosis["refused"]] == [6, 7, 8]
    assert len(diagnosis["last_accepted"]) == 5


def test_refused_steps_at_the_very_end_are_made_up_for(tmp_path: Path) -> None:
    result = _fit(tmp_path, 8, _poisoned([6, 7, 8]))
    assert (result.step, result.exit_status) == (8, 0)
    assert list_checkpoints(tmp_path)[0].trainer().rewinds == 1
    assert [row["skipped"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [False] * 8


def test_a_run_can_go_back_to_its_beginning(tmp_path: Path) -> None:
    _fit(tmp_path, 8, _poisoned([1, 2, 3]))
    (back,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "rewound"]
    assert (back["step"], back["refused"]) == (0, [1, 3])


def test_what_a_rewind_needs_is_kept_while_steps_are_refused(tmp_path: Path) -> None:
    """Saves between refused steps push it out of the newest two, and of the last permanent ones."""
    _fit(tmp_path, 12, _poisoned([6, 7, 8]), train={"save_every": 1, "keep_last": 1})
    (back,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "rewound"]
    assert back["step"] == 5


def test_an_evaluation_that_was_made_up_for_leaves_the_steps_other_values(tmp_path: Path) -> None:
    asked: list[int] = []

    def stopping(step: int, tick: Callable[[], None]) -> dict[str, float]:
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(step)
        tick()
        return {"heldout/loss": float(step)}

    assert _fit(tmp_path, 2, evaluate=stopping).exit_status == 75
    assert _fit(tmp_path, 2, evaluate=stopping).exit_status == 0
    row = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert (row["step"], row["heldout/loss"]) == (2, 2.0)
    assert row["loss"] > 0


def test_fewer_steps_than_are_done_are_no_work(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert _fit(run, 6, train={"skip_steps": [3]}).exit_status == 0
    said = capsys.readouterr().err
    assert "max_steps=6 is less than the 8 steps that are done" in said
    assert "skip_steps: [3] are done already" in said


def test_a_replaced_checkpoint_is_brought_back_where_the_new_one_never_came(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "step_8").rename(run / "checkpoints" / ".step_8.replaced")
    (run / "checkpoints" / ".step_8.2.1.partial").mkdir()
    assert _fit(run, 9).step == 9
    resumed = [e["step"] for e in read_lines(run / "events.jsonl") if e["event"] == "resumed"]
    assert resumed == [8]
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_batches_that_end_are_an_error_and_are_closed(tmp_path: Path) -> None:
    opened: list[Hooked] = []

    def short(samples: int, exclusions: list[Exclusion]) -> Batches:
        def end(index: int, batch: Micro) -> Micro:
            if index == 2:
                raise StopIteration
            return batch

        opened.append(Hooked(end, samples, exclusions))
        return opened[-1]

    with pytest.raises(SwiftError, match="the batches ended before"):
        _fit(tmp_path, 5, short)
    assert [one.closed for one in opened] == [True]


class Leaky(Batches):
    """Finds the sample 5 of no use in the step that ends at position 24; takes what is agreed."""

    handed = 0

    def __next__(self) -> Micro:
        self.handed += 1
        return super().__next__()

    def faulty(self) -> bool:
        return self.handed == 3

    def faults(self) -> list[dict[str, Any]]:
        return [{"clip": 5, "position": 16, "run": "r05", "reason": "the checksum fails"}] if self.faulty() else []


def test_what_is_of_no_use_is_written_down_counted_and_kept_by_checkpoints(tmp_path: Path) -> None:
    begun: list[list[Exclusion]] = []

    def leaky(samples: int, exclusions: list[Exclusion]) -> Batches:
        begun.append(exclusions)
        return Leaky(samples, ALONE, 1, exclusions=exclusions)

    _fit(tmp_path, 5, leaky)
    told = [e for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "quarantined"]
    assert [(e["step"], e["clip"], e["position"], e["run"]) for e in told] == [(3, 5, 16, "r05")]
    counts = {row["step"]: row["clips_left_out"] for row in read_metrics(tmp_path / "metrics.jsonl")}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    _fit(tmp_path, 6, leaky)
    assert begun == [[], [(5, 16, "unusable")]]


def test_another_seed_is_another_run(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "checkpoints" / "step_8" / "trainer.json"
    assert json.loads(path.read_text())["seed"] == 0
    train = TrainConfig(max_steps=9, global_batch=8)
    with (
        RunDirectory.open(run, "train: {max_steps: 9}\n", ALONE) as directory,
        Sentinel.over(directory, ALONE, train, FaultsConfig()) as watch,
        pytest.raises(SwiftError, match="seed=0"),
    ):
        fit(
            backend=_backend(),
            world=ALONE,
            run=directory,
            watch=watch,
            batches=_stream,
            train=train,
            schedule=ScheduleConfig(),
            peak_lr=1e-2,
            seed=1,
        )
