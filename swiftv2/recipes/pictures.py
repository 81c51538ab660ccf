"""Reconstruction of one held-out clip, as arrays that the report draws: slices in three planes and time courses."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.batches import evaluation_batches
from swiftv2.data.samples.normalise import scaling
from swiftv2.data.store.reader import Store
from swiftv2.files import write_file
from swiftv2.recipes.baselines import time_interpolation
from swiftv2.recipes.data import Data
from swiftv2.recipes.objective import Objective

Floats = NDArray[np.float32]

FILE = "reconstruction.npz"
COURSES = 3


@torch.no_grad()
def save_reconstruction(
    config: PretrainConfig, data: Data, objective: Objective, device: torch.device, folder: Path
) -> Path | None:
    """Write `reconstruction.npz` for the first held-out clip; called by one rank.

    Pictures show a brain: real subjects are drawn only where `evaluate.draw_subjects` says so, generated ones always.

    Args:
        config: the whole configuration.
        data: the store and its held-out clips.
        objective: the trained objective.
        device: where it lies.
        folder: where the file goes.

    Returns:
        Path of the file; None where nothing may be drawn, or the clip cannot be used.
    """
    store, gone = data.store, data.withdrawn_heldout
    if not (store.generated or config.evaluate.draw_subjects):
        return None
    with evaluation_batches(
        store,
        data.heldout,
        config.mask,
        config.data.normalisation,
        seed=config.run.seed,
        batch=1,
        max_clips=1 + len(gone),
        reading=data.reading(config.data, device),
        left_out=gone,
    ) as batches:
        batch: Batch = next(iter(batches)).to(device)
    if not batch.weight.any():
        return None
    objective.eval()
    _, signal, reconstruction = objective.clip_losses(batch)
    hidden = objective.hidden(batch)
    interpolated = time_interpolation(signal, hidden, batch.brain)
    scale = scaling(batch, config.data.normalisation)
    brain = batch.brain[0].cpu().numpy()
    true, made, guess = (_array(scale.to_source(x)[0]) for x in (signal, reconstruction, interpolated))
    masked = hidden[0].cpu().numpy()
    filled = np.where(masked, made, true)
    frame = _frame_to_show(masked, brain)
    box = _Box(store, brain)
    mean = true.mean(0)
    arrays: dict[str, NDArray[Any]] = {}
    for plane in box.planes:
        for name, values in (("original", true[frame]), ("reconstructed", filled[frame])):
            arrays[f"volume_{name}_{plane}"] = box.cut(values, plane)
            arrays[f"fluctuation_{name}_{plane}"] = box.cut(values - mean, plane)
        # Infinity stands for hidden, NaN for no brain: the figure gives each a colour of its own.
        seen = np.where(masked[frame], np.inf, true[frame])
        arrays[f"volume_masked_{plane}"] = box.cut(seen, plane)
        arrays[f"fluctuation_masked_{plane}"] = box.cut(seen - mean, plane)
    chosen = _voxels_to_show(true, masked, brain)
    arrays |= {
        "seconds": np.arange(config.clip.frames) * float(batch.tr[0]) * config.clip.stride_within,
        "frame": np.array(frame),
        "course_true": true[:, chosen].T,
        "course_reconstructed": made[:, chosen].T,
        "course_interpolated": guess[:, chosen].T,
        "course_masked": masked[:, chosen].T,
        "course_mm": store.grid.world(np.asarray(store.voxels)[chosen]),
    }
    path = folder / FILE
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # keywords are arrays, allow_pickle is not given
    write_file(path, buffer.getvalue())
    return path


@dataclasses.dataclass(frozen=True)
class _Box:
    """Cuts packed values into pictures whose first axis is left to right (or back to front) and whose second rises."""

    store: Store
    brain: NDArray[np.bool_]
    planes: tuple[str, ...] = ("sagittal", "coronal", "axial")

    def cut(self, values: NDArray[Any], plane: str) -> NDArray[np.float32]:
        """One slice through the middle of the brain's voxels, (columns, rows) float32, NaN where no brain is."""
        grid, voxels = self.store.grid, np.asarray(self.store.voxels)
        volume = np.full(grid.size, np.nan, dtype=np.float32)
        volume[voxels[self.brain]] = values[self.brain]
        axis = self.planes.index(plane)
        places = grid.indices(voxels[self.brain])
        middle = int(np.median(places[:, axis]))
        # A little beside the midline: the sagittal cut through it shows mostly the gap between the hemispheres.
        place = middle + (round(12.0 / grid.voxel_mm[0]) if plane == "sagittal" else 0)
        picture: Floats = np.take(volume.reshape(grid.shape), [place], axis=axis).squeeze(axis)
        low, high = places.min(0), places.max(0) + 1
        others = [i for i in range(3) if i != axis]
        picture = picture[low[others[0]] : high[others[0]], low[others[1]] : high[others[1]]]
        # Left on the left, whatever the order of the store.
        return picture[::-1] if plane != "sagittal" and grid.orientation[0] == "L" else picture


def _array(x: Tensor) -> Floats:
    return np.asarray(x.float().cpu(), dtype=np.float32)


def _frame_to_show(masked: NDArray[np.bool_], brain: NDArray[np.bool_]) -> int:
    """The frame whose hidden share of the brain is the clip's typical one, so that the picture shows an ordinary mask."""
    shares = masked[:, brain].mean(1)
    return int(np.abs(shares - np.median(shares)).argmin())


def _voxels_to_show(true: Floats, masked: NDArray[np.bool_], brain: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Three brain voxels that are partly hidden: at the 50th, 75th and 95th percentile of the fluctuation's size."""
    hidden = masked.mean(0)
    usable = np.flatnonzero(brain & (hidden > 0) & (hidden < 1))
    usable = usable if len(usable) else np.flatnonzero(brain)
    by_size = usable[np.argsort(true[:, usable].std(0), kind="stable")]
    places = [int(share * (len(by_size) - 1)) for share in (0.5, 0.75, 0.95)]
    return by_size[places].astype(np.int64)
