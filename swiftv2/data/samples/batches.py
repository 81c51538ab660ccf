"""From the order of samples to batches: threads read and decode ahead, the contents depend on the positions alone."""

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.data import NormalisationConfig
from swiftv2.config.model import MaskConfig
from swiftv2.data import keyed
from swiftv2.data.samples.batch import Batch, RunTable
from swiftv2.data.samples.clips import ClipIndex, spread_clips
from swiftv2.data.samples.order import Exclusion, SampleOrder, rank_positions
from swiftv2.data.samples.patience import ClosedError, Patience
from swiftv2.data.samples.reading import READING, BadClipError, ClipReader, MaskKey, Reading, Stretch
from swiftv2.data.samples.sources import RunSource
from swiftv2.errors import InterruptedRunError, RankError, SwiftError

Integers = NDArray[np.int64]


class Request(NamedTuple):
    """One micro-batch to read."""

    clip: Integers
    """(B,) clip ids."""
    turn: Integers
    """(B,) passes over the clips' cohorts."""
    sample: Integers
    """(B,) positions."""
    weight: NDArray[np.float32]
    """(B,)."""
    step_first: int
    """First position of the step that the micro-batch belongs to."""


class Fault(NamedTuple):
    """A clip that was found unusable, and from which position on it is left out."""

    clip: int
    position: int
    run: str
    first: int
    """First frame of the clip."""
    last: int
    """Last frame of the clip."""
    reason: str


class _Pending(NamedTuple):
    batch: Batch
    bytes: int
    reads: list[Future[list[Fault]]]


class Prefetcher:
    """Reads requested micro-batches with threads, some ahead, and hands them over in the order of the requests.

    Reads of a source that cannot be reached wait for it. `close` may be called from another thread than `next`.
    """

    def __init__(
        self,
        source: RunSource,
        clips: ClipIndex,
        requests: Iterator[Request],
        mask: MaskConfig,
        normalisation: NormalisationConfig,
        mask_key: MaskKey,
        *,
        reading: Reading = READING,
        most_faults: int | None = None,
    ) -> None:
        self._reader = ClipReader(source, clips, mask, normalisation, mask_key, reading)
        self.table = self._reader.table
        self._requests = requests
        self._on_bad_clip = reading.on_bad_clip
        self._prefetch, self._most_bytes = reading.prefetch, reading.prefetch_mb << 20
        self._most_faults = most_faults
        self._patience = Patience(reading.patience_seconds, reading.absence)
        self._lock, self._queue = threading.Lock(), threading.Lock()
        self._found: set[int] = set()
        self._faults: list[Fault] = []
        self._pending: deque[_Pending] = deque()
        self._pool = ThreadPoolExecutor(reading.threads, thread_name_prefix="read-clips")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            StopIteration: no request is left, or the reader is closed.
            SwiftError: a clip cannot be read; names run and frames.
        """
        with self._queue:
            self._submit()
            if not self._pending:
                raise StopIteration
            pending = self._pending.popleft()
            self._submit()
        try:
            for read in pending.reads:
                self._faults += read.result()
        except (ClosedError, CancelledError):
            raise StopIteration from None
        return pending.batch

    def ready(self) -> bool:
        """Whether the next micro-batch is there, so that `next` would not wait."""
        with self._queue:
            return bool(self._pending) and all(read.done() for read in self._pending[0].reads)

    def faults(self) -> list[Fault]:
        """What was found unusable in the batches handed over since this was last asked (`quarantine`)."""
        found, self._faults = self._faults, []
        return found

    def close(self) -> None:
        """Drop what was read ahead, end all waiting, and end the threads; a second call does nothing."""
        self._patience.close()
        with self._queue:
            self._pending.clear()
            self._requests = iter(())
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def stretch(self, clip: int) -> Stretch:
        """Where a clip lies."""
        return self._reader.stretch(clip)

    def _submit(self) -> None:
        """Read ahead, as many micro-batches and as many bytes as are allowed; one always."""
        while len(self._pending) < self._prefetch:
            ahead = sum(pending.bytes for pending in self._pending)
            if self._pending and ahead + self._pending[-1].bytes > self._most_bytes:
                return
            request = next(self._requests, None)
            if request is None:
                return
            batch = self._reader.allocate(request.clip, request.turn, request.sample, request.weight)
            reads = [self._pool.submit(self._read, batch, place, request) for place in range(len(batch))]
            self._pending.append(_Pending(batch, self._reader.batch_bytes(len(batch)), reads))

    def _read(self, batch: Batch, place: int, request: Request) -> list[Fault]:
        """Fill one place of the batch, whatever it takes; says which clips were of no use. Runs in a thread."""
        faults: list[Fault] = []
        while True:
            try:
                self._patience.read(lambda: self._reader.fill(batch, place))
            except InterruptedRunError:
                raise
            except SwiftError as error:
                raise RankError(str(error)) from error
            except BadClipError as bad:
                if self._on_bad_clip == "fail":
                    raise RankError(str(bad)) from bad
                fault = Fault(bad.clip, request.step_first, *bad.stretch, bad.reason)
                if batch.weight[place] > 0:
                    faults.append(fault)
                    self._count(fault)
                if not self._replace(batch, place, fault):
                    return faults
            else:
                return faults

    def _count(self, fault: Fault) -> None:
        """Stop where a rank alone finds more faults than may be left out: then it is no matter of single clips."""
        with self._lock:
            self._found.add(fault.clip)
            if self._most_faults is not None and len(self._found) > self._most_faults:
                raise RankError(
                    f"{len(self._found)} clips of no use on this rank, more than data.quarantine_limit allows; the last, "
                    f"of run {fault.run}: {fault.reason}"
                )

    def _replace(self, batch: Batch, place: int, fault: Fault) -> bool:
        """Let a place whose clip is of no use count for nothing; there is nothing else to be read."""
        del fault
        self._reader.blank(batch, place)
        return False


class BatchReader(Prefetcher):
    """One rank's micro-batches of a training, without end, from a number of samples consumed on.

    Over all ranks, step s of a run holds the samples at positions [consumed, consumed + global batch) of the order, for
    every world size and accumulation; masks are keyed by (seed, "mask", pass, clip).

    Under `on_bad_clip=quarantine` an unusable clip is replaced as an exclusion from its step on replaces it. Whether a
    clip is unusable lies in its bytes, so all ranks come to the same samples whoever reads first; `faults` tells what was
    found, and `exclude` spares the reading of what other ranks found.
    """

    def __init__(
        self,
        source: RunSource,
        clips: ClipIndex,
        order: SampleOrder,
        mask: MaskConfig,
        normalisation: NormalisationConfig,
        *,
        seed: int,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        samples_consumed: int = 0,
        reading: Reading = READING,
        most_faults: int | None = None,
    ) -> None:
        """Open the reader; nothing is read before the first `next`.

        Args:
            source: the store.
            clips: clips of the training split.
            order: order of those clips.
            mask: what is hidden.
            normalisation: decides whether per-voxel statistics come along.
            seed: seed of the masks.
            micro_batch: clips of one batch.
            accumulation: micro-batches of one step.
            rank: which of the ranks.
            world_size: how many ranks.
            samples_consumed: samples of all ranks before the first step: the state of an earlier run.
            reading: threads, what is read ahead, and what is done about unusable clips.
            most_faults: different clips of no use that this rank may find; any number when None.
        """
        if order.clips != len(clips):
            raise ValueError(f"the order is of {order.clips} clips, the index of {len(clips)}")
        global_batch = micro_batch * accumulation * world_size
        self.order = order

        def requests() -> Iterator[Request]:
            first, weight = samples_consumed, np.ones(micro_batch, dtype=np.float32)
            while True:
                for positions in rank_positions(first, micro_batch, accumulation, rank, world_size):
                    with self._lock:
                        chosen, turns = order.samples_at(positions)
                    yield Request(chosen, turns, positions, weight.copy(), first)
                first += global_batch

        super().__init__(
            source,
            clips,
            requests(),
            mask,
            normalisation,
            lambda turn, clip: keyed.generator(seed, "mask", turn, clip),
            reading=reading,
            most_faults=most_faults,
        )

    def exclude(self, exclusions: Iterable[Exclusion]) -> None:
        """Take exclusions that all ranks agreed on into the order."""
        with self._lock:
            self.order.exclude(exclusions)

    def _replace(self, batch: Batch, place: int, fault: Fault) -> bool:
        """Put in place of a clip what the order has there once the clip is excluded; that one is to be read."""
        with self._lock:
            self.order.exclude([Exclusion(fault.clip, fault.position)])
            clips, turns = self.order.samples_at(batch.sample[place : place + 1].numpy())
        self._reader.replace(batch, place, int(clips[0]), int(turns[0]))
        return True


def evaluated_clips(table: RunTable, clips: ClipIndex, max_clips: int | None, left_out: Collection[int] = ()) -> Integers:
    """Clips of an evaluation, ascending (clips,) ids: `max_clips` at most, spread evenly over subjects."""
    usable = np.setdiff1d(np.arange(len(clips)), np.fromiter(left_out, dtype=np.int64, count=len(left_out)))
    return usable[spread_clips(table.subject[clips.run[usable]], max_clips)]


def evaluation_batches(
    source: RunSource,
    clips: ClipIndex,
    mask: MaskConfig,
    normalisation: NormalisationConfig,
    *,
    seed: int,
    batch: int,
    max_clips: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    reading: Reading = READING,
    left_out: Collection[int] = (),
) -> Prefetcher:
    """One rank's batches of an evaluation: the same clips and masks whenever it is asked.

    Clips are dealt to the ranks in turn. Every rank gets as many batches of the same sizes as every other; where the
    clips do not go round, the last one is a repetition with `weight` 0. So each clip counts once, on one rank.

    Args:
        source: the store.
        clips: clips of the held-out subjects.
        mask: what is hidden; masks are keyed by (seed, "evaluate", clip).
        normalisation: decides whether per-voxel statistics come along.
        seed: seed of the masks.
        batch: clips of one batch; the last one may hold fewer.
        max_clips: clips at most, spread evenly over subjects; all when None.
        rank: which of the ranks.
        world_size: how many ranks.
        reading: threads, what is read ahead, and what is done about unusable clips; `faults` tells those that got weight 0.
        left_out: clips that are not evaluated, such as those of withdrawn runs; not all of them.

    Returns:
        An iterator of batches, to be closed (or used as a context manager).
    """
    table = reading.table or RunTable(source.runs)
    chosen = evaluated_clips(table, clips, max_clips, left_out)
    slots = -(-len(chosen) // world_size)
    places = rank + world_size * np.arange(slots)
    weight = (places < len(chosen)).astype(np.float32)
    places = np.minimum(places, len(chosen) - 1)

    def requests() -> Iterator[Request]:
        for begin in range(0, slots, batch):
            here = slice(begin, begin + batch)
            yield Request(chosen[places[here]], np.zeros_like(places[here]), places[here], weight[here], 0)

    return Prefetcher(
        source,
        clips,
        requests(),
        mask,
        normalisation,
        lambda _, clip: keyed.generator(seed, "evaluate", clip),
        reading=replace(reading, table=table),
    )
