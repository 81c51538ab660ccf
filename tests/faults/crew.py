"""Ranks of a toy's run that can be killed, stopped and looked at: real processes on this host that meet over gloo."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from ranks import environment

from swiftv2.records import read_lines

WORKERS = Path(__file__).parent / "workers"
PLAIN: dict[str, Any] = {"precision": "fp32", "backend": "plain"}
ZERO2: dict[str, Any] = {"precision": "fp32"}
PATIENCE = 60.0
"""Seconds within which whatever is waited for must come, on a busy machine too."""
POLL = 0.005
HANG_SECONDS = 9.0
"""Short, since ranks that are left wait a quarter of it for word of those that are gone."""
IMPORTED = ["victim", "swiftv2.engine.zero", "swiftv2.engine.plain", "torch._dynamo", "torch._inductor.compile_fx"]
"""By the process from which ranks are forked: what takes seconds, some of it only in the first step of an optimizer."""


class Rank(Protocol):
    """A process of a job."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


class _Forked:
    """A rank forked from a process that has imported PyTorch and DeepSpeed: it starts in milliseconds, not in seconds."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode


@dataclass
class Job:
    """One start of a run."""

    run: Path
    ranks: list[Rank]
    logs: list[Path]

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """A signal to some ranks, or to all where none is named; those that are gone get none."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Exit statuses by rank, negative signals among them, once all have ended by themselves.

        Raises:
            AssertionError: some did not within the time; what they said is told, and where they are.
        """
        self.until(lambda: all(rank.poll() is not None for rank in self.ranks), "end", seconds, meanwhile=False)
        return [rank.poll() or 0 for rank in self.ranks]

    def until(self, happened: Callable[[], bool], what: str, seconds: float = PATIENCE, *, meanwhile: bool = True) -> None:
        """Wait for something that a running job does.

        Raises:
            AssertionError: it did not come within the time, or a rank ended meanwhile.
        """
        deadline = time.monotonic() + seconds
        while not happened():
            ended = meanwhile and any(rank.poll() is not None for rank in self.ranks)
            if (ended and not happened()) or time.monotonic() > deadline:
                statuses = [rank.poll() for rank in self.ranks]
                self.send(signal.SIGABRT)  # Victims tell their stacks.
                time.sleep(1)
                raise AssertionError(f"{what}: waited in vain, statuses {statuses}\n{self.said()[-6000:]}")
            time.sleep(POLL)

    def until_step(self, step: int) -> None:
        """Wait for a step of this start to be written down."""
        path, attempt = self.run / "metrics.jsonl", self.attempt()
        self.until(lambda: any(row["step"] >= step and row["attempt"] >= attempt for row in read_lines(path)), f"step {step}")

    def until_mark(self, name: str) -> None:
        """Wait for a place that a rank marks."""
        self.until((self.run / "logs" / name).exists, name)

    def attempt(self) -> int:
        """Number of this start of the run, once it has begun."""

        def begun() -> list[dict[str, Any]]:
            return [row for row in events(self.run, "start") if row["pid"] == self.ranks[0].pid]

        self.until(lambda: bool(begun()), "the start of the run")
        return int(begun()[0]["attempt"])

    def said(self) -> str:
        """What the ranks have written, one after the other."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def lines(self, rank: int) -> list[str]:
        """What a rank has said of itself: not what libraries say."""
        text = self.logs[rank].read_text(errors="replace")
        return [line for line in text.splitlines() if line.startswith("swiftv2")]


@contextlib.contextmanager
def job(
    run: Path, options: Mapping[str, Any], ranks: int = 2, *, fresh: bool = False, variables: Mapping[str, str] | None = None
) -> Iterator[Job]:
    """Ranks of a toy's run that go on meanwhile; what is left of them at the end is killed.

    Args:
        run: the run directory.
        options: see workers/victim.py.
        ranks: how many.
        fresh: a new interpreter for each, not a fork of one that has imported everything.
        variables: of the environment, for all ranks.
    """

    def start(own: Mapping[str, str], log: Path) -> Rank:
        own = {**own, **(variables or {})}
        words = [str(WORKERS / "victim.py"), str(run), json.dumps(options)]
        return _start(words, own, log) if fresh else _fork(run, options, own, log)

    with _started(run, ranks, start) as one:
        yield one


@contextlib.contextmanager
def command(run: Path, words: Sequence[str], ranks: int = 2) -> Iterator[Job]:
    """Ranks of `swiftv2 WORDS`, which writes to the run directory; no launcher stands between them and the test."""
    with _started(run, ranks, lambda own, log: _start(["-m", "swiftv2", *words], own, log)) as one:
        yield one


@contextlib.contextmanager
def _started(run: Path, ranks: int, start: Callable[[Mapping[str, str], Path], Rank]) -> Iterator[Job]:
    number = len(list(run.parent.glob(f"{run.name}.said-*")))
    folder = run.parent / f"{run.name}.said-{number}"
    folder.mkdir(parents=True)
    logs = [folder / f"rank-{rank}" for rank in range(ranks)]
    size, port = str(ranks), str(_free_port())
    meeting = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started: list[Rank] = []
    try:
        for rank, log in enumerate(logs):
            started.append(start({"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting}, log))
        yield Job(run, started, logs)
    finally:
        for one in started:
            if one.poll() is None:
                os.kill(one.pid, signal.SIGKILL)


def complete(run: Path, options: Mapping[str, Any], ranks: int = 2, *, status: int = 0, **more: Any) -> Job:
    """A job that ends by itself, all ranks with the same status."""
    with job(run, options, ranks, **more) as one:
        assert one.wait() == [status] * ranks, one.said()[-3000:]
    return one


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Events of a run, of some kinds or of all."""
    return [row for row in read_lines(run / "events.jsonl") if row["event"] in kinds or not kinds]


def options(engine: Mapping[str, Any] = PLAIN, steps: int = 60, **rest: Any) -> dict[str, Any]:
    """Options of a victim with fitting settings of `train` and `faults`, which those in `rest` change."""
    settings = {"max_steps": steps, "save_every": 1000, "evaluate_every": 1000, "save_minutes": 0.0, "deepspeed_files": False}
    faults = {"hang_seconds": HANG_SECONDS} | rest.get("faults", {})
    return {"engine": dict(engine), **rest, "train": settings | rest.get("train", {}), "faults": faults}


def _start(program: Sequence[str], variables: Mapping[str, str], log: Path) -> Rank:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, *program], env=environment() | dict(variables), stdout=file, stderr=file)


def _fork(run: Path, asked: Mapping[str, Any], variables: Mapping[str, str], log: Path) -> Rank:
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    alone = environment() | {"DS_ACCELERATOR": "cpu"}
    alone["PYTHONPATH"] = os.pathsep.join([alone["PYTHONPATH"], str(WORKERS)])
    sys.path[:] = dict.fromkeys([*sys.path, str(WORKERS)])
    import victim

    # The server is started at most once, and has the variables of that moment.
    with mock.patch.dict(os.environ, alone, clear=True):
        forkserver.ensure_running()
    process = context.Process(target=victim.rank, args=(run, dict(asked), dict(variables), log))
    process.start()
    return _Forked(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def leftovers(run: Path) -> list[str]:
    """Names in the folder of checkpoints that are neither checkpoints nor set aside as damaged."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("."))


def once(values: Iterable[Any]) -> Any:
    """The one value that there is."""
    (value,) = values
    return value
