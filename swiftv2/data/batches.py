"""From the order of samples to batches: threads read and decode ahead, the contents depend on the positions alone."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftv2.config.data import NormalisationConfig
from swiftv2.config.model import MaskConfig
from swiftv2.data import keyed
from swiftv2.data.clips import ClipIndex, spread_clips
from swiftv2.data.masks import brain_cells, cell_counts, draw_mask
from swiftv2.data.order import SampleOrder, rank_positions
from swiftv2.data.sources import RunSource, StoredRun
from swiftv2.errors import RankError, SwiftError

Integers = NDArray[np.int64]
_CACHE_BYTES = 64 << 20
_TORCH_DTYPES = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
}


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed clips: B clips of T frames of V kept voxels."""

    bold: Tensor
    """(B, T, V) source numbers as stored."""
    slope: Tensor
    """(B,) float32: source units = number x slope + intercept."""
    intercept: Tensor
    """(B,) float32."""
    statistics: Tensor
    """(B, 6) float32: mean, std, min, max, median, interquartile range over the run's brain voxels, in source units."""
    voxel_mean: Tensor | None
    """(B, V) float32 mean of each voxel over its run; None unless the normalisation needs it."""
    voxel_std: Tensor | None
    """(B, V) float32 standard deviation of each voxel over its run; None unless the normalisation needs it."""
    brain: Tensor
    """(B, V) bool: the run's brain among the kept voxels."""
    mask: Tensor
    """(B, h, w, d, t) bool in mask cells, True = hidden."""
    sample: Tensor
    """(B,) int64 position in the global order; in evaluation the place in the list of evaluated clips."""
    epoch: Tensor
    """(B,) int64."""
    clip: Tensor
    """(B,) int64 clip id."""
    start: Tensor
    """(B,) int64 first frame."""
    tr: Tensor
    """(B,) float32 seconds between the frames of the run."""
    cohort: Tensor
    """(B,) int64 place in the sorted names of the store's cohorts."""
    subject: Tensor
    """(B,) int64 place in the sorted keys of the store's subjects."""
    weight: Tensor
    """(B,) float32: 1, and 0 for a clip that only fills the uneven end of an evaluation."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on a device."""
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return len(self.bold)


class RunTable:
    """What a batch says of its runs, as arrays over the runs of the store."""

    def __init__(self, runs: Sequence[StoredRun]) -> None:
        self.cohort_names = tuple(sorted({run.cohort for run in runs}))
        self.subject_keys = tuple(sorted({run.subject for run in runs}))
        cohorts = {name: i for i, name in enumerate(self.cohort_names)}
        subjects = {key: i for i, key in enumerate(self.subject_keys)}
        self.cohort = np.array([cohorts[run.cohort] for run in runs], dtype=np.int64)
        self.subject = np.array([subjects[run.subject] for run in runs], dtype=np.int64)
        self.slope = np.array([run.slope for run in runs], dtype=np.float32)
        self.intercept = np.array([run.intercept for run in runs], dtype=np.float32)
        self.tr = np.array([run.tr for run in runs], dtype=np.float32)
        self.statistics = np.array([tuple(run.statistics) for run in runs], dtype=np.float32).reshape(len(runs), 6)
        self.cohort_of_subject = np.zeros(len(self.subject_keys), dtype=np.int64)
        self.cohort_of_subject[self.subject] = self.cohort


class Request(NamedTuple):
    """One micro-batch to read."""

    clip: Integers
    """(B,) clip ids."""
    sample: Integers
    """(B,) positions."""
    epoch: Integers
    """(B,) epochs."""
    weight: NDArray[np.float32]
    """(B,)."""


class _Pending(NamedTuple):
    batch: Batch
    reads: list[Future[None]]


class Prefetcher:
    """Reads requested micro-batches with threads, some ahead, and hands them over in the order of the requests."""

    def __init__(
        self,
        source: RunSource,
        clips: ClipIndex,
        requests: Iterator[Request],
        mask: MaskConfig,
        normalisation: NormalisationConfig,
        mask_key: Callable[[int, int], np.random.Generator],
        *,
        threads: int,
        prefetch: int,
        pin: bool = False,
    ) -> None:
        self.table = RunTable(source.runs)
        self.wait_seconds = 0.0
        """Time that the consumer has waited for data so far."""
        self._source, self._clips, self._requests = source, clips, requests
        self._mask, self._mask_key = mask, mask_key
        shape = source.grid.shape
        self._cells = cell_counts(shape, clips.frames, mask.patch_size)
        self._brain_cells = brain_cells(source.voxels, shape, mask.patch_size)
        self._dtype = common_dtype({str(source.runs[i].dtype) for i in np.unique(clips.run)})
        self._with_voxel_statistics = normalisation.kind == "per_voxel" and normalisation.scope == "run"
        self._pin = pin
        # Small cohorts come back to the same runs all the time; a large one never fills more than this.
        entries = max(1, _CACHE_BYTES // max(1, len(source.voxels) * (9 if self._with_voxel_statistics else 1)))
        self._brain = lru_cache(entries)(source.brain)
        self._voxel_mean = lru_cache(entries)(source.voxel_mean)
        self._voxel_std = lru_cache(entries)(source.voxel_std)
        self._prefetch = prefetch
        self._pending: deque[_Pending] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-clips")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            StopIteration: no request is left.
            SwiftError: a clip cannot be read; names run and frames.
        """
        begin = time.perf_counter()
        self._submit(self._prefetch)
        if not self._pending:
            raise StopIteration
        pending = self._pending.popleft()
        self._submit(self._prefetch)
        for read in pending.reads:
            read.result()
        self.wait_seconds += time.perf_counter() - begin
        return pending.batch

    def close(self) -> None:
        """Drop what was read ahead and end the threads; a second call does nothing."""
        self._pending.clear()
        self._requests = iter(())
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _submit(self, ahead: int) -> None:
        while len(self._pending) < ahead and (request := next(self._requests, None)) is not None:
            batch = self._allocate(request)
            reads = [self._pool.submit(self._read, batch, i) for i in range(len(batch))]
            self._pending.append(_Pending(batch, reads))

    def _allocate(self, request: Request) -> Batch:
        """A batch whose small parts are filled in and whose large ones wait for the threads."""
        size, voxels = len(request.clip), len(self._source.voxels)
        run, table = self._clips.run[request.clip], self.table
        statistics = (self._empty((size, voxels), torch.float32) for _ in range(2))
        mean, std = statistics if self._with_voxel_statistics else (None, None)
        return Batch(
            bold=self._empty((size, self._clips.frames, voxels), self._dtype),
            slope=torch.from_numpy(table.slope[run]),
            intercept=torch.from_numpy(table.intercept[run]),
            statistics=torch.from_numpy(table.statistics[run]),
            voxel_mean=mean,
            voxel_std=std,
            brain=self._empty((size, voxels), torch.bool),
            mask=self._empty((size, *self._cells), torch.bool),
            sample=torch.from_numpy(request.sample),
            epoch=torch.from_numpy(request.epoch),
            clip=torch.from_numpy(request.clip),
            start=torch.from_numpy(self._clips.start[request.clip]),
            tr=torch.from_numpy(table.tr[run]),
            cohort=torch.from_numpy(table.cohort[run]),
            subject=torch.from_numpy(table.subject[run]),
            weight=torch.from_numpy(request.weight),
        )

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin)

    def _read(self, batch: Batch, place: int) -> None:
        """Fill one clip into its place of the batch; runs in a thread."""
        clip, epoch, start = int(batch.clip[place]), int(batch.epoch[place]), int(batch.start[place])
        run, frames, stride = int(self._clips.run[clip]), self._clips.frames, self._clips.stride
        rng = self._mask_key(epoch, clip)
        batch.mask[place].numpy()[...] = draw_mask(self._mask, self._cells, self._brain_cells, rng)
        try:
            batch.bold[place].numpy()[...] = self._source.read_bold(run, start, frames, stride)
            batch.brain[place].numpy()[...] = self._brain(run)
            if batch.voxel_mean is not None and batch.voxel_std is not None:
                batch.voxel_mean[place].numpy()[...] = self._voxel_mean(run)
                batch.voxel_std[place].numpy()[...] = self._voxel_std(run)
        except Exception as error:
            key, last = self._source.runs[run].key, start + (frames - 1) * stride
            if isinstance(error, SwiftError) and key in str(error):
                raise RankError(str(error)) from error
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RankError(
                f"run {key}, frames {start} to {last}: cannot be read ({reason}); `swiftv2 store verify` tells what is damaged"
            ) from error


class BatchReader(Prefetcher):
    """One rank's micro-batches of a training, without end, from a number of samples consumed on.

    Over all ranks, step s of a run holds the samples at positions [consumed, consumed + global batch) of the order, for
    every world size and accumulation; masks are keyed by (seed, "mask", epoch, clip).
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
        threads: int = 2,
        prefetch: int = 2,
        pin: bool = False,
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
            threads: threads that read and decode.
            prefetch: micro-batches in flight or waiting beside the one in use.
            pin: whether batches lie in pinned memory, for asynchronous copies to a GPU.
        """
        if order.clips != len(clips):
            raise ValueError(f"the order is of {order.clips} clips, the index of {len(clips)}")
        self._first, self._delivered = samples_consumed, 0
        self._accumulation, self._global_batch = accumulation, micro_batch * accumulation * world_size

        def requests() -> Iterator[Request]:
            first, weight = samples_consumed, np.ones(micro_batch, dtype=np.float32)
            while True:
                for positions in rank_positions(first, micro_batch, accumulation, rank, world_size):
                    yield Request(order.clips_at(positions), positions, order.epochs_at(positions), weight.copy())
                first += self._global_batch

        super().__init__(
            source,
            clips,
            requests(),
            mask,
            normalisation,
            lambda epoch, clip: keyed.generator(seed, "mask", epoch, clip),
            threads=threads,
            prefetch=prefetch,
            pin=pin,
        )

    def __next__(self) -> Batch:
        """The next micro-batch; see `Prefetcher`."""
        batch = super().__next__()
        self._delivered += 1
        return batch

    @property
    def samples_consumed(self) -> int:
        """Samples of all ranks in the steps whose micro-batches have all been handed over: where to go on from."""
        return self._first + self._delivered // self._accumulation * self._global_batch


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
    threads: int = 2,
    prefetch: int = 2,
    pin: bool = False,
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
        threads: threads that read and decode.
        prefetch: batches in flight or waiting beside the one in use.
        pin: whether batches lie in pinned memory.

    Returns:
        An iterator of batches, to be closed (or used as a context manager).
    """
    chosen = spread_clips(RunTable(source.runs).subject[clips.run], max_clips)
    slots = -(-len(chosen) // world_size)
    places = rank + world_size * np.arange(slots)
    weight = (places < len(chosen)).astype(np.float32)
    places = np.minimum(places, len(chosen) - 1)

    def requests() -> Iterator[Request]:
        for begin in range(0, slots, batch):
            here = slice(begin, begin + batch)
            yield Request(chosen[places[here]], places[here], np.zeros_like(places[here]), weight[here])

    return Prefetcher(
        source,
        clips,
        requests(),
        mask,
        normalisation,
        lambda _, clip: keyed.generator(seed, "evaluate", clip),
        threads=threads,
        prefetch=prefetch,
        pin=pin,
    )


def common_dtype(dtypes: set[str]) -> torch.dtype:
    """The torch dtype of batches from runs of these numpy dtypes: integers as stored (unsigned 16-bit ones widened).

    Runs of different formats meet in float32, as does everything that torch or the device has no integer for.
    """
    names = {np.dtype(name).name for name in dtypes}
    found = {_TORCH_DTYPES.get(name, torch.float32) for name in names}
    return found.pop() if len(found) == 1 else torch.float32
