"""Reconstructions at each evaluation, as arrays that the report draws: fixed held-out clips, means and maps of cohorts."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.grid import Grid
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.batches import evaluation_batches
from swiftv2.data.samples.normalise import scaling
from swiftv2.engine.collective import on_first
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError
from swiftv2.files import write_file
from swiftv2.models.routes import Work
from swiftv2.recipes import maps
from swiftv2.recipes.baselines import FluctuationScore, time_interpolation
from swiftv2.recipes.data import Data
from swiftv2.recipes.objective import Objective
from swiftv2.report.reconstructions import INDEX, PLANES, best_of, file_of, folder_of, read_index

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]

KEPT, NEWEST = 8, 3
"""Evaluations whose arrays stay, in all and at the end: the first, the best, the last three, and others spread evenly."""
BESIDE_MIDLINE_MM = 12.0
"""The sagittal cut lies to the right of the midline, which shows mostly the gap between the hemispheres."""


class Pictures:
    """Writes what is drawn of each evaluation.

    Args:
        config: of the run; `evaluate.pictures` clips are drawn.
        data: the store and its held-out clips.
        objective: that is evaluated.
        world: of all ranks.
        run_dir: where `figures/` stands.
    """

    def __init__(self, config: PretrainConfig, data: Data, objective: Objective, world: World, run_dir: Path) -> None:
        self.config, self.data, self.objective, self.world, self.run_dir = config, data, objective, world, run_dir
        self._read: list[Batch] | None = None

    def write(self, step: int, loss: float, scores: FluctuationScore, sums: maps.VoxelSums) -> str | None:
        """Draw the fixed clips, and write all under `figures/` (collective); the objective is in evaluation mode.

        Args:
            step: of the run.
            loss: held-out; the lowest is the best.
            scores: of all ranks: they tell the subjects of each cohort.
            sums: by voxel, of all ranks.

        Returns:
            Why they could not be read or written, on every rank: no picture is worth a run. None where they are there.
        """

        def attempt() -> str | None:
            try:
                self._write(step, loss, scores, sums)
            except SwiftError as error:
                return str(error)
            except OSError as error:
                return f"{error.filename or self.run_dir}: {error.strerror}"
            return None

        return on_first(attempt, self.world)

    def _write(self, step: int, loss: float, scores: FluctuationScore, sums: maps.VoxelSums) -> None:
        store, settings = self.data.store, self.config.evaluate
        single = store.generated or settings.draw_subjects
        arrays: Arrays = {}
        drawn: list[dict[str, Any]] = []
        notes: list[str] = []
        if single:
            self._add_clips(arrays, drawn, notes)
        else:
            notes.append("clips of real subjects are drawn only with evaluate.draw_subjects=true")
        written = self._add_cohorts((scores, sums), arrays, drawn, notes, means=not single)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # keywords are arrays, allow_pickle is not given
        folder = folder_of(self.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = f"step_{step:09d}.npz"
        write_file(folder / file, buffer.getvalue())
        entry = {"step": step, "loss": loss if np.isfinite(loss) else None, "file": file}
        steps = _kept([*_former(self.run_dir, step), entry])
        grid = store.grid
        content = {
            "steps": steps,
            "drawn": drawn,
            "maps": written,
            "notes": notes,
            "generated": store.generated,
            "grid": {"shape": list(grid.shape), "orientation": grid.orientation, "space": grid.space},
            "voxel_mm": list(grid.voxel_mm),
        }
        write_file(folder / INDEX, json.dumps(content, indent=1) + "\n")
        names = {one["file"] for one in steps}
        for path in folder.glob("step_*.npz"):
            if path.name not in names:
                path.unlink()

    @torch.no_grad()
    def _add_clips(self, arrays: Arrays, drawn: list[dict[str, Any]], notes: list[str]) -> None:
        """The fixed clips, computed anew by rank 0: so they are the same however many clips and ranks there are."""
        # Read once: a few clips on the host are nothing, a slow file system at each evaluation is not.
        batches = self._read = self._read or self._read_clips()
        encoder = self.objective.simmim.encoder
        # What this rank alone computes says nothing of how even the ranks are.
        work, encoder.work = encoder.work, Work()
        try:
            for number, one in enumerate(batches, 1):
                if not one.weight.any():
                    notes.append(f"clip {number} cannot be used and is not drawn")
                    continue
                key, cohort = f"clip_{number}", self.data.table.cohort_names[int(one.cohort[0])]
                found, facts = self._clip(one.to(self.world.device))
                arrays |= {f"{key}/{name}": values for name, values in found.items()}
                tr, frame = float(one.tr[0]) * self.config.clip.stride_within, facts["frame"]
                caption = f"Clip {number} ({cohort}), frame {frame + 1} of {len(found['seconds'])}"
                drawn.append({"name": key, "kind": "clip", "cohort": cohort, "caption": caption, "tr": tr, **facts})
        finally:
            encoder.work = work

    def _read_clips(self) -> list[Batch]:
        config, data = self.config, self.data
        with evaluation_batches(
            data.store,
            data.heldout,
            config.mask,
            config.data.normalisation,
            seed=config.run.seed,
            batch=1,
            max_clips=config.evaluate.pictures,
            reading=data.reading(config.data, self.world.device),
            left_out=data.withdrawn_heldout,
        ) as batches:
            return list(batches)

    def _clip(self, batch: Batch) -> tuple[Arrays, dict[str, Any]]:
        store = self.data.store
        _, signal, reconstruction = self.objective.clip_losses(batch)
        hidden = self.objective.hidden(batch)
        interpolated = time_interpolation(signal, hidden, batch.brain)
        scale = scaling(batch, self.config.data.normalisation)
        brain = batch.brain[0].cpu().numpy()
        true, made, guess = (_array(scale.to_source(x)[0]) for x in (signal, reconstruction, interpolated))
        masked = hidden[0].cpu().numpy()
        frame = _frame_to_show(masked, brain)
        voxels = np.asarray(store.voxels)
        cuts = Cuts(store.grid, voxels, brain)
        shown = {"original": true[frame], "reconstructed": made[frame], "mean": true.mean(0)}
        found: Arrays = {f"{name}_{plane}": cuts.cut(values, plane) for name, values in shown.items() for plane in PLANES}
        found |= {f"hidden_{plane}": cuts.cut(masked[frame].astype(np.float32), plane) == 1 for plane in PLANES}
        chosen = _voxels_to_show(true, masked, brain)
        found |= {
            "cut_mm": cuts.places_mm(),
            "seconds": np.arange(len(true)) * float(batch.tr[0]) * self.config.clip.stride_within,
            "course_true": true[:, chosen].T,
            "course_reconstructed": made[:, chosen].T,
            "course_interpolated": guess[:, chosen].T,
            "course_hidden": masked[:, chosen].T,
            "course_mm": store.grid.world(voxels[chosen]),
        }
        counted = masked & brain
        moved = float(((true - true.mean(0))[counted].astype(np.float64) ** 2).sum())
        r2 = {
            name: _finite(1.0 - float(((one - true)[counted].astype(np.float64) ** 2).sum()) / moved) if moved else None
            for name, one in (("model", made), ("time_interpolation", guess))
        }
        return found, {"frame": frame, "r2": r2}

    def _add_cohorts(
        self,
        scored: tuple[FluctuationScore, maps.VoxelSums],
        arrays: Arrays,
        drawn: list[dict[str, Any]],
        notes: list[str],
        *,
        means: bool,
    ) -> list[dict[str, Any]]:
        """Means of cohorts for the figure, and their maps as NIfTI; what was too little is noted."""
        store, table = self.data.store, self.data.table
        voxels = np.asarray(store.voxels)
        fewest = 1 if store.generated else maps.FEWEST_SUBJECTS
        names = maps.file_names(table.cohort_names)
        folder = self.run_dir / "figures" / maps.FOLDER
        written: list[dict[str, Any]] = []
        scores, by_voxel = scored
        evaluated = scores.totals[:, -1].numpy() > 0
        for place in by_voxel.cohorts:
            cohort = table.cohort_names[place]
            subjects = int((evaluated & (scores.cohort_of_subject == place)).sum())
            sums = by_voxel.cohort(place)
            known = maps.shown(sums, fewest)
            if subjects < fewest or not known.any():
                if subjects < fewest:
                    notes.append(f"{cohort}: nothing is drawn of {subjects} real held-out subjects, fewer than {fewest}")
                else:
                    need = f"{maps.FEWEST_VALUES} hidden values of {fewest} subjects"
                    notes.append(f"{cohort}: nothing is drawn, since no voxel has {need}")
                for kind in ("r2", "gain"):
                    (folder / f"fluctuation_{_KINDS[kind]}_{names[cohort]}.nii.gz").unlink(missing_ok=True)
                continue
            r2 = maps.r2_map(sums, fewest)
            entry: dict[str, Any] = {"cohort": cohort, "subjects": subjects, "baseline": r2.baseline}
            for kind, values in (("r2", r2.r2), ("gain", r2.gain)):
                path = folder / f"fluctuation_{_KINDS[kind]}_{names[cohort]}.nii.gz"
                maps.write_map(path, values, store.grid, voxels)
                entry[kind] = path.name
            written.append(entry)
            if means:
                key = f"mean_{place}"
                cuts = Cuts(store.grid, voxels, known)
                found: Arrays = {f"{n}_{p}": cuts.cut(values, p) for n, values in _means(sums, known).items() for p in PLANES}
                found["cut_mm"] = cuts.places_mm()
                arrays |= {f"{key}/{name}": values for name, values in found.items()}
                caption = f"Mean over {subjects} held-out subjects of {cohort}, hidden voxels only"
                drawn.append({"name": key, "kind": "mean", "cohort": cohort, "caption": caption, "subjects": subjects})
        return written


_KINDS = {"r2": "r2", "gain": "r2_gain"}


class Cuts:
    """Cuts packed values into pictures whose first axis is left to right (or back to front) and whose second rises.

    Args:
        grid: of the store.
        voxels: (V,) flat numbers of the kept voxels.
        brain: (V,) bool: those that are shown.
    """

    def __init__(self, grid: Grid, voxels: NDArray[Any], brain: NDArray[np.bool_]) -> None:
        self.grid, self.voxels, self.brain = grid, voxels, brain
        places = grid.indices(voxels[brain])
        self.low, self.high = places.min(0), places.max(0) + 1
        self.at = np.median(places, axis=0).astype(np.int64)
        to_right = -1 if grid.orientation[0] == "L" else 1
        beside = self.at[0] + to_right * round(BESIDE_MIDLINE_MM / grid.voxel_mm[0])
        self.at[0] = np.clip(beside, self.low[0], self.high[0] - 1)

    def cut(self, values: NDArray[Any], plane: str) -> Floats:
        """One slice (columns, rows) float32, NaN where no brain is."""
        volume = np.full(self.grid.size, np.nan, dtype=np.float32)
        volume[self.voxels[self.brain]] = values[self.brain]
        axis = PLANES.index(plane)
        picture = np.take(volume.reshape(self.grid.shape), self.at[axis], axis=axis)
        one, other = (i for i in range(3) if i != axis)
        picture = picture[self.low[one] : self.high[one], self.low[other] : self.high[other]]
        # Left on the left, whatever the order of the store.
        flipped = plane != "sagittal" and self.grid.orientation[0] == "L"
        return np.ascontiguousarray(picture[::-1] if flipped else picture)

    def places_mm(self) -> NDArray[np.float64]:
        """World coordinates (3,) of the planes: x of the sagittal, y of the coronal, z of the axial one."""
        flat = np.ravel_multi_index(tuple(self.at), self.grid.shape)
        return np.asarray(self.grid.world(np.array([flat]))[0])


def _means(sums: Mapping[str, maps.Doubles], known: NDArray[np.bool_]) -> dict[str, maps.Doubles]:
    """A cohort's means over all hidden values of each voxel (V,), in source units."""
    number = np.where(known, sums["values"], 1.0)
    return {
        "measured": sums["measured"] / number,
        "reconstructed": sums["reconstructed"] / number,
        "error": np.sqrt(sums["error"] / number),
        "fluctuation": np.sqrt(sums["fluctuation"] / number),
        "moved": np.sqrt(sums["moved"] / number),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _former(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Earlier evaluations whose arrays are there; those of a later step belong to an attempt that is done again."""
    # A damaged index costs the pictures of former steps, never the run.
    with contextlib.suppress(SwiftError):
        steps = (read_index(run_dir) or {"steps": []})["steps"]
        return [one for one in steps if one["step"] < step and file_of(run_dir, one["step"]).is_file()]
    return []


def _kept(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `KEPT` of them: the first, the best and the newest stay, the others as evenly spread as can be."""
    left = sorted(steps, key=lambda one: one["step"])
    best = left[best_of(left)]
    while len(left) > KEPT:
        free = [i for i in range(1, len(left) - NEWEST) if left[i] is not best]
        del left[min(free, key=lambda i: left[i + 1]["step"] - left[i - 1]["step"])]
    return left


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
