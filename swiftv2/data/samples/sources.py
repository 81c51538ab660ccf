"""What clips and batches need of a store, so that one in memory serves as well; `store.reader.Store` has it all."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class RunInfo(Protocol):
    """What clips need to know of a run of a store."""

    @property
    def key(self) -> str:
        """Pseudonymous key of the run."""
        ...

    @property
    def subject(self) -> str:
        """Pseudonymous key of the subject."""
        ...

    @property
    def cohort(self) -> str:
        """Name of the cohort."""
        ...

    @property
    def frames(self) -> int:
        """Volumes of the run."""
        ...

    @property
    def tr(self) -> float:
        """Repetition time in seconds."""
        ...

    @property
    def steady_from(self) -> int:
        """First volume after the leading non-steady ones."""
        ...

    @property
    def since(self) -> int:
        """Version of the store in which the run came."""
        ...

    @property
    def withdrawn(self) -> int:
        """Version of the store in which consent was withdrawn, so that only a tombstone is left; 0 while it holds."""
        ...


class StoredRun(RunInfo, Protocol):
    """What batches need to know of a run beside what clips need."""

    @property
    def slope(self) -> float:
        """Factor from source numbers to source units."""
        ...

    @property
    def intercept(self) -> float:
        """Offset from source numbers to source units."""
        ...

    @property
    def dtype(self) -> str:
        """Number format of the source numbers, as numpy names it."""
        ...

    @property
    def statistics(self) -> Sequence[float]:
        """Mean, std, min, max, median and interquartile range over the run's brain voxels, in source units."""
        ...


class GridInfo(Protocol):
    """What batches need to know of a store's grid."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (H, W, D)."""
        ...


class RunSource(Protocol):
    """What batches need of a store.

    Whatever reads raises `OSError` where the source cannot be reached now and the same call may succeed later,
    `DamagedError` where its bytes are of no use, and `SwiftError` where it is of no use to go on.
    """

    @property
    def grid(self) -> GridInfo:
        """The grid of all runs."""
        ...

    @property
    def voxels(self) -> NDArray[np.int64]:
        """(V,) flat C-order indices of the kept voxels."""
        ...

    @property
    def runs(self) -> Sequence[StoredRun]:
        """All runs."""
        ...

    def read_bold(
        self, run_index: int, start: int, frames: int, stride: int, *, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Source numbers of `frames` frames, every `stride`-th from `start`, (frames, V); in `out` where it is given."""
        ...

    def brain(self, run_index: int) -> NDArray[np.bool_]:
        """The run's brain among the kept voxels, (V,)."""
        ...

    def voxel_mean(self, run_index: int) -> NDArray[np.float32]:
        """Mean of each kept voxel over the run, (V,)."""
        ...

    def voxel_std(self, run_index: int) -> NDArray[np.float32]:
        """Standard deviation of each kept voxel over the run, (V,)."""
        ...
