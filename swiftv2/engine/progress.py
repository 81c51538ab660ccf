"""What a person sees while a run goes: a bar on a terminal, time-stamped lines elsewhere; rank 0 only."""

import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from swiftv2.engine.launch import World

LINE_SECONDS = 10.0


class ProgressLine:
    """Shows step, loss, learning rate, gradient norm, clips/s, data wait and time left on standard error."""

    def __init__(self, world: World, start: int, total: int) -> None:
        self._shown = world.rank == 0
        self._total = total
        self._bar: Progress | None = None
        self._printed: datetime | None = None
        if self._shown and sys.stderr.isatty():
            console = Console(stderr=True)
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step; without a terminal at most one line every few seconds, and the last."""
        if not self._shown:
            return
        text = describe(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = datetime.now().astimezone()
        if self._printed is None or (now - self._printed).total_seconds() >= LINE_SECONDS or step == self._total:
            self._printed = now
            self.note(f"step {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Say something once."""
        if not self._shown:
            return
        line = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}"
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (this is where a person reads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(values: Mapping[str, float]) -> str:
    """One line of a step's values."""
    left = timedelta(seconds=round(values["seconds_left"]))
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad {values['gradient_norm']:.3g}  "
        f"{values['clips_per_second']:.1f} clips/s  data wait {values['data_wait']:.0%}  left {left}"
    )
