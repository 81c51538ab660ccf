"""Features of runs and clips that need no learned encoder: what baselines are made of.

Features of runs are computed once and kept in a file for each store and kind; units are means over their runs.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nilearn import datasets
from nilearn.connectome import ConnectivityMeasure
from nilearn.signal import clean
from numpy.typing import NDArray
from sklearn.covariance import EmpiricalCovariance

from swiftv2.data.grid import Grid
from swiftv2.data.samples.clips import ClipIndex
from swiftv2.data.samples.tempo import clip_duration, time_weights
from swiftv2.data.store.layout import PRIVATE
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

ATLASES: Mapping[str, Callable[[], Any]] = {
    "seitzman_2018": datasets.fetch_coords_seitzman_2018,
    "power_2011": datasets.fetch_coords_power_2011,
    "dosenbach_2010": datasets.fetch_coords_dosenbach_2010,
}
"""Atlases of spheres around coordinates in MNI152 that nilearn carries with it: nothing is downloaded."""
SPIKE_MM = 0.5
"""Framewise displacement above which a volume counts as a spike of motion."""
FEWEST_FRAMES = 10
"""Volumes below which correlations of regions are mostly noise."""
MOST_PATTERN_BYTES = 8_000_000_000
_BLOCK_FRAMES = 64


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions of an atlas on a store's kept voxels.

    Attributes:
        name: of the atlas, and of how it was put on the grid: equal names give equal regions on a grid.
        members: for each region the places of its voxels among the kept ones, ascending.
        left_out: regions of the atlas that hold no kept voxel.
    """

    name: str
    members: tuple[NDArray[np.int64], ...]
    left_out: int


@dataclass(frozen=True)
class Connectivity:
    """How functional connectivity is measured.

    Attributes:
        regions: of which signals are correlated.
        band: (low, high) in Hz that is kept of them; None keeps all but the linear trend.
    """

    regions: Regions
    band: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Kind of these features, as files of them are called."""
        kept = "" if self.band is None else f"_{self.band[0]:g}-{self.band[1]:g}Hz"
        return f"fc_{self.regions.name}{kept}"

    def of_frames(self, signal: Singles, brain: NDArray[np.bool_], tr: float) -> Singles:
        """Fisher's z of the Pearson correlations of the regions' mean signals.

        Args:
            signal: (T, V) kept voxels.
            brain: (V,) voxels that count.
            tr: seconds between frames.

        Returns:
            (R (R - 1) / 2,): pairs in the order of the lower triangle; NaN for regions without a brain voxel or of no change.

        Raises:
            SwiftError: there are too few frames.
        """
        if len(signal) < FEWEST_FRAMES:
            raise SwiftError(f"{len(signal)} frames are too few for correlations of regions; {FEWEST_FRAMES} are needed")
        low, high = self.band or (None, None)
        series = np.full((len(signal), len(self.regions.members)), np.nan)
        for number, member in enumerate(self.regions.members):
            voxels = member[brain[member]]
            if len(voxels):
                series[:, number] = signal[:, voxels].mean(axis=1, dtype=np.float64)
        moves = series.std(axis=0) > 1e-6 * np.abs(series).max(axis=0)
        full = np.full((len(moves), len(moves)), np.nan)
        if moves.sum() > 1:
            cleaned = clean(series[:, moves], detrend=True, standardize=None, high_pass=low, low_pass=high, t_r=tr)
            measure = ConnectivityMeasure(EmpiricalCovariance(store_precision=False), kind="correlation", standardize=False)
            full[np.ix_(moves, moves)] = measure.fit_transform([cleaned])[0]
        pairs = full[np.tril_indices(len(moves), -1)]
        return np.asarray(np.arctanh(np.clip(pairs, -0.999999, 0.999999)), dtype=np.float32)


def named_regions(atlas: str, store: Store, radius_mm: float | None = None) -> Regions:
    """An atlas on a store's kept voxels.

    Args:
        atlas: one of `ATLASES`, or the path of a NIfTI file of labels (0 is no region) in the store's space.
        store: whose grid and voxels.
        radius_mm: of the spheres around coordinates; the atlas' own when None, 5 mm where it tells none. A voxel's longest
            edge at least, so that coarse grids lose no region between their voxels.

    Raises:
        UsageError: no such atlas, coordinates of MNI152 for a store in another space, or fewer than 2 regions on the grid.
    """
    world = store.grid.world(store.voxels)
    if atlas in ATLASES:
        if not store.grid.space.startswith("MNI152"):
            raise UsageError(
                f"--atlas {atlas}: its coordinates are of MNI152, and {store.path} is in {store.grid.space!r}: give a NIfTI "
                "file of labels in that space, or --atlas none"
            )
        name, members = _spheres(atlas, world, store.grid, radius_mm)
    elif Path(atlas).is_file():
        name, members = _labelled(Path(atlas), world)
    else:
        raise UsageError(f"--atlas {atlas}: no file and none of {', '.join(ATLASES)}, none")
    kept = tuple(member for member in members if len(member))
    if len(kept) < 2:
        raise UsageError(f"--atlas {atlas}: {len(kept)} of its {len(members)} regions lie on the store's voxels; 2 are needed")
    return Regions(name, kept, len(members) - len(kept))


def _spheres(atlas: str, world: Floats, grid: Grid, radius_mm: float | None) -> tuple[str, list[NDArray[np.int64]]]:
    found = ATLASES[atlas]()
    centres = np.stack([np.asarray(found["rois"][axis], dtype=np.float64) for axis in "xyz"], axis=1)
    own = np.asarray(found.get("radius", 5.0), dtype=np.float64)
    radii = np.broadcast_to(own if radius_mm is None else radius_mm, len(centres))
    radii = np.maximum(radii, max(grid.voxel_mm))
    members = [
        np.flatnonzero(((world - centre) ** 2).sum(axis=1) <= radius**2)
        for centre, radius in zip(centres, radii.tolist(), strict=True)
    ]
    return f"{atlas}_{'own' if radius_mm is None else f'{radius_mm:g}'}mm", members


def _labelled(path: Path, world: Floats) -> tuple[str, list[NDArray[np.int64]]]:
    """Each kept voxel has the label of the file's voxel that its centre lies in."""
    try:
        image: Any = nib.load(path)
        labels = np.rint(np.asarray(image.dataobj)).astype(np.int64)
        affine = np.asarray(image.affine, dtype=np.float64)
    except (OSError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise UsageError(f"--atlas {path}: no NIfTI file of labels ({error})") from error
    if labels.ndim != 3:
        raise UsageError(f"--atlas {path}: {labels.ndim} dimensions; a file of labels has 3, each region a number")
    inverse = np.linalg.inv(affine)
    index = np.rint(world @ inverse[:3, :3].T + inverse[:3, 3]).astype(np.int64)
    inside = ((index >= 0) & (index < labels.shape)).all(axis=1)
    own = np.zeros(len(world), dtype=np.int64)
    own[inside] = labels[tuple(index[inside].T)]
    digest = hashlib.sha256(labels.tobytes() + affine.tobytes()).hexdigest()[:8]
    name = path.name.removesuffix(".gz").removesuffix(".nii")
    return f"{name}_{digest}", [np.flatnonzero(own == number) for number in np.unique(labels[labels != 0])]


def run_connectivity(store: Store, run: int, measure: Connectivity) -> Singles:
    """`Connectivity` of a run's steady volumes."""
    info, brain = store.runs[run], store.brain(run)
    used = np.unique(np.concatenate(measure.regions.members))
    place = np.full(len(store.voxels), -1)
    place[used] = np.arange(len(used))
    signal = np.empty((info.frames - info.steady_from, len(used)), dtype=np.float32)
    for start in range(info.steady_from, info.frames, _BLOCK_FRAMES):
        frames = min(_BLOCK_FRAMES, info.frames - start)
        block = store.read_bold(run, start, frames)[:, used]
        signal[start - info.steady_from :][:frames] = block * info.slope + info.intercept
    narrow = Regions(measure.regions.name, tuple(place[one] for one in measure.regions.members), measure.regions.left_out)
    return Connectivity(narrow, measure.band).of_frames(signal, brain[used], info.tr)


def run_mean_image(store: Store, run: int) -> Singles:
    """(V,) mean of each voxel over a run, standardised over its brain: 0 outside, so that a scanner's units do not matter."""
    return _standardised(store.voxel_mean(run).astype(np.float64), store.brain(run))


def run_motion(store: Store, run: int) -> Singles:
    """(3,) mean and largest framewise displacement in mm, and the share of volumes above 0.5 mm; NaN where not known."""
    moved = store.frame_values("framewise_displacement", run)
    return _motion(moved, store.runs[run].steady_from, store.runs[run].frames)


def run_mask(store: Store, run: int) -> Singles:
    """(V + 1,) which kept voxels are brain, and the share of them: anatomy and field of view, no signal."""
    brain = store.brain(run)
    return np.append(brain, brain.mean()).astype(np.float32)


def _motion(moved: Floats | None, first: int, stop: int) -> Singles:
    known = np.empty(0) if moved is None else moved[first:stop][~np.isnan(moved[first:stop])]
    if not len(known):
        return np.full(3, np.nan, dtype=np.float32)
    return np.array([known.mean(), known.max(), np.mean(known > SPIKE_MM)], dtype=np.float32)


def _standardised(values: Floats, brain: NDArray[np.bool_]) -> Singles:
    """(..., V) with mean 0 and deviation 1 over all brain values; 0 outside."""
    inside = values[..., brain]
    spread = inside.std()
    found = np.zeros(values.shape, dtype=np.float32)
    found[..., brain] = (inside - inside.mean()) / (spread if spread > 0 else 1.0)
    return found


def features_of_runs(
    store: Store,
    runs: Sequence[int],
    kind: str,
    measure: Callable[[int], Singles],
    cache: Path | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Singles:
    """Features of runs, taken from a file where they were measured before.

    A store's later versions only add or withdraw runs, so rows stay good; those of withdrawn runs leave the file. It is
    readable by its owner only.

    Args:
        store: that holds the runs.
        runs: indices of the runs.
        kind: name of the features: what is measured, and how.
        measure: gives the features of a run by its index; all of one length.
        cache: folder of the files; None keeps none.
        tell: called with runs done and runs in all.

    Returns:
        (runs, D).

    Raises:
        SwiftError: the file is not one of these, or a run cannot be read.
    """
    path = None if cache is None else cache / f"{kind}_{store.attributes['store_id']}.npz"
    present = {run.key for run in store.runs if run.present}
    former = {} if path is None or not path.exists() else _read_rows(path)
    known = {key: row for key, row in former.items() if key in present}
    wanted = [store.runs[run].key for run in runs]
    missing = [(run, key) for run, key in zip(runs, wanted, strict=True) if key not in known]
    for done, (run, key) in enumerate(missing, start=1):
        known[key] = measure(run)
        if tell is not None:
            tell(done, len(missing))
    if path is not None and known.keys() != former.keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        keys = sorted(known)
        np.savez_compressed(stream, run=np.array(keys), features=np.stack([known[key] for key in keys]))
        write_file(path, stream.getvalue(), PRIVATE)
    return np.stack([known[key] for key in wanted])


def _read_rows(path: Path) -> dict[str, Singles]:
    try:
        with np.load(path) as content:
            return dict(zip(content["run"].tolist(), content["features"], strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise SwiftError(f"{path}: no file of features: remove it, it is made anew") from error


def features_of_units(rows: Singles, owner: Sequence[int], units: int) -> Floats:
    """Mean over the runs of each unit of what is known of them.

    Args:
        rows: (runs, D), NaN where unknown.
        owner: place of the unit of each run.
        units: how many there are; NaN for those without runs.
    """
    total, count = np.zeros((units, rows.shape[1])), np.zeros((units, rows.shape[1]))
    known = ~np.isnan(rows)
    np.add.at(total, list(owner), np.where(known, rows, 0.0))
    np.add.at(count, list(owner), known)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


class ClipFeatures:
    """Features of clips, for states that change within a run: nothing outside the clip is looked at.

    Args:
        store: that holds the runs.
        clips: which.
    """

    def __init__(self, store: Store, clips: ClipIndex) -> None:
        self.store, self.clips = store, clips

    def read(self, number: int) -> tuple[Floats, NDArray[np.bool_]]:
        """(T, V) of a clip in source units at its own repetition time, and the run's brain (V,)."""
        run, start = int(self.clips.run[number]), int(self.clips.start[number])
        info = self.store.runs[run]
        weights = time_weights(self.clips.config, info.tr)
        if weights is None:
            stored = self.store.read_bold(run, start, self.clips.frames, self.clips.stride)
        else:
            stored = weights @ self.store.read_bold(run, start, clip_duration(self.clips.config, info.tr)).astype(np.float64)
        return stored.astype(np.float64) * info.slope + info.intercept, self.store.brain(run)

    def mean_image(self, number: int) -> Singles:
        """(V,) mean over the clip's volumes, standardised over its brain."""
        signal, brain = self.read(number)
        return _standardised(signal.mean(axis=0), brain)

    def pattern(self, number: int) -> Singles:
        """(T V,) all volumes of the clip, standardised over its brain and time together."""
        signal, brain = self.read(number)
        return _standardised(signal, brain).ravel()

    def motion(self, number: int) -> Singles:
        """(3,) as `run_motion`, of the clip's volumes."""
        run, start = int(self.clips.run[number]), int(self.clips.start[number])
        moved = self.store.frame_values("framewise_displacement", run)
        return _motion(moved, start, start + clip_duration(self.clips.config, self.store.runs[run].tr))

    def connectivity(self, number: int, measure: Connectivity) -> Singles:
        """`Connectivity` of the clip's volumes."""
        signal, brain = self.read(number)
        config = self.clips.config
        step = (config.target_tr or self.store.runs[int(self.clips.run[number])].tr) * config.stride_within
        return measure.of_frames(signal.astype(np.float32), brain, step)

    def all(self, measure: Callable[[int], Singles]) -> Floats:
        """(clips, D) of one of the measures.

        Raises:
            SwiftError: they would need more memory than is reasonable.
        """
        first = measure(0)
        if first.nbytes * len(self.clips) > MOST_PATTERN_BYTES:
            raise SwiftError(
                f"{len(first)} features of {len(self.clips)} clips need {first.nbytes * len(self.clips) / 1e9:.0f} GB: lower "
                "task.clips_per_run, or leave this baseline out by --methods"
            )
        return np.stack([first, *(measure(number) for number in range(1, len(self.clips)))]).astype(np.float64)
