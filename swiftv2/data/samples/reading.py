"""Filling one clip of a batch: frames, mask, brain, statistics, and whether the clip can be used at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from swiftv2.config.data import NormalisationConfig
from swiftv2.config.model import MaskConfig
from swiftv2.data.samples.batch import Batch, RunTable, common_dtype
from swiftv2.data.samples.clips import ClipIndex
from swiftv2.data.samples.masks import brain_cells, cell_counts, draw_mask
from swiftv2.data.samples.patience import Absence
from swiftv2.data.samples.sources import RunInfo, RunSource
from swiftv2.data.samples.tempo import clip_duration, is_resampled, time_weights
from swiftv2.errors import DamagedError

_CACHE_BYTES = 64 << 20
Integers = NDArray[np.int64]
MaskKey = Callable[[int, int], np.random.Generator]
OnBadClip = Literal["fail", "quarantine"]


@dataclass(frozen=True)
class Reading:
    """How a rank reads clips, whichever these are.

    Attributes:
        threads: threads that read and decode.
        prefetch: micro-batches in flight or waiting beside the one in use.
        prefetch_mb: megabytes that these may take together; one micro-batch is always read.
        pin: whether batches lie in pinned memory, for asynchronous copies to a GPU.
        on_bad_clip: whether an unusable clip is an error, or is replaced (training) or gets weight 0 (evaluation).
        table: of the source's runs, where it is made already.
        patience_seconds: how long a read waits for a source that cannot be reached.
        absence: what is said meanwhile; shared by the readers of one source.
    """

    threads: int = 2
    prefetch: int = 2
    prefetch_mb: int = 1024
    pin: bool = False
    on_bad_clip: OnBadClip = "fail"
    table: RunTable | None = None
    patience_seconds: float = 0.0
    absence: Absence = field(default_factory=Absence)


READING = Reading()
"""What serves where nobody asks for anything else."""


class Stretch(NamedTuple):
    """The frames of a run that a clip is made of."""

    run: str
    """Pseudonymous key of the run."""
    first: int
    """First frame."""
    last: int
    """Last frame."""


def stretch_of(runs: Sequence[RunInfo], clips: ClipIndex, clip: int) -> Stretch:
    """Where a clip lies.

    Args:
        runs: all runs of the source.
        clips: its clips.
        clip: id of one.
    """
    info, first = runs[int(clips.run[clip])], int(clips.start[clip])
    resampled = is_resampled(info.tr, clips.config.target_tr)
    span = clip_duration(clips.config, info.tr) if resampled else (clips.frames - 1) * clips.stride + 1
    return Stretch(info.key, first, first + span - 1)


class BadClipError(Exception):
    """A clip that cannot be used: its bytes fail their checksum, are not finite, or do not change."""

    def __init__(self, clip: int, stretch: Stretch, reason: str, *, told: str | None = None) -> None:
        run, first, last = stretch
        super().__init__(
            told or f"run {run}, frames {first} to {last}: {reason}: drop the run, or say data.on_bad_clip=quarantine"
        )
        self.clip, self.stretch, self.reason = clip, stretch, reason


class ClipReader:
    """Makes room for batches and fills their clips; `fill` may be called from several threads.

    Args:
        source: the store.
        clips: its clips.
        mask: what is hidden.
        normalisation: decides whether per-voxel statistics come along.
        mask_key: generator of a clip's mask, given the pass and the clip.
        reading: whether batches lie in pinned memory, and the table of the source.
    """

    def __init__(
        self,
        source: RunSource,
        clips: ClipIndex,
        mask: MaskConfig,
        normalisation: NormalisationConfig,
        mask_key: MaskKey,
        reading: Reading = READING,
    ) -> None:
        self.table = reading.table or RunTable(source.runs)
        self._source, self._clips, self._mask, self._mask_key, self._pin = source, clips, mask, mask_key, reading.pin
        shape = source.grid.shape
        self._cells = cell_counts(shape, clips.frames, mask.patch_size)
        self._brain_cells = brain_cells(source.voxels, shape, mask.patch_size)
        used = [source.runs[i] for i in np.unique(clips.run)]
        between = any(is_resampled(run.tr, clips.config.target_tr) for run in used)
        self._dtype = torch.float32 if between else common_dtype({str(run.dtype) for run in used})
        self._with_voxel_statistics = normalisation.kind == "per_voxel" and normalisation.scope == "run"
        # Small cohorts come back to the same runs all the time; a large one never fills more than this.
        entries = max(1, _CACHE_BYTES // max(1, len(source.voxels) * (9 if self._with_voxel_statistics else 1)))
        self._brain = lru_cache(entries)(source.brain)
        self._voxel_mean = lru_cache(entries)(source.voxel_mean)
        self._voxel_std = lru_cache(entries)(source.voxel_std)
        self._time_weights = lru_cache(64)(lambda tr: time_weights(clips.config, tr))

    def allocate(self, clip: Integers, turn: Integers, sample: Integers, weight: NDArray[np.float32]) -> Batch:
        """A batch whose small parts are filled in and whose large ones wait for `fill`."""
        size, voxels = len(clip), len(self._source.voxels)
        run, table = self._clips.run[clip], self.table
        statistics = (self._empty((size, voxels), torch.float32) for _ in range(2))
        mean, std = statistics if self._with_voxel_statistics else (None, None)
        tr = table.tr[run] if self._clips.config.target_tr is None else np.full(size, self._clips.config.target_tr, np.float32)
        return Batch(
            bold=self._empty((size, self._clips.frames, voxels), self._dtype),
            slope=torch.from_numpy(table.slope[run]),
            intercept=torch.from_numpy(table.intercept[run]),
            statistics=torch.from_numpy(table.statistics[run]),
            voxel_mean=mean,
            voxel_std=std,
            brain=self._empty((size, voxels), torch.bool),
            mask=self._empty((size, *self._cells), torch.bool),
            sample=torch.from_numpy(sample),
            epoch=torch.from_numpy(turn),
            clip=torch.from_numpy(clip),
            start=torch.from_numpy(self._clips.start[clip]),
            tr=torch.from_numpy(tr),
            cohort=torch.from_numpy(table.cohort[run]),
            subject=torch.from_numpy(table.subject[run]),
            weight=torch.from_numpy(weight),
        )

    def stretch(self, clip: int) -> Stretch:
        """Where a clip lies."""
        return stretch_of(self._source.runs, self._clips, clip)

    def batch_bytes(self, clips: int) -> int:
        """Memory of the large parts of a batch of so many clips."""
        voxels = len(self._source.voxels)
        per_clip = self._clips.frames * voxels * self._dtype.itemsize + voxels * (9 if self._with_voxel_statistics else 1)
        return clips * (per_clip + int(np.prod(self._cells)))

    def replace(self, batch: Batch, place: int, clip: int, turn: int) -> None:
        """Put another clip, in this pass, into a place of a batch, whose large parts then wait for `fill`."""
        run, table = int(self._clips.run[clip]), self.table
        batch.clip[place], batch.epoch[place], batch.start[place] = clip, turn, int(self._clips.start[clip])
        batch.slope[place], batch.intercept[place] = float(table.slope[run]), float(table.intercept[run])
        batch.statistics[place] = torch.from_numpy(table.statistics[run])
        if self._clips.config.target_tr is None:
            batch.tr[place] = float(table.tr[run])
        batch.cohort[place], batch.subject[place] = int(table.cohort[run]), int(table.subject[run])

    def blank(self, batch: Batch, place: int) -> None:
        """Let a place of a batch hold a clip of zeros with weight 0, which counts for nothing and breaks no arithmetic."""
        batch.bold[place], batch.brain[place], batch.weight[place] = 0, True, 0.0
        if batch.voxel_mean is not None and batch.voxel_std is not None:
            batch.voxel_mean[place], batch.voxel_std[place] = 0.0, 0.0

    def fill(self, batch: Batch, place: int) -> None:
        """Read a clip into its place of a batch.

        Raises:
            BadClipError: it cannot be used, by whoever reads it.
            OSError: the source cannot be reached now.
            SwiftError: it cannot be read.
        """
        clip, turn, start = int(batch.clip[place]), int(batch.epoch[place]), int(batch.start[place])
        run = int(self._clips.run[clip])
        info = self._source.runs[run]
        batch.mask[place].numpy()[...] = draw_mask(self._mask, self._cells, self._brain_cells, self._mask_key(turn, clip))
        try:
            reason = self._fill_frames(batch.bold[place].numpy(), run, start, self._time_weights(float(info.tr)))
            batch.brain[place].numpy()[...] = self._brain(run)
            if batch.voxel_mean is not None and batch.voxel_std is not None:
                batch.voxel_mean[place].numpy()[...] = self._voxel_mean(run)
                batch.voxel_std[place].numpy()[...] = self._voxel_std(run)
        except DamagedError as error:
            raise BadClipError(clip, self.stretch(clip), str(error), told=str(error)) from error
        if reason is not None:
            raise BadClipError(clip, self.stretch(clip), reason)

    def _fill_frames(self, out: NDArray[np.generic], run: int, start: int, weights: NDArray[np.float32] | None) -> str | None:
        """Read frames into (T, V); says what makes them useless, if anything does."""
        if weights is not None:
            bold = self._source.read_bold(run, start, weights.shape[1], 1)
        elif out.dtype == self._source.runs[run].dtype:
            bold = self._source.read_bold(run, start, self._clips.frames, self._clips.stride, out=out)
        else:
            bold = self._source.read_bold(run, start, self._clips.frames, self._clips.stride)
            out[...] = bold
        if bold.dtype.kind == "f" and not np.isfinite(bold).all():
            return "holds NaN or infinity"
        if weights is not None:
            np.matmul(weights, bold.astype(np.float32), out=out)
        if len(bold) > 1 and all(np.array_equal(frame, bold[0]) for frame in bold[1:]):
            return "does not change from frame to frame"
        return None

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._pin)
