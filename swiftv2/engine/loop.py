"""The training loop: resume or start, then evaluate, agree, save, step, until done or asked to stop."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from swiftv2.config.engine import FaultsConfig, ScheduleConfig, TrainConfig
from swiftv2.engine.backend import Backend, StepResult
from swiftv2.engine.collective import Agreed, agree
from swiftv2.engine.energy import DeviceReadings
from swiftv2.engine.guard import SpikeGuard
from swiftv2.engine.launch import World
from swiftv2.engine.lines import evaluation_is_due, greeting, is_logged, values_of
from swiftv2.engine.loss import after_loss, lost_each_other
from swiftv2.engine.meter import Meter
from swiftv2.engine.pace import Pace
from swiftv2.engine.profile import Profile
from swiftv2.engine.progress import ProgressLine
from swiftv2.engine.refusals import Refusals
from swiftv2.engine.resume import Start, resume, without_effect
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.saver import Saver
from swiftv2.engine.schedule import learning_rate
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.signals import STOPPED_EARLY, StopRequest, describe
from swiftv2.engine.stream import Exclusion, Stream
from swiftv2.engine.totals import Totals
from swiftv2.errors import SwiftError

Evaluate = Callable[[int, Callable[[], None]], Mapping[str, float]]
"""Given the step, and what all ranks call equally often meanwhile; gives the values that are logged."""
Batches = Callable[[int, list[Exclusion]], Stream]

_PACE_STEPS = 50
_PATIENCE = 2
"""Times `faults.hang_seconds` that a checkpoint may take beside training."""
_PASSED_OVER = StepResult(math.nan, math.nan, "train.skip_steps names it")
_MARGIN_SECONDS = 10.0
"""Left over at a time limit, for what comes after the last save."""


class EvaluationStopped(Exception):  # noqa: N818 (it is no error)
    """An evaluation was broken off because the run is to stop; it is made up for when the run goes on."""


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    samples: int
    stopped_early: bool
    checkpoint: Path | None
    values: dict[str, float]

    @property
    def exit_status(self) -> int:
        """0 done; 75 stopped early with its state saved: run me again."""
        return STOPPED_EARLY if self.stopped_early else 0


def fit(
    *,
    backend: Backend,
    world: World,
    run: RunDirectory,
    watch: Sentinel,
    batches: Batches,
    train: TrainConfig,
    schedule: ScheduleConfig,
    peak_lr: float,
    seed: int,
    faults: FaultsConfig | None = None,
    evaluate: Evaluate | None = None,
    best_metric: str | None = None,
    peak_flops: float | None = None,
    branch: Path | None = None,
    profile: Profile | None = None,
) -> FitResult:
    """Train from where the run directory stands up to `train.max_steps` (collective).

    Args:
        backend: module, optimizer and how a step is computed.
        world: this process among the ranks.
        run: the opened run directory.
        watch: the entered sentinel of the run, told where training is.
        batches: given the clips that the whole run has consumed and what is left out, this rank's micro-batches from there on.
        train: steps, batch, and what happens every how many steps.
        schedule: learning rate over steps.
        peak_lr: its peak.
        seed: seed of the run, noted in its checkpoints.
        faults: when a step is refused and a run rewound.
        evaluate: called by all ranks every `evaluate_every` steps and after the last; its values are logged.
        best_metric: key of the evaluation whose lowest value marks the best checkpoint, which is saved at once and kept.
        peak_flops: FLOP/s of all ranks' devices together at their peak, by which `mfu` is counted; None: it is not.
        branch: checkpoint of another run from which a new one goes on.
        profile: of some steps; None: of none.

    Returns:
        Where it ended. After SIGTERM, SIGUSR1, SIGUSR2 or an interrupt on any rank, or where the time is over, all ranks end
        after the same step with a checkpoint, `stopped_early` is set and `exit_status` is 75.

    Raises:
        SwiftError: a checkpoint is damaged beyond help or cannot be written, training does not recover from refused steps, or
            another process took the run over.
    """
    faults = faults or FaultsConfig()
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(StopRequest(watch.end, heard=watch.stopping))
        saver = stack.enter_context(Saver(run, backend, world, train))
        late = "the file system has not taken a checkpoint for longer than any step may take"
        watch.mind(lambda: late if saver.overdue(_PATIENCE * faults.hang_seconds) else None)
        start = resume(backend, world, run, train, schedule, seed, branch)
        progress = stack.enter_context(ProgressLine(world, start.state.step, train.max_steps))
        for problem in start.problems:
            progress.note(f"a damaged checkpoint is set aside: {problem}")
        readings = stack.enter_context(DeviceReadings(world))
        profile = stack.enter_context((profile or Profile()).telling(progress.note, backend.clock, watch.at))
        parts = _Parts(backend, world, run, batches, train, faults, watch, request, saver, progress, readings, profile)
        meter = Meter(train.global_batch, train.max_steps, backend.clock, readings, world.device, peak_flops)
        training = _Training(parts, start, meter, lambda step: learning_rate(step, schedule, peak_lr, train.max_steps))
        stack.callback(training.close)
        try:
            return training.run(evaluate, best_metric)
        except RuntimeError as error:
            if not lost_each_other(error):
                raise
            left = watch.who_left()
            if left is not None and left.state != "failed":
                run.alarm("lost", {"rank": left.rank, "host": left.host, "step": left.step, "phase": left.phase})
            raise after_loss(error, left) from error


class _Parts(NamedTuple):
    """What a training is made from."""

    backend: Backend
    world: World
    run: RunDirectory
    batches: Batches
    train: TrainConfig
    faults: FaultsConfig
    watch: Sentinel
    request: StopRequest
    saver: Saver
    progress: ProgressLine
    readings: DeviceReadings
    profile: Profile


class _Training:
    """A run in progress: its state, and what is done to it between two boundaries."""

    def __init__(self, parts: _Parts, start: Start, meter: Meter, rate: Callable[[int], float]) -> None:
        self.parts, self.meter, self.rate, self.clock = parts, meter, rate, parts.backend.clock
        self.state = self.saved = state = start.state
        self.new = start.new
        self.stream = parts.batches(state.samples, state.exclusions)
        self.state = replace(state, exclusions=self.stream.exclusions)
        self.guard = SpikeGuard(parts.faults, state.spike_window)
        self.refusals = Refusals(parts.run, parts.backend, parts.world, parts.faults)
        self.totals = Totals(parts.run, parts.world)
        self.pace = Pace(parts.world, parts.backend.module)
        self.values: dict[str, float] = {}
        self.folder: Path | None = None
        self.evaluation_seconds = 0.0

    def close(self) -> None:
        """End what reads ahead."""
        self.stream.close()

    def run(self, evaluate: Evaluate | None, best_metric: str | None) -> FitResult:
        """Evaluate, agree, save, step; again and again."""
        train, run = self.parts.train, self.parts.run
        generated = self.parts.backend.generated_config()
        if generated is not None:
            run.document("deepspeed.json", generated)
        run.event("energy", read_of=self.parts.readings.sources)
        for line in (greeting(run, self.state, self.parts.world), *without_effect(train, self.state)):
            self.parts.progress.note(line)
        if self.new:
            # The disk is tried at once, and there is something to go back to.
            self.parts.saver.begin(self.state, permanent=False)
            self.saved = self.state
        while True:
            improved = evaluate is not None and self.evaluate(evaluate, best_metric)
            if is_logged(self.state, train, self.values, improved=improved):
                run.metrics(self.state.step, self.values | self.totals.values())
                self.meter.told()
            agreed = self.agree()
            if self.refusals.hopeless(self.state):
                self.go_back()
            done = self.state.step >= train.max_steps and (evaluate is None or not evaluation_is_due(self.state, train))
            self.save(agreed, now=done or agreed.stop > 0 or improved)
            if done or agreed.stop:
                break
            self.step()
        self.finish_save(last=True)
        if done:
            run.event("finished", self.state.step, totals=self.totals.values())
        else:
            name = describe(agreed.stop)
            run.event("stopped", self.state.step, signal=name, totals=self.totals.values())
            self.parts.progress.note(f"stopped after step {self.state.step} ({name}): run the same command to go on")
        return FitResult(self.state.step, self.state.samples, not done, self.folder, self.values)

    def evaluate(self, evaluate: Evaluate, best_metric: str | None) -> bool:
        """Evaluate where it is due, also what a stop has cut off; whether the model is the best so far."""
        if not evaluation_is_due(self.state, self.parts.train):
            return False
        self.parts.request.check_time(self.evaluation_seconds + self.parts.saver.longest + _MARGIN_SECONDS)
        asked = time.monotonic()
        try:
            with self.clock.part("evaluation"):
                scores = evaluate(self.state.step, self._tick)
        except EvaluationStopped:
            return False
        self.evaluation_seconds = time.monotonic() - asked
        self.values |= scores
        former, self.state = self.state, self.state.scored(scores, best_metric)
        return self.state.best_step != former.best_step

    def _tick(self) -> None:
        """What an evaluation calls between its batches: it ends there where any rank is asked to stop."""
        request = self.parts.request
        self._at(self.state.step, "evaluate")
        request.check_time(self.parts.saver.longest + _MARGIN_SECONDS)
        stop = agree(self.parts.world, stop=request.code).stop
        if stop:
            request.ask(stop)
            raise EvaluationStopped

    def agree(self) -> Agreed:
        """Exchange what each rank knows; leave out together what any of them found of no use."""
        request, saver, stream = self.parts.request, self.parts.saver, self.stream
        self._at(self.state.step, "boundary")
        request.check_time(1.5 * self.meter.longest + saver.longest + _MARGIN_SECONDS)
        agreed = agree(self.parts.world, stop=request.code, news=stream.faulty(), save=saver.due, flushed=saver.flushed)
        if agreed.stop:
            request.ask(agreed.stop)
        if agreed.news:
            self.state, told = self.refusals.leave_out(self.state, self.stream)
            for line in told:
                self.parts.progress.note(line)
        if saver.busy and agreed.flushed:
            self.finish_save()
        return agreed

    def save(self, agreed: Agreed, *, now: bool) -> None:
        """Begin a checkpoint where one is due: a permanent one, or an ephemeral one by the clock."""
        step, former = self.state.step, self.saved
        asked = step in self.parts.train.keep_steps or step % self.parts.train.save_every == 0
        permanent = now or (asked and step != former.step)
        if self.state == former or not (permanent or agreed.save):
            return
        self._at(self.state.step, "save")
        self.finish_save()
        with self.clock.part("checkpoint"):
            self.parts.saver.begin(self.state, permanent=permanent, native=not agreed.stop)
        self.saved = self.state

    def finish_save(self, *, last: bool = False) -> None:
        """Let a save count that was begun.

        Raises:
            SwiftError: it failed, and it was the run's last, or so many failed in a row.
        """
        saver = self.parts.saver
        self.parts.progress.at("save")
        with self.clock.part("checkpoint"):
            ended = saver.finish()
        if ended is None:
            return
        if ended.problem is None:
            self.folder = ended.folder
            return
        told = f"the checkpoint of step {ended.state.step} could not be saved: {ended.problem}; former ones are whole"
        if last or saver.failed_in_a_row >= self.parts.faults.failed_saves:
            raise SwiftError(f"{told}: make room and start again")
        self.parts.progress.note(told)

    def go_back(self) -> None:
        """Begin again before the refused steps, without their samples."""
        self.finish_save()
        self.stream.close()
        self.state = self.refusals.rewind(self.state)
        self.parts.progress.note(f"went back to step {self.state.step}: {len(self.state.exclusions)} clips are left out now")
        self.parts.saver.begin(self.state, permanent=True)
        self.finish_save(last=True)
        self.saved = self.state
        self.refusals.settle(self.state)
        self.stream = self.parts.batches(self.state.samples, self.state.exclusions)
        self.guard, self.values = SpikeGuard(self.parts.faults, self.state.spike_window), {}

    def step(self) -> None:
        """One step, accepted or refused."""
        step, train = self.state.step + 1, self.parts.train
        rate, passed_over = self.rate(step), step in train.skip_steps
        self.parts.profile.begin(step)
        self.meter.begin()
        self.parts.backend.begin(step)
        self._forward_backward(step, compute=not passed_over)
        result = _PASSED_OVER
        if not passed_over:
            result = self.parts.backend.step(rate, self.guard.judge, {"joules": self.parts.readings.spent()})
        self.totals.add(result.counts)
        self.pace.stepped(self.meter.end(result.counts))
        self.parts.profile.end(step)
        self.state = replace(self.state, step=step, samples=self.state.samples + train.global_batch)
        if result.refused is None:
            self.guard.accept(result.loss, result.grad_norm)
            self.state = replace(self.state, spike_window=self.guard.history, refused=[])
        else:
            if not passed_over:
                self.state = self.refusals.note(self.state, result, self.stream)
            self.parts.progress.note(f"step {step} refused: {result.refused}")
        if step % _PACE_STEPS == 0:
            report = self.pace.report(self.parts.world)
            self.meter.compared(report)
            if report["slow"]:
                self.parts.run.event("slow", step, **report)
                self.parts.progress.note(f"step {step}: slow ranks: {report['slow']}")
        self.values = values_of(result, rate, self.state, self.meter)
        self.parts.progress.update(step, self.values)

    def _forward_backward(self, step: int, *, compute: bool) -> None:
        backend = self.parts.backend
        for _ in range(backend.accumulation):
            self._at(step, "data")
            asked = time.perf_counter()
            try:
                with self.clock.part("data"):
                    batch = next(self.stream)
            except StopIteration as error:
                raise SwiftError("the batches ended before train.max_steps: the loader must go on over epochs") from error
            waited = time.perf_counter() - asked
            self.meter.waited(waited)
            self.pace.waited(waited)
            self._at(step, "compute" if self.meter.longest else "warm-up")
            if compute:
                backend.forward_backward(batch)

    def _at(self, step: int, phase: str) -> None:
        """Tell where training is: the sentinel, by which hangs are found, and whoever looks on."""
        self.parts.watch.at(step, phase)
        self.parts.progress.at(phase)
