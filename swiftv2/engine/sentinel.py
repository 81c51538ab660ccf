"""The watcher of hangs: what no longer goes on is named, written down, and ended so that the run can be started again."""

import faulthandler
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch._C import _distributed_c10d as distributed

from swiftv2.config.engine import FaultsConfig, TrainConfig
from swiftv2.engine.beats import LEFT, Beat, Beats
from swiftv2.engine.diagnosis import describe_fault, find_suspects
from swiftv2.engine.launch import World
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.signals import STOPPED_EARLY, end_time
from swiftv2.errors import InterruptedRunError

Kind = Literal["hang", "lost", "grace"]
Verdict = dict[str, Any]

LOST_SECONDS = 120.0
_LONG_PHASES = ("start", "warm-up", "evaluate", "save", "finish")
"""Phases in which all ranks are together, and that may take long: loading, the first step, writing."""
_PATIENCE = 5
"""How many times longer they may take."""
_OVERTIME = 15.0
"""Seconds past the end of the time before the process is ended; Slurm kills after 30 by default."""
_BEATS_MISSED = 3
"""Beats without which a rank counts as silent in a diagnosis."""
_ENTERED = itertools.count()


class Sentinel:
    """Ends this process with status 75 where training no longer goes on, after all that can be told is written down.

    It does so where (a) the loop has not called `at` for `hang_seconds`; (b) another rank, or the store between ranks, has
    not been heard of for `lost_seconds`, and this rank has come no further for as long; (c) a stop was asked `grace_seconds`
    ago and the loop has not left; (d) another rank ends for one of these reasons. Every rank that still can writes the
    stacks of its threads and the last collectives to the folder of logs; the lowest of them calls `tell`.

    One thread decides and another talks to the store, which may keep it waiting; both go on while the main thread waits in a
    collective. Where a library holds Python's lock so that neither can run, a thread of faulthandler still writes the stacks,
    and the other ranks take this one for silent. Time in which this process itself was stopped does not count.

    Attributes:
        end: unix time at which the run must be over; None where nothing limits it.
    """

    def __init__(
        self,
        world: World,
        logs: Path,
        attempt: int,
        hang_seconds: float,
        grace_seconds: float,
        tell: Callable[[str, dict[str, Any]], None],
        lost_seconds: float = LOST_SECONDS,
        end: float | None = None,
    ) -> None:
        """Nothing is watched before the sentinel is entered.

        Args:
            world: this process among the ranks; all enter a sentinel, in the same order where they enter several.
            logs: folder for stacks-rank-R-attempt-A.txt and collectives-rank-R-attempt-A.json.
            attempt: number of this start of the run.
            hang_seconds: seconds between two calls of `at` from which a rank counts as hung.
            grace_seconds: seconds from the first request to stop to the end of the context.
            tell: called on the lowest rank that still answers with "hang", "lost" or "grace" and what is known: `cause`,
                `reported_by`, `silent` (rank, host, seconds), `behind` (rank, host, step, phase, seconds of each rank) and
                `suspects`, the ranks most likely at fault. If it fails or hangs, the process ends all the same.
            lost_seconds: seconds of silence from which a rank counts as lost.
            end: unix time at which the run must be over; a little later it is ended.
        """
        self._world = world
        self._hang, self._lost, self._grace = hang_seconds, lost_seconds, grace_seconds
        self._tell = tell
        self._files = (
            logs / f"stacks-rank-{world.rank}-attempt-{attempt}.txt",
            logs / f"collectives-rank-{world.rank}-attempt-{attempt}.json",
        )
        self._interval = min(5.0, hang_seconds / 6, lost_seconds / 6, grace_seconds / 6)
        self._missed = _BEATS_MISSED * self._interval
        self._linger = max(2.0, self._missed)
        self.end = end
        self._minded: list[Callable[[], str | None]] = []
        self._host = socket.gethostname()
        self._beats = Beats(world, f"sentinel/{attempt}/{next(_ENTERED)}", self._interval, self._beat)
        self._here: tuple[int, str] = (0, "start")
        self._idle = 0.0
        self._unanswered = 0.0
        self._state = "runs"
        self._stop: str | None = None
        self._verdict: Verdict | None = None
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="sentinel", daemon=True)

    @classmethod
    def over(cls, run: RunDirectory, world: World, train: TrainConfig, faults: FaultsConfig) -> Self:
        """A sentinel for a run from now on; it ends the process, too, where another one has taken the run over.

        Args:
            run: the opened run directory.
            world: this process among the ranks.
            train: its time limit.
            faults: what counts as a hang.
        """
        end = end_time(train.time_limit_minutes, os.environ, time.time())
        watch = cls(world, run.path / "logs", run.attempt, faults.hang_seconds, faults.grace_seconds, run.alarm, end=end)
        watch.mind(lambda: run.taken)
        return watch

    def at(self, step: int, phase: str) -> None:
        """The loop has come this far: "start", "data", "compute", "evaluate", "save", ... of a step."""
        self._here = (step, phase)

    def mind(self, why: Callable[[], str | None]) -> None:
        """Ask this now and then, from another thread: an answer is why the run cannot go on, as a hang is."""
        self._minded.append(why)

    def who_left(self) -> Beat | None:
        """After a collective that failed: the rank that ended first, once it has told so or its heart is no longer heard.

        Waits for that for one heartbeat and a half. `state` is "failed" where the rank ended by an error of its own, "runs"
        where it was heard of no more; None where nothing can be told.
        """
        until = time.monotonic() + 1.5 * self._interval
        while self._beats.peers:
            beats = [peer.beat for peer in self._beats.peers.values() if peer.beat is not None]
            failed = next((beat for beat in beats if beat.state == "failed"), None)
            if failed is not None or time.monotonic() > until:
                silent = [one["rank"] for one in self._silent(1.3 * self._interval)]
                return failed or next((beat for beat in beats if beat.rank in silent and beat.state == "runs"), None)
            self._beats.now()
            time.sleep(min(0.2, self._interval / 4))
        return None

    def stopping(self, reason: str) -> None:
        """A stop was asked, on whichever rank: all have the grace time from now on to leave the context (any thread)."""
        self._stop = self._stop or reason
        self._beats.now()

    def __enter__(self) -> Self:
        self._files[0].parent.mkdir(parents=True, exist_ok=True)
        for old in self._files[0].parent.glob(f"stacks-rank-{self._world.rank}-*.txt"):
            if old.stat().st_size == 0:
                old.unlink()  # of an attempt that was killed, and that had nothing to tell
        self._stacks = self._files[0].open("wb", buffering=0)
        self._arm()
        self._beats.start()
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._verdict is None:
                self._left.set()
        self._watcher.join()  # Where it has begun to end the process, that is here.
        self._state = "done" if error is None else "lost" if isinstance(error, RuntimeError | InterruptedRunError) else "failed"
        self._beats.finish(self._linger)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if self._files[0].stat().st_size == 0:
            self._files[0].unlink()

    def _beat(self) -> Beat:
        return Beat(self._world.rank, self._host, *self._here, self._idle, self._state, self._stop, self._verdict)

    def _watch(self) -> None:
        """Watch; where that fails by a mistake in the program, say so and be silent, so that the others find out."""
        try:
            self._count()
        except Exception as error:
            self._beats.finish(0.0)
            sys.stderr.write(f"swiftv2: rank {self._world.rank} is no longer watched: {error!r}\n")
            raise

    def _count(self) -> None:
        """Count the seconds without progress, and end the process where there are too many."""
        tick = min(1.0, self._interval / 2)
        seen, rounds, armed, asked = self._here, self._beats.rounds, self._interval, 0.0
        now = time.monotonic()
        while not self._left.wait(tick):
            # In one turn no more than a beat's time can have passed, or this process was stopped meanwhile.
            passed = min(time.monotonic() - now, max(self._interval, 2 * tick))
            now = time.monotonic()
            self._idle = self._idle + passed if self._here is seen else 0.0
            seen = self._here
            heard = self._beats.rounds != rounds or self._store_may_be_gone()
            self._unanswered = 0.0 if heard else self._unanswered + passed
            rounds = self._beats.rounds
            armed -= passed
            if armed <= 0:
                self._arm()
                armed = self._interval
            told = self._heed_others()
            asked = asked + passed if self._stop else 0.0
            verdict = told or self._judge(asked)
            if verdict is not None:
                with self._lock:
                    if self._left.is_set():
                        return
                    self._verdict = verdict
                self._end(verdict)

    def _arm(self) -> None:
        """Have the stacks written, by a thread that needs no lock of Python's, where this is not called again in time."""
        faulthandler.dump_traceback_later(0.75 * min(self._hang, self._lost), exit=False, file=self._stacks)

    def _store_may_be_gone(self) -> bool:
        """Whether the store's silence tells nothing: alone there is none, and rank 0, which keeps it, may leave first."""
        keeper = self._beats.peers.get(0)
        return not self._beats.peers or (keeper is not None and keeper.beat is not None and keeper.beat.state == "done")

    def _heed_others(self) -> Verdict | None:
        """Adopt another rank's stop, and its verdict."""
        verdict = None
        for peer in self._beats.peers.values():
            if peer.beat is not None:
                self._stop = self._stop or peer.beat.stop
                verdict = verdict or peer.beat.end
        return verdict

    def _judge(self, asked: float) -> Verdict | None:
        """Why this rank must end, None while it need not."""
        step, phase = self._here
        if self._idle >= self._hang * (_PATIENCE if phase in _LONG_PHASES else 1):
            return self._verdict_of(
                "hang", f"rank {self._world.rank} has not got on for {self._idle:.0f} s ({phase} of step {step})"
            )
        lost = self._silent(self._lost)
        unanswered = self._unanswered >= self._lost
        if (lost or unanswered) and self._idle >= self._lost:
            names = [f"rank {one['rank']} on {one['host']} is silent for {one['seconds']:.0f} s" for one in lost]
            store = ["the store between ranks, which rank 0 or its launcher keeps, does not answer"] if unanswered else []
            return self._verdict_of("lost", "; ".join(names + store))
        if self.end is not None and time.time() > self.end + _OVERTIME:
            return self._verdict_of("grace", "the time is over, and a step or a save did not end in time")
        for why in self._minded:
            cause = why()
            if cause is not None:
                return self._verdict_of("hang", f"rank {self._world.rank}: {cause}")
        if self._stop and asked >= self._grace:
            return self._verdict_of("grace", f"asked to stop ({self._stop}), but not done within {self._grace:.0f} s")
        return None

    def _silent(self, seconds: float) -> list[dict[str, Any]]:
        """Ranks of which nothing was heard for so long; a store that does not answer counts for rank 0, which keeps it."""
        silent = {
            rank: (peer.beat, peer.silent)
            for rank, peer in self._beats.peers.items()
            if peer.silent >= seconds and not (peer.beat and peer.beat.state == "done")
        }
        if self._unanswered >= seconds and self._world.rank != 0:
            silent[0] = (self._beats.peers[0].beat, self._unanswered)
        return [
            {"rank": rank, "host": beat.host if beat else None, "seconds": passed}
            for rank, (beat, passed) in sorted(silent.items())
        ]

    def _verdict_of(self, kind: Kind, cause: str) -> Verdict:
        """What the other ranks are told: little, as each of them reads it from all."""
        silent = {one["rank"] for one in self._silent(self._missed)}
        answering = [beat.rank for beat in self._all_beats() if beat.rank not in silent and beat.state not in LEFT]
        return {"kind": kind, "cause": cause, "reported_by": self._world.rank, "teller": min(answering)}

    def _all_beats(self) -> list[Beat]:
        """Last words of all ranks that are not done, this one among them, in their order."""
        others = [peer.beat for peer in self._beats.peers.values() if peer.beat is not None and peer.beat.state != "done"]
        return sorted([self._beat(), *others], key=lambda beat: beat.rank)

    def _end(self, verdict: Verdict) -> None:
        """Let all be written down, here and on the other ranks, for a bounded time; then end this process."""
        # Whatever holds Python's lock from now on cannot keep the process: that thread needs none.
        faulthandler.dump_traceback_later(4 * self._linger, exit=True, file=self._stacks)
        silent, beats = self._silent(self._missed), self._all_beats()
        ranks = {one["rank"] for one in silent}
        suspects = find_suspects(beats, ranks)
        details = {
            "cause": verdict["cause"],
            "reported_by": verdict["reported_by"],
            "silent": silent,
            "behind": [
                {"rank": one.rank, "host": one.host, "step": one.step, "phase": one.phase, "seconds": one.seconds}
                for one in beats
            ],
            "suspects": suspects,
        }
        report = functools.partial(self._tell, verdict["kind"], details)
        known = (verdict["cause"], describe_fault(beats, ranks, suspects))
        words = _aside(lambda: self._last_words(known, report if verdict["teller"] == self._world.rank else None))
        self._wait_for_all(words)
        teller = self._beats.peers.get(verdict["teller"])
        if verdict["reported_by"] == self._world.rank and teller and not (teller.beat and teller.beat.state == "written"):
            # The rank that was to tell has not done so.
            _aside(lambda: _attempt(report)).join(self._linger)
        os._exit(STOPPED_EARLY)  # The main thread may wait for ever: nothing gentler ends it.

    def _wait_for_all(self, words: threading.Thread) -> None:
        """Wait until this rank and all that answer have written down what they know, but no longer than need be."""
        connected = self._beats.connected
        until = time.monotonic() + self._linger
        pause = max(0.1, self._interval / 10)
        while time.monotonic() < until and not (connected and self._all_written()):
            if not words.is_alive():
                self._state = "written"
                if not self._beats.peers or (connected and not self._beats.connected):
                    break  # Nobody is there, or whoever keeps the store has ended already.
            self._beats.now()
            time.sleep(pause)
        words.join(max(0.0, until - time.monotonic()))
        if self._beats.peers:
            time.sleep(3 * pause)  # The store goes with rank 0: the others must have read that it has told.

    def _all_written(self) -> bool:
        """Whether this rank and all others that answer have written down what they know, and this one has said so."""
        told = self._beats.told
        return (
            told is not None
            and told.state == "written"
            and all(
                peer.silent >= self._missed or (peer.beat is not None and peer.beat.state != "runs")
                for peer in self._beats.peers.values()
            )
        )

    def _last_words(self, known: Sequence[str], report: Callable[[], None] | None) -> None:
        """Write stacks, event, collectives and one line, each as far as it can be done."""
        steps: list[Callable[[], object]] = [self._write_stacks, self._write_collectives, sys.stdout.flush]
        if report is not None:
            steps.insert(1, report)
        problems = [problem for problem in map(_attempt, steps) if problem]
        line = "; ".join(
            (
                f"swiftv2 (rank {self._world.rank}): {known[0]}",
                *known[1:],
                f"stacks of this rank: {self._files[0]}",
                *problems,
                "the same command goes on from the last checkpoint",
            )
        )
        os.write(2, (" ".join(line.splitlines()) + "\n").encode())

    def _write_stacks(self) -> None:
        # faulthandler writes with Python's lock held: to memory, as a disk may be what everything waits for.
        memory = os.memfd_create("stacks")
        faulthandler.dump_traceback(memory, all_threads=True)
        os.lseek(memory, 0, os.SEEK_SET)
        with open(memory, "rb") as stacks:  # noqa: PTH123 (a file descriptor, not a path)
            self._stacks.write(stacks.read())

    def _write_collectives(self) -> None:
        """What PyTorch's flight recorder holds: the last collectives, and which of them did not end."""
        on_gpu = self._world.device.type == "cuda"
        dump = getattr(distributed, "_dump_nccl_trace_json" if on_gpu else "_dump_fr_trace_json", None)
        record = dump() if dump is not None else b""
        if record and json.loads(record).get("entries"):
            self._files[1].write_bytes(record)


def _aside(action: Callable[[], object]) -> threading.Thread:
    """Run an action in a thread that keeps nobody waiting."""
    thread = threading.Thread(target=action, name="last words", daemon=True)
    thread.start()
    return thread


def _attempt(action: Callable[[], object]) -> str | None:
    """Run an action; what went wrong, in words, where something did."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 (the process is ending: the rest must still be done)
        return f"{type(error).__name__}: {error}"
    return None
