"""What ranks tell one another of themselves every few seconds, from a thread, while training goes on or hangs."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.distributed import DistNetworkError, PrefixStore, Store  # type: ignore[attr-defined]  # public, but not in __all__

from swiftv2.engine.launch import World

LEFT = ("failed", "lost")
"""States of ranks that left, but not as they should."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    step: int
    phase: str
    seconds: float
    """Seconds since it came there."""
    state: str = "runs"
    """runs; left, as done, failed by an error of its own, or lost where others were; or written, about to end so."""
    stop: str | None = None
    """What asked to stop, on this rank or another."""
    end: dict[str, Any] | None = None
    """Why the run ends, where it does."""


@dataclass(frozen=True)
class Peer:
    """What is known of another rank."""

    beat: Beat | None = None
    """Its last beat; None before the first."""
    silent: float = 0.0
    """Seconds for which the store has answered but nothing new of this rank was there."""
    text: bytes = field(default=b"", repr=False)


class Beats:
    """A thread that publishes this rank's beat and reads those of the others.

    A call to a store whose server is stopped (not dead) waits for as long as that lasts, whatever the store's timeout: so
    nothing but this thread calls it, on a connection of its own, and others look at `rounds` to see whether it gets on.
    """

    def __init__(self, world: World, prefix: str, interval: float, own: Callable[[], Beat]) -> None:
        """Nothing is published before `start`.

        Args:
            world: this process among the ranks; alone there is nobody to tell.
            prefix: what keeps the keys apart from those of other attempts in the same store.
            interval: seconds between beats.
            own: what to publish.
        """
        self.peers: Mapping[int, Peer] = {rank: Peer() for rank in range(world.size) if rank != world.rank}
        """All other ranks; replaced as a whole, never changed."""
        self.rounds = 0
        """How often the store has answered."""
        self.told: Beat | None = None
        """What of this rank is surely in the store."""
        self._world = world
        self._prefix = prefix
        self._interval = interval
        self._own = own
        self._count = 0
        self._looked = time.monotonic()
        self._wake = threading.Event()
        self._last = False
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self.peers:
            self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the thread goes on: it ends where the store's server is gone for good."""
        return self._thread.is_alive()

    def now(self) -> None:
        """Beat at once."""
        self._wake.set()

    def finish(self, patience: float) -> None:
        """Publish a last beat and end; not waited for longer than `patience` seconds."""
        self._last = True
        self._wake.set()
        if self.peers:
            self._thread.join(patience)

    def _run(self) -> None:
        store: Store | None = None
        while True:
            last = self._last
            try:
                store = store or PrefixStore(self._prefix, self._world.connect())
                self._exchange(store)
            except DistNetworkError:
                return  # A connection that broke stays broken.
            except RuntimeError:
                pass  # No answer in time: whoever waits for one sees that none came.
            if last:
                return
            self._wake.wait(self._interval)
            self._wake.clear()

    def _exchange(self, store: Store) -> None:
        own = self._own()
        self._count += 1
        store.set(str(own.rank), json.dumps([self._count, asdict(own)]))
        # Reading a key that is not there yet would wait for it.
        there = [rank for rank, peer in self.peers.items() if peer.beat or store.check([str(rank)])]
        texts = dict(zip(there, store.multi_get([str(rank) for rank in there]), strict=True)) if there else {}
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._interval), now
        self.peers = {rank: _renewed(peer, texts.get(rank, b""), passed) for rank, peer in self.peers.items()}
        self.told = own
        self.rounds += 1


def _renewed(peer: Peer, text: bytes, passed: float) -> Peer:
    if text == peer.text:
        return Peer(peer.beat, peer.silent + passed, text)
    return Peer(Beat(**json.loads(text)[1]), 0.0, text)
