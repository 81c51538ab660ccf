"""What a micro-batch is: packed clips and what is known of each."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from swiftv2.data.samples.sources import StoredRun

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
    """(B, T, V) source numbers as stored; float32 between them where runs are brought to another TR."""
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
    """(B,) int64: which pass over the clip's cohort this is; the epoch, where cohorts are mixed in proportion.

    Negative, and of no other sample, for a clip that stands in for one that is left out."""
    clip: Tensor
    """(B,) int64 clip id."""
    start: Tensor
    """(B,) int64 first frame."""
    tr: Tensor
    """(B,) float32 seconds between the frames of the run, or those of clip.target_tr where that is set."""
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

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(one.numel() * one.element_size() for one in tensors if one is not None)


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


def common_dtype(dtypes: set[str]) -> torch.dtype:
    """The torch dtype of batches from runs of these numpy dtypes: integers as stored (unsigned 16-bit ones widened).

    Runs of different formats meet in float32, as does everything that torch or the device has no integer for.
    """
    names = {np.dtype(name).name for name in dtypes}
    found = {_TORCH_DTYPES.get(name, torch.float32) for name in names}
    return found.pop() if len(found) == 1 else torch.float32
