"""What a person sees while a run goes: a bar on a terminal, time-stamped lines elsewhere; rank 0 only."""

import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from swiftv2.engine.launch import World

LINE_SECONDS = 10.0
_WATCHED_SECONDS = 0.5
_DOING = {
    "data": "waiting for data",
    "compute": "computing",
    "warm-up": "first step",
    "boundary": "waiting for the other ranks",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
}


class ProgressLine:
    """Shows step, loss, learning rate, gradient norm, clips/s, data wait and time left on standard error.

    What takes long beside steps (an evaluation, a save, an outage of the store) is told while it lasts.
    """

    def __init__(self, world: World, start: int, total: int) -> None:
        self._shown = world.rank == 0
        self._total = total
        self._bar: Progress | None = None
        self._printed: datetime | None = None
        self._text = ""
        self._noted = False
        self._doing = ("", time.monotonic())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        if self._shown and sys.stderr.isatty():
            console = Console(stderr=True)
            columns = (
                SpinnerColumn(),
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def at(self, phase: str) -> None:
        """Training is in this phase from now on; see `swiftv2.engine.sentinel.Sentinel.at`."""
        if self._doing[0] != phase:
            self._doing = (phase, time.monotonic())

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step; without a terminal at most one line every few seconds, none for a step that had one, and the last."""
        if not self._shown:
            return
        self._doing = ("", time.monotonic())
        self._text = describe(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._text)
            return
        now = datetime.now().astimezone()
        noted, self._noted = self._noted, False
        due = self._printed is None or ((now - self._printed).total_seconds() >= LINE_SECONDS and not noted)
        if due or step == self._total:
            self._printed = now
            self.note(f"step {step}/{self._total}  {self._text}")
            self._noted = False

    def note(self, text: str) -> None:
        """Say something once."""
        if not self._shown:
            return
        self._noted = True
        line = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (this is where a person reads)

    def __enter__(self) -> Self:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def _watch(self) -> None:
        """Tell what takes long: on a terminal beside the bar, else in lines that come ever more rarely."""
        told: tuple[tuple[str, float], float] | None = None
        while not self._ended.wait(_WATCHED_SECONDS):
            doing = phase, since = self._doing
            lasted = time.monotonic() - since
            if phase not in _DOING:
                continue
            if self._bar is not None:
                if lasted > 2 * _WATCHED_SECONDS:
                    text = f"{_DOING[phase]} for {timedelta(seconds=round(lasted))}"
                    self._bar.update(self._task, description=f"{self._text}  {text}".strip())
            elif lasted >= (LINE_SECONDS if told is None or told[0] != doing else 2 * told[1]):
                told = doing, lasted
                self.note(f"{_DOING[phase]} for {timedelta(seconds=round(lasted))}")


def describe(values: Mapping[str, float]) -> str:
    """One line of a step's values."""
    left = timedelta(seconds=round(values["seconds_left"]))
    ratio = f" ({values['loss_ratio']:.3f} of copying)" if "loss_ratio" in values else ""
    mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return (
        f"loss {values['loss']:.4f}{ratio}  lr {values['learning_rate']:.2e}  grad {values['gradient_norm']:.3g}  "
        f"{values['clips_per_second']:.1f} clips/s{mfu}  data wait {values['data_wait']:.0%}  left {left}"
    )
