"""How well each voxel is reconstructed over the held-out clips of a cohort: sums by voxel, and maps of R2 as NIfTI."""

import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from swiftv2.data.grid import Grid
from swiftv2.engine.launch import World
from swiftv2.files import write_file
from swiftv2.recipes.baselines import MODEL

Doubles = NDArray[np.float64]

FOLDER = "maps"
FEWEST_SUBJECTS = 5
"""Real subjects behind every voxel of a mean or a map, so that it shows none of them."""
FEWEST_VALUES = 20
"""Hidden values behind every voxel of a map: R2 of fewer is noise."""
_OWN = ("values", "subjects", "measured", "reconstructed", "error", "fluctuation", "moved", "scaled")
_MNI, _ALIGNED = 4, 2


class VoxelSums:
    """Sums over hidden voxels of the evaluated clips, by cohort and voxel; float64 on the device of the batches.

    Each cohort takes 8 bytes x (8 + methods) x voxels: 21 MB for the 230 000 voxels of a 2 mm grid.

    Args:
        cohorts: places of the cohorts that are evaluated.
        voxels: kept voxels of the store.
        methods: names of the predictions, the model's first.
        device: where batches lie.
    """

    def __init__(self, cohorts: Sequence[int], voxels: int, methods: Sequence[str], device: torch.device) -> None:
        self.cohorts, self.methods = tuple(cohorts), tuple(methods)
        self.columns = (*_OWN, *(f"squared/{name}" for name in self.methods))
        self.totals = torch.zeros(len(self.cohorts), len(self.columns), voxels, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self,
        predictions: Mapping[str, Tensor],
        target: Tensor,
        counted: Tensor,
        cohort: Sequence[int],
        weight: Sequence[float],
        first: Sequence[bool],
        sources: tuple[Tensor, Tensor],
    ) -> None:
        """Add a batch.

        Args:
            predictions: (B, T, V) by method, in normalised units.
            target: (B, T, V) normalised signal.
            counted: (B, T, V) bool: hidden brain voxels.
            cohort: (B) place of each clip's cohort.
            weight: (B) 0 for clips that do not count.
            first: (B) whether the clip stands for its subject where subjects are counted.
            sources: (B, 1, 1) or (B, 1, V) spread and centre: source units = normalised x spread + centre.
        """
        spread, centre = sources
        for place in range(len(target)):
            if weight[place] <= 0:
                continue
            signal, inside = target[place], counted[place]
            made = predictions[MODEL][place].to(signal.dtype)
            scale, shift = spread[place].double()[0], centre[place].double()[0]
            mean = signal.mean(0, keepdim=True)
            number = inside.sum(0).double()

            def total(values: Tensor, inside: Tensor = inside) -> Tensor:
                # Few frames add up well enough in float32, in half the time; clips are summed in float64.
                return torch.where(inside, values, 0.0).sum(0).double()

            scaled = total((signal - mean).square_())
            squared = [total((predictions[name][place].to(signal.dtype) - signal).square_()) for name in self.methods]
            own = (
                number,
                # Only where it is hidden: a mean over one subject's values must not pass for one over many.
                inside.any(0).double() * float(first[place]),
                total(signal) * scale + number * shift,
                total(made) * scale + number * shift,
                squared[self.methods.index(MODEL)] * scale**2,
                scaled * scale**2,
                total((made - mean).square_()) * scale**2,
                scaled,
            )
            self.totals[self.cohorts.index(int(cohort[place]))] += torch.stack([*own, *squared])

    def reduce(self, world: World) -> None:
        """Sum over all ranks, cohort by cohort (collective)."""
        if world.size > 1:
            for one in self.totals:
                dist.all_reduce(one)

    def cohort(self, place: int) -> dict[str, Doubles]:
        """Sums of one cohort by column, float64 (V,) each."""
        rows = self.totals[self.cohorts.index(place)].cpu().numpy()
        return dict(zip(self.columns, rows, strict=True))


@dataclass(frozen=True)
class R2Map:
    """R2 on the fluctuation by voxel.

    Attributes:
        r2: (V,) float32 of the model; NaN where there is too little data.
        gain: (V,) float32, less that of the better baseline.
        baseline: which that is, over all voxels of the cohort.
    """

    r2: NDArray[np.float32]
    gain: NDArray[np.float32]
    baseline: str


def r2_map(sums: Mapping[str, Doubles], fewest_subjects: int) -> R2Map:
    """R2 = 1 - squared error / squared fluctuation over the hidden values of each voxel, in normalised units.

    Args:
        sums: of a cohort, see `VoxelSums.cohort`.
        fewest_subjects: who must have hidden values in a voxel for it to be shown.
    """
    known = shown(sums, fewest_subjects) & (sums["scaled"] > 0)
    baselines = [name for name in sums if name.startswith("squared/") and name != f"squared/{MODEL}"]
    better = min(baselines, key=lambda name: float(sums[name][known].sum()))

    def r2(name: str) -> Doubles:
        error = np.divide(sums[name], sums["scaled"], out=np.full(len(known), np.nan), where=known)
        return np.asarray(1.0 - error)

    own, other = r2(f"squared/{MODEL}"), r2(better)
    return R2Map(own.astype(np.float32), (own - other).astype(np.float32), better.removeprefix("squared/"))


def shown(sums: Mapping[str, Doubles], fewest_subjects: int) -> NDArray[np.bool_]:
    """Voxels (V,) with enough hidden values of enough subjects."""
    return np.asarray((sums["values"] >= FEWEST_VALUES) & (sums["subjects"] >= fewest_subjects))


def nifti(values: NDArray[np.float32], grid: Grid, voxels: NDArray[np.integer[Any]]) -> nib.Nifti1Image:
    """A map of packed values (V,) on the store's grid, float32, NaN elsewhere.

    Its axes are those of the store; sform and qform say the same place, with the code of MNI space where it is one, else
    `aligned`. A grid with shears, which no qform can express, has the sform alone.
    """
    volume = np.full(grid.size, np.nan, dtype=np.float32)
    volume[voxels] = values
    image = nib.Nifti1Image(volume.reshape(grid.shape), grid.matrix)  # type: ignore[no-untyped-call]
    code = _MNI if grid.space.startswith("MNI152") else _ALIGNED
    image.set_sform(grid.matrix, code=code)  # type: ignore[no-untyped-call]
    image.set_qform(grid.matrix, code=code)  # type: ignore[no-untyped-call]
    if not np.allclose(image.get_qform(), grid.matrix, atol=1e-3):  # type: ignore[no-untyped-call]
        image.set_qform(None, code=0)  # type: ignore[no-untyped-call]
    image.header["xyzt_units"] = 2  # millimetres
    image.header["descrip"] = b"R2 on the fluctuation of hidden voxels"
    return image


def write_map(path: Path, values: NDArray[np.float32], grid: Grid, voxels: NDArray[np.integer[Any]]) -> None:
    """Write a map as `.nii.gz`, whole; equal values give equal bytes."""
    image: Any = nifti(values, grid, voxels)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def file_names(cohorts: Sequence[str]) -> dict[str, str]:
    """A part of a file's name for each cohort: its letters, digits, `-`, `.` and `_`; a number more where two are equal."""
    taken: dict[str, str] = {}
    for cohort in cohorts:
        name = base = re.sub(r"[^A-Za-z0-9._-]+", "_", cohort) or "_"
        number = 2
        while name.casefold() in {one.casefold() for one in taken.values()}:
            name, number = f"{base}_{number}", number + 1
        taken[cohort] = name
    return taken
