"""A checkup among ranks: each measures, none hangs the others, and rank 0 judges what all have told.

Ranks speak through a key-value store, not through collectives: a rank whose measurement fails says so, one that says nothing
any more is named by its missing beat, and a measurement that never ends is left behind in its thread.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in __all__

from swiftv2.engine.place import Place
from swiftv2.errors import RankError, SwiftError, UsageError

Verdict = Literal["well", "not known", "warning", "sick"]
Figures = dict[str, Any]
Remark = tuple[Verdict, str]

MEET_SECONDS = 300.0
MEASURE_SECONDS = 120.0
SILENT_SECONDS = 30.0
GRACE_SECONDS = 10.0
"""How long ranks go on waiting in a joint measurement after one has said that it failed there."""
BEAT_SECONDS = 0.5
LOOK_SECONDS = 2.0
UNTOLD_SECONDS = 1.0
LONG_WORDS = 100
_PAUSES = (0.005, 0.02, 0.08, 0.2, 0.2, 0.2, 0.2)


@dataclass(frozen=True)
class Answer:
    """What a rank has measured."""

    rank: int
    host: str
    figures: Figures


@dataclass(frozen=True)
class Opinion:
    """What the figures of all ranks mean."""

    what: str
    """One sentence about all of them."""
    remarks: Mapping[int, Remark] = field(default_factory=dict)
    """By rank, what is not well there."""
    verdict: Verdict = "well"
    """Of ranks without a remark."""


Judge = Callable[[Sequence[Answer]], Opinion]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    what: str
    ranks: list[dict[str, Any]]
    """One object a rank: rank, host, verdict, what, figures."""
    shared: bool = False
    """Whether it is no matter of a single host where every rank is sick by it, such as a store that is not there."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "verdict": self.verdict, "what": self.what, "ranks": self.ranks}

    def sick_hosts(self) -> set[str]:
        """Hosts that are better left out; none where all are sick alike, since then it is no matter of a host."""
        sick = {one["host"] for one in self.ranks if one["verdict"] == "sick"}
        hosts = {one["host"] for one in self.ranks}
        everywhere = all(one["verdict"] == "sick" for one in self.ranks)
        return set() if everywhere and (self.shared or len(hosts) > 1) else sick - {""}


def own_host() -> str:
    """Name of this host, as Slurm knows it where Slurm started the process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Examination:
    """This rank's part in a checkup.

    Args:
        place: this process among the ranks.
        store: between all of them, on a connection that nothing else uses.
        tell: called on rank 0 with the name of a check that begins, where it takes a second or waits for other ranks.
    """

    def __init__(self, place: Place, store: Store, tell: Callable[[str], None]) -> None:
        self.rank, self.size, self.host = place.rank, place.size, own_host()
        self.checks: list[Check] = []
        """What was found; on rank 0 only."""
        self.separated = False
        """Whether ranks have lost each other, so that nothing can be measured together any more."""
        self.ended = False
        """Whether the launcher has told all ranks to end."""
        self.stuck = False
        """Whether a measurement of this rank still hangs in its thread: then only `os._exit` ends the process for sure."""
        self._store, self._tell = store, tell
        self._number, self._beats = 0, 0
        self._untold: tuple[str, float] | None = None
        self._dead: set[int] = set()
        self._hosts: dict[int, str] = {}
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._look_again = 0.0
        self._terminated: float | None = None
        self._former_handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._beat()

    def ask(
        self,
        name: str,
        measure: Callable[[], Figures],
        judge: Judge,
        *,
        together: bool = False,
        shared: bool = False,
        seconds: float = MEASURE_SECONDS,
    ) -> Verdict:
        """Measure on every rank and judge on rank 0 (called by every rank, in the same order).

        Args:
            name: of the check.
            measure: gives plain values; whatever it raises makes this rank sick.
            judge: called on rank 0 with the answers of the ranks that measured, one at least.
            together: whether `measure` waits for other ranks.
            shared: see `Check.shared`.
            seconds: after which a measurement counts as hung.

        Returns:
            The verdict, on every rank.

        Raises:
            RankError: rank 0 is gone.
            UsageError: on every rank, where the measurement of each says that the configuration is wrong.
        """
        if self.ended or (together and self.separated):
            return self.skip(name, "the ranks were told to end" if self.ended else "the ranks lost each other")
        self._number += 1
        self._untold = (name, time.monotonic() + (0.0 if together else UNTOLD_SECONDS))
        self._say()
        own = self._measure(measure, seconds, together=together)
        self._put(f"answer/{self.rank}", own)
        if self.rank == 0:
            self._put("next", self._conclude(name, self._collect(seconds), judge, together=together, shared=shared))
        following = self._follow("next")
        self._untold = None
        self.separated, self.ended = following["separated"], following["ended"]
        if following["usage"] is not None:
            self.close()
            raise UsageError(following["usage"])
        verdict: Verdict = following["verdict"]
        return verdict

    def skip(self, name: str, why: str) -> Verdict:
        """Note that something was not looked at."""
        if self.rank == 0:
            self.checks.append(Check(name, "not known", f"not looked at: {why}", []))
        return "not known"

    @property
    def well(self) -> bool:
        """Whether nothing that was found is sick and the checkup came to its end; on rank 0."""
        return not self.ended and all(check.verdict != "sick" for check in self.checks)

    def close(self) -> bool:
        """End the checkup; rank 0 has told by then what it found, since launchers end all ranks when one ends badly.

        Returns:
            `well`, on every rank.
        """
        self._number += 1
        if self.rank == 0:
            self._put("next", {"well": self.well})
        well = bool(self._follow("next")["well"])
        if self.size > 1:
            self._put(f"left/{self.rank}", {})
            if self.rank == 0:  # It may be the one that keeps the store: it leaves last.
                self._wait_for_leavers()
        if self._former_handler is not None:
            signal.signal(signal.SIGTERM, self._former_handler)
        return well

    def _measure(self, measure: Callable[[], Figures], seconds: float, *, together: bool) -> dict[str, Any]:
        """This rank's outcome: figures, or an error and of what kind it is."""
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome["figures"] = measure()
            except Exception as error:  # noqa: BLE001 (whatever it is, it is this rank's answer)
                outcome.update(_failure(error))

        thread = threading.Thread(target=work, name="checkup", daemon=True)
        thread.start()
        began, failed_at = time.monotonic(), None
        while True:
            thread.join(BEAT_SECONDS)
            now = time.monotonic()
            if not thread.is_alive():
                break
            self._beat()
            if together and failed_at is None:
                if self.rank == 0 and self._silent(set(range(1, self.size)) - self._dead):
                    self._put("failed", {})
                failed_at = now if self._there([self._key("failed")]) else None
            if now - began > seconds:
                outcome = {"error": f"no end after {seconds:.0f} s", "kind": "lost" if together else "own"}
            elif self._terminated is not None or (failed_at is not None and now - failed_at > GRACE_SECONDS):
                outcome = {"error": "waited in vain for another rank", "kind": "lost"}
            else:
                continue
            self.stuck = True
            return dict(outcome)
        if together and "error" in outcome:
            self._put("failed", {})
        return outcome

    def _collect(self, seconds: float) -> dict[int, dict[str, Any]]:
        """Outcomes by rank; of a rank that says nothing, that."""
        missing = set(range(self.size)) - self._dead
        outcomes: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + (MEET_SECONDS if self._number == 1 else seconds) + SILENT_SECONDS
        while missing:
            self._wait([f"answer/{rank}" for rank in missing])
            come = {rank for rank in missing if self._there([self._key(f"answer/{rank}")])}
            outcomes |= {rank: self._get(f"answer/{rank}") for rank in come}
            missing -= come
            silent = self._silent(missing)
            if missing and time.monotonic() > deadline:
                silent = missing
            for rank in silent:
                text = "is silent: its process died, is stopped, or never came"
                outcomes[rank] = {"error": text, "kind": "silent"}
            self._dead |= silent
            missing -= silent
            if missing and self._terminated is not None and time.monotonic() - self._terminated > 2 * GRACE_SECONDS:
                outcomes |= {rank: {"error": "told to end by the launcher", "kind": "lost"} for rank in missing}
                missing = set()
        return outcomes

    def _silent(self, ranks: set[int]) -> set[int]:
        """Ranks that were there and beat no more; asked often, it looks every few seconds."""
        now = time.monotonic()
        silent: set[int] = set()
        if now < self._look_again:
            return silent
        self._look_again = now + LOOK_SECONDS
        # When the launcher ends the ranks because one has died, the others go on beating for a while.
        patience = SILENT_SECONDS if self._terminated is None else GRACE_SECONDS / 2
        for rank in ranks:
            if not self._there([f"beat/{rank}"]):
                continue
            beat = self._store.get(f"beat/{rank}")
            last, since = self._seen.get(rank, (b"", now))
            if last != beat:
                self._seen[rank] = (beat, now)
            elif now - since > patience:
                silent.add(rank)
        return silent

    def _conclude(
        self, name: str, outcomes: dict[int, dict[str, Any]], judge: Judge, *, together: bool, shared: bool
    ) -> dict[str, Any]:
        """Judge, note the check, and tell the other ranks how to go on."""
        self._hosts |= {rank: one["host"] for rank, one in outcomes.items() if "host" in one}
        hosts = {rank: self._hosts.get(rank, "") for rank in outcomes}
        measured = [rank for rank in sorted(outcomes) if "figures" in outcomes[rank]]
        answers = [Answer(rank, hosts[rank], outcomes[rank]["figures"]) for rank in measured]
        failed = {rank: one for rank, one in outcomes.items() if "error" in one}
        opinion = judge(answers) if answers else Opinion("")
        blamed = any(one["kind"] != "lost" for one in failed.values())
        remarks = dict(opinion.remarks)
        for rank, one in failed.items():
            remarks[rank] = ("not known" if blamed and one["kind"] == "lost" else "sick", one["error"])
        self.checks.append(make_check(name, hosts, answers, Opinion(opinion.what, remarks, opinion.verdict), shared=shared))
        usage = {one["error"] for one in failed.values() if one["kind"] == "usage"}
        return {
            "verdict": self.checks[-1].verdict,
            "separated": self.separated or bool(self._dead) or (together and bool(failed)),
            "ended": self._terminated is not None,
            "usage": usage.pop() if len(usage) == 1 and all(one.get("kind") == "usage" for one in outcomes.values()) else None,
        }

    def _follow(self, name: str) -> dict[str, Any]:
        while not self._wait([name]):
            pass
        return self._get(name)

    def _wait_for_leavers(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        others = [f"left/{rank}" for rank in range(self.size) if rank not in self._dead]
        while time.monotonic() < deadline and not self._wait(others):
            pass

    def _wait(self, names: Sequence[str]) -> bool:
        """Wait about a second for keys; says whether all are there.

        Raises:
            RankError: who keeps the store is gone.
        """
        self._beat()
        keys = [self._key(name) for name in names]
        # The store's own `wait` writes warnings whenever its time is over.
        for pause in _PAUSES:
            if self._there(keys):
                return True
            time.sleep(pause)
        return False

    def _say(self) -> None:
        if self._untold is not None and time.monotonic() >= self._untold[1]:
            if self.rank == 0:
                self._tell(self._untold[0])
            self._untold = None

    def _beat(self) -> None:
        self._say()
        self._beats += 1
        with self._kept():
            self._store.set(f"beat/{self.rank}", str(self._beats))

    def _there(self, keys: Sequence[str]) -> bool:
        with self._kept():
            return bool(self._store.check(list(keys)))

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except dist.DistNetworkError as error:
            raise RankError(f"rank {self.rank} on {self.host} lost rank 0, or the launcher, in the checkup") from error

    def _key(self, name: str) -> str:
        return f"{self._number}/{name}"

    def _put(self, name: str, value: Mapping[str, Any]) -> None:
        self._store.set(self._key(name), json.dumps({"host": self.host, **value}))

    def _get(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._store.get(self._key(name)))
        return value

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Go on for a little: rank 0 has to tell who died, and the others have to be told apart from that one."""
        del number, frame
        self._terminated = time.monotonic()


def make_check(
    name: str, hosts: Mapping[int, str], answers: Sequence[Answer], opinion: Opinion, *, shared: bool = False
) -> Check:
    """A check from the opinion on it; ranks that say the same are told in one breath."""
    figures = {answer.rank: answer.figures for answer in answers}
    verdicts: list[Verdict] = []
    ranks = []
    alike: dict[Remark, list[int]] = {}
    for rank in sorted(hosts):
        verdict, text = opinion.remarks.get(rank, (opinion.verdict, None))
        verdicts.append(verdict)
        ranks.append({"rank": rank, "host": hosts[rank], "verdict": verdict, "what": text, "figures": figures.get(rank, {})})
        if text is not None:
            alike.setdefault((verdict, text), []).append(rank)
    worst = max(verdicts, key=_severity, default=opinion.verdict)
    order = sorted(alike.items(), key=lambda one: (-_severity(one[0][0]), one[1]))
    told = [f"{name_ranks(members, hosts)}: {text}" for (_, text), members in order]
    return Check(name, worst, "; ".join([*told, opinion.what] if opinion.what else told), ranks, shared)


def _severity(verdict: Verdict) -> int:
    return get_args(Verdict).index(verdict)


def name_ranks(ranks: Sequence[int], hosts: Mapping[int, str]) -> str:
    """Ranks and their hosts, in words; of many the first and how many more."""
    names = list(dict.fromkeys(hosts[rank] or "a host not known" for rank in ranks))
    who = f"{'ranks' if len(ranks) > 1 else 'rank'} {_some(list(map(str, ranks)))}"
    return f"{who} on {_some(names)}"


def _some(words: Sequence[str], shown: int = 8) -> str:
    return ", ".join(words[:shown]) + (f" and {len(words) - shown} more" if len(words) > shown else "")


def compare(values: Mapping[int, float]) -> dict[int, float]:
    """Each rank's value as a share of the median of the others'; nothing where there is no other."""
    return {
        rank: value / statistics.median(other for one, other in values.items() if one != rank)
        for rank, value in values.items()
        if len(values) > 1
    }


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, SwiftError):
        return {"error": str(error), "kind": "usage" if isinstance(error, UsageError) else "own"}
    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if isinstance(error, OSError) and error.strerror:
        text = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}"
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
        return {"error": f"lost touch with another rank ({text[:LONG_WORDS]})", "kind": "lost"}
    return {"error": text, "kind": "own"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the host, had no room for what was asked."""
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in said or "not enough memory" in said
