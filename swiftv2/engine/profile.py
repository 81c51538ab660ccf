"""Profiled steps: traces of the torch profiler with a range for each part of a step and each named module, and their summary.

    profile = Profile(config.train.profile, run, world, modules, finished=page)      # a recipe, for fit(profile=profile)
    stack.enter_context(profile.telling(progress.note, backend.clock, watch.at))    # the loop, once; profile or Profile()
    profile.begin(step)              # before the meter's begin: starting the profiler takes a while
    with clock.part("forward"):      # parts of the clock are ranges of the trace, while one is recorded
        ...
    profile.end(step)                # after the meter's end; collective after the last profiled step

Where nothing is profiled, `begin` and `end` cost a comparison, and the clock has nobody to tell. `profiled` says whether steps
are being profiled. Nothing that goes wrong here ends a run: it is told in one line.
"""

import contextlib
import gzip
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity
from torch.utils.hooks import RemovableHandle

from swiftv2.config.engine import profiled_steps
from swiftv2.engine.clock import Clock
from swiftv2.engine.collective import gather
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.timeline import STEP, read_trace, summarise, too_large
from swiftv2.errors import SwiftError
from swiftv2.files import named, sync, write_file

FOLDER = "profile"

_OTHERS = 50
"""Last steps before the profiled ones by which it is told how much longer these took."""
_SILENT = "6"
_WARM_UP = 1
"""First steps of an attempt, which are not compared with."""


class Profile:
    """Profiles the steps that `train.profile` names, on the first and the last rank.

    Args:
        asked: `steps:A-B`, as the configuration has checked it; None profiles nothing, and needs nothing else.
        run: the opened run directory; all goes to `profile/attempt_<N>` in it.
        world: this process among the ranks.
        modules: modules by the name of their range in trace and summary; they have hooks while profiled, none otherwise.
        finished: on rank 0, makes a page, or what else is to be looked at, of the folder once `summary.json` lies there.
    """

    def __init__(
        self,
        asked: str | None = None,
        run: RunDirectory | None = None,
        world: World | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        finished: Callable[[Path], Path] | None = None,
    ) -> None:
        self._asked, self._run, self._world, self._finished = asked, run, world, finished
        if asked is not None and (run is None or world is None):
            raise ValueError("a profile of steps needs the run and its world")
        self._steps = None if asked is None else profiled_steps(asked)
        self._modules = dict(modules or {})
        self._note: Callable[[str], None] = lambda _: None
        self._clock: Clock | None = None
        self._at: Callable[[int, str], None] = lambda *_: None
        self._running = False
        self._profiler: torch.profiler.profile | None = None
        self._hooks: list[RemovableHandle] = []
        self._ranges: list[record_function] = []
        self._done: dict[int, float] = {}
        self._others: deque[float] = deque(maxlen=_OTHERS)
        self._counted, self._began = 0, 0.0
        self._problem: str | None = None

    def telling(
        self, note: Callable[[str], None], clock: Clock | None = None, at: Callable[[int, str], None] = lambda *_: None
    ) -> Self:
        """This profile, once it knows whom to tell.

        Args:
            note: says in a line what it does.
            clock: tells it what part of a step is entered.
            at: is told the step, and that this takes as long as a save may.
        """
        self._note, self._clock, self._at = note, clock, at
        return self

    @property
    def profiled(self) -> bool:
        """Whether steps are being profiled, and so take longer than others."""
        return self._running

    def enter(self, name: str) -> None:
        """A range begins."""
        if self._profiler is not None:
            opened = record_function(name)
            opened.__enter__()  # type: ignore[no-untyped-call]
            self._ranges.append(opened)

    def leave(self) -> None:
        """The range that began last ends; one that began before the profiler did is none."""
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)

    def begin(self, step: int) -> None:
        """A step begins."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._running and step < first:
            self._begin_again()
        if not self._running and step > last:
            self._give_up(f"train.profile={self._asked}: the run is past these steps: nothing is profiled")
            return
        if not self._running and step >= first:
            self._start()
        self.enter(f"{STEP}{step}")
        self._began = time.perf_counter()

    def end(self, step: int) -> None:
        """A step has ended; after the last profiled one, traces and summary are written (collective then)."""
        if self._steps is None:
            return
        seconds = time.perf_counter() - self._began
        self._counted += 1
        if not self._running:
            if self._counted > _WARM_UP:
                self._others.append(seconds)
            return
        self.leave()
        self._done[step] = seconds
        if step >= self._steps[1]:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._steps is None:
            return
        if not self._running:
            if kind is None:
                self._give_up(f"train.profile={self._asked}: the run ended before these steps: nothing is profiled")
        elif kind is None and self._done:
            # All ranks stop after the same step, so all of them are here.
            self._write()
        else:
            with contextlib.suppress(RuntimeError):  # What ended the run is told, not what it did to the profiler.
                self._stop()

    def _begin_again(self) -> None:
        """Drop what was recorded: training went back, and comes to these steps once more."""
        steps = self._steps
        with contextlib.suppress(RuntimeError):  # A profiler that does not stop loses its trace, not the run.
            self._stop()
        self._steps, self._done = steps, {}
        self._note(
            f"train.profile={self._asked}: training went back before these steps: they are profiled when it is there again"
        )

    def _give_up(self, why: str) -> None:
        self._steps = None
        self._note(why)

    def _start(self) -> None:
        """Record from now on, on a rank that is looked at."""
        world = _known(self._world)
        self._running = True
        if world.rank not in (0, world.size - 1):
            return
        # Kineto writes to standard error whenever it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", _SILENT)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
        profiler = torch.profiler.profile(activities=kinds)
        try:
            profiler.start()
        except RuntimeError as error:  # such as CUPTI, which another profiler holds
            self._problem = f"the profiler does not start: {_line(error)}"
            return
        self._profiler = profiler
        if self._clock is not None:
            self._clock.ranges = self
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
            self._hooks.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))

    def _stop(self) -> torch.profiler.profile | None:
        """End recording."""
        self._steps, self._running = None, False
        if self._clock is not None:
            self._clock.ranges = None
        for hook in self._hooks:
            hook.remove()
        while self._ranges:
            self.leave()
        profiler, self._profiler, self._hooks = self._profiler, None, []
        if profiler is not None:
            if _known(self._world).device.type == "cuda":
                torch.cuda.synchronize(_known(self._world).device)
            profiler.stop()
        return profiler

    def _write(self) -> None:
        """Write this rank's trace, the summary of all ranks and what `finished` makes (collective)."""
        self._at(max(self._done), "save")
        run, world, summary = _known(self._run), _known(self._world), None
        folder = run.path / FOLDER / f"attempt_{run.attempt}"
        try:
            profiler = self._stop()
            if profiler is not None:
                summary = self._told(profiler, folder / f"trace-rank-{world.rank}.json.gz")
        except Exception as error:  # noqa: BLE001 (whatever goes wrong with a profile, the run goes on, and the ranks meet below)
            self._problem = _line(error)
        if summary is not None and world.device.type == "cuda" and summary["device"] is None:
            self._problem = "no kernel of the GPU was recorded: KINETO_LOG_LEVEL=0 in the environment makes CUPTI say why"
        told = gather((world.rank, summary, self._problem), world)
        if world.rank == 0:
            ranks = {str(rank): one for rank, one, _ in told if one is not None}
            self._leave(run, folder, ranks, [f"rank {rank}: {problem}" for rank, _, problem in told if problem])

    def _leave(self, run: RunDirectory, folder: Path, ranks: dict[str, Any], problems: list[str]) -> None:
        """Write the summary and what `finished` makes, and tell of it (rank 0)."""
        steps = f"steps {min(self._done)} to {max(self._done)}" if len(self._done) > 1 else f"step {min(self._done)}"
        made = None
        if ranks:
            try:
                values = {**self._facts(), "ranks": ranks, "problems": problems}
                write_file(folder / "summary.json", json.dumps(values, indent=1) + "\n")
                made = folder if self._finished is None else self._finished(folder)
                run.event("profile", max(self._done), steps=sorted(self._done), path=folder.relative_to(run.path).as_posix())
            except Exception as error:  # noqa: BLE001 (see above)
                problems.append(_line(error))
        for problem in problems:
            self._note(f"profile of {steps}, which is not whole: {problem}")
        if made is not None:
            self._note(f"profile of {steps}: {made}")

    def _told(self, profiler: torch.profiler.profile, path: Path) -> dict[str, Any]:
        """Write a trace and say what is in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.partial")
        # The profiler says nothing where it cannot write: it writes where there is room, and the compressed copy is ours.
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(plain))
            if not plain.is_file():
                raise SwiftError(f"the profiler cannot write to {tempfile.gettempdir()}: make room there, or set TMPDIR")
            # A damaged trace takes no name; one too large to be summed up is whole, and says so below.
            events = None if too_large(plain) else read_trace(plain)
            try:
                with named(path), plain.open("rb") as source, gzip.open(beside, "wb", compresslevel=5) as target:
                    shutil.copyfileobj(source, target, 2**20)
                sync(beside)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            events = read_trace(plain) if events is None else events
        return {"trace": path.name, "bytes": path.stat().st_size, **summarise(events, list(self._modules))}

    def _facts(self) -> dict[str, Any]:
        world = _known(self._world)
        others = statistics.median(self._others) if self._others else None
        return {
            "format": 1,
            "asked": self._asked,
            "steps": sorted(self._done),
            "step_seconds": [self._done[step] for step in sorted(self._done)],
            "other_steps": len(self._others),
            "other_step_seconds": others,
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            "world_size": world.size,
            "threads": torch.get_num_threads(),
        }


def _line(error: Exception) -> str:
    """An error in one line, those of the system with the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error).partition("\n")[0]
    return text if isinstance(error, SwiftError | RuntimeError) else f"{type(error).__name__}: {text}"


def _known(value: Any) -> Any:
    """What is there wherever steps are asked for."""
    if value is None:
        raise AssertionError("a profile without steps has no run")
    return value
