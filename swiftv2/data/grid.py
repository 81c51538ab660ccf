"""The one fixed window in world coordinates to which a store brings every run, and how a file's voxels fall into it."""

from dataclasses import dataclass
from typing import Any, Self

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from swiftv2.config.data import GridConfig
from swiftv2.errors import SwiftError, UsageError

CUBE_MM = 192.0
NOMINAL_CORNER_MM = (-96.0, -113.0, -91.0)
"""Lower corner (R, A, S) of the cube that is centred on the MNI152 brain mask; the lattice moves it by half a voxel at most."""
TOLERANCE_VOXELS = 0.01
"""How far a file's voxel centre may lie from the grid's for the two to count as one."""
SLACK_MM = 5.0
"""Room between the centred cube and the brain mask, along the axis where it is smallest."""

# nibabel's functions for axes carry no annotations.
orientations: Any = nib.orientations

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """A box of voxels in world coordinates.

    Attributes:
        kind: `mni152` (the fixed cube) or `source` (the first run's own grid).
        shape: voxels along the three axes (H, W, D).
        affine: 4 x 4, voxel index to world millimetres (R, A, S positive), row by row.
        orientation: direction in which the three indices grow, `RAS` or `LAS`.
        space: template space, such as MNI152NLin2009cAsym.
        voxel_mm: edges of a voxel in mm along the three axes.
    """

    kind: str
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    orientation: str
    space: str
    voxel_mm: tuple[float, float, float]

    @property
    def matrix(self) -> FloatArray:
        """The affine as a (4, 4) float64 array."""
        return np.asarray(self.affine, dtype=np.float64)

    @property
    def size(self) -> int:
        """Voxels of the whole box, H x W x D."""
        return int(np.prod(self.shape))

    def indices(self, voxels: npt.NDArray[np.integer]) -> IntArray:
        """Three indices (V, 3) of flat C-order voxel numbers (V,)."""
        return np.stack(np.unravel_index(voxels.astype(np.int64), self.shape), axis=1).astype(np.int64)

    def world(self, voxels: npt.NDArray[np.integer]) -> FloatArray:
        """World coordinates (V, 3) in mm (R, A, S) of the centres of flat C-order voxel numbers (V,)."""
        return _apply(self.matrix, self.indices(voxels).astype(np.float64))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, as the store's attributes hold them."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "affine": [list(row) for row in self.affine],
            "orientation": self.orientation,
            "space": self.space,
            "voxel_mm": list(self.voxel_mm),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        height, width, depth = (int(n) for n in value["shape"])
        edge_0, edge_1, edge_2 = (float(edge) for edge in value["voxel_mm"])
        return cls(
            kind=str(value["kind"]),
            shape=(height, width, depth),
            affine=tuple(tuple(float(x) for x in row) for row in value["affine"]),
            orientation=str(value["orientation"]),
            space=str(value["space"]),
            voxel_mm=(edge_0, edge_1, edge_2),
        )


def _apply(affine: FloatArray, points: FloatArray) -> FloatArray:
    """Points (N, 3) through a (4, 4) affine."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def _lattice_phase(space: str, voxel_mm: float) -> float:
    """World coordinate, modulo voxel_mm, of the lower edges of the template's voxels.

    TemplateFlow's MNI152NLin2009c* grids (1 mm from -96, 2 mm from -96.5) keep their edges at half millimetres; FSL's
    MNI152NLin6Asym (1 and 2 mm) keeps a voxel centre on the origin, and so do the nilearn and SPM grids.
    """
    return 0.5 if space.startswith("MNI152NLin2009c") else voxel_mm / 2


def mni152_grid(voxel_mm: float, orientation: str, space: str) -> Grid:
    """The 192 mm cube around the MNI152 brain, on the voxel lattice of the template's own files.

    Args:
        voxel_mm: voxel edge in mm; it must divide 192.
        orientation: RAS or LAS.
        space: an MNI152 template space.

    Raises:
        UsageError: the space is not an MNI152 one, or the voxel edge does not divide the cube or is too coarse.
    """
    if not space.startswith("MNI152"):
        raise UsageError(f"grid.kind=mni152 cannot hold the space '{space}': name an MNI152 space or say grid.kind=source")
    count = round(CUBE_MM / voxel_mm)
    if abs(count * voxel_mm - CUBE_MM) > 1e-6 or voxel_mm > 2 * SLACK_MM:
        raise UsageError(f"grid.voxel_mm={voxel_mm:g} does not divide the 192 mm cube: 1, 1.5, 1.6, 2, 2.4, 3, 4, 6 do")
    phase = _lattice_phase(space, voxel_mm)
    corner = [round((low - phase) / voxel_mm) * voxel_mm + phase for low in NOMINAL_CORNER_MM]
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = np.asarray(corner) + voxel_mm / 2
    return _oriented("mni152", (count, count, count), affine, orientation, space)


def source_grid(shape: tuple[int, int, int], affine: FloatArray, orientation: str, space: str) -> Grid:
    """A file's own grid, its axes reordered and flipped (never resampled) to `orientation`."""
    return _oriented("source", shape, affine, orientation, space)


def _oriented(kind: str, shape: tuple[int, int, int], affine: FloatArray, orientation: str, space: str) -> Grid:
    have = orientations.io_orientation(affine)
    want = orientations.axcodes2ornt(tuple(orientation))
    transform = orientations.ornt_transform(have, want)
    turned = affine @ orientations.inv_ornt_aff(transform, shape)
    axes = np.argsort(transform[:, 0])
    new_shape = tuple(int(shape[axis]) for axis in axes)
    edges = np.sqrt((turned[:3, :3] ** 2).sum(axis=0))
    return Grid(
        kind=kind,
        shape=(new_shape[0], new_shape[1], new_shape[2]),
        affine=tuple(tuple(float(x) + 0.0 for x in row) for row in turned),
        orientation=orientation,
        space=space,
        voxel_mm=(float(edges[0]), float(edges[1]), float(edges[2])),
    )


def template_voxels(grid: Grid) -> npt.NDArray[np.int32]:
    """Flat C-order voxel numbers (V,), ascending, whose centres lie in nilearn's MNI152 brain mask.

    Raises:
        SwiftError: the mask reaches beyond the grid.
    """
    from nilearn.datasets import load_mni152_brain_mask

    image = load_mni152_brain_mask(resolution=1)
    mask = np.asarray(image.dataobj) > 0
    everything = np.arange(grid.size, dtype=np.int64)
    there = _apply(np.linalg.inv(np.asarray(image.affine)), grid.world(everything))
    share = ndimage.map_coordinates(mask.astype(np.float32), there.T, order=1, mode="constant", cval=0.0)
    kept = (share >= 0.5).reshape(grid.shape)
    faces = [kept.take(end, axis=axis).any() for axis in range(3) for end in (0, -1)]
    if any(faces):
        raise SwiftError(f"the MNI152 brain mask reaches beyond the {grid.shape} grid: choose a finer grid.voxel_mm")
    return np.flatnonzero(kept.ravel()).astype(np.int32)


def kept_voxels(grid: Grid, mask: str) -> npt.NDArray[np.int32]:
    """The voxels of the store: the template's brain (`template`) or all of the box (`box`), flat, C order, ascending."""
    return template_voxels(grid) if mask == "template" else np.arange(grid.size, dtype=np.int32)


def make_grid(config: GridConfig, space: str, first: tuple[tuple[int, int, int], FloatArray] | None = None) -> Grid:
    """The grid that the configuration asks for.

    Args:
        config: the configured grid.
        space: template space of the runs.
        first: shape and affine of the first run; needed by `grid.kind=source`.
    """
    if config.kind == "mni152":
        return mni152_grid(config.voxel_mm, config.orientation, space)
    if first is None:
        raise SwiftError("grid.kind=source needs at least one readable run")
    return source_grid(first[0], first[1], config.orientation, space)


@dataclass(frozen=True)
class Placement:
    """Where the kept voxels of a grid lie in one file.

    Attributes:
        exact: whether they fall on the file's own voxel centres.
        coordinates: (V, 3) float64, indices in the file.
        inside: (V,) bool, whether the file's field of view holds the voxel.
        flat: (V,) int64, first-axis-fastest voxel number in the file (0 outside); of the nearest voxel where not exact.
        sigma: standard deviation, in voxels along the file's axes, of the Gaussian that must precede interpolation so that
            detail finer than the grid does not come back as false coarse detail; 0 where the file is not finer.
    """

    exact: bool
    coordinates: FloatArray
    inside: BoolArray
    flat: IntArray
    sigma: tuple[float, float, float] = (0.0, 0.0, 0.0)


def place(grid: Grid, voxels: npt.NDArray[np.integer], shape: tuple[int, int, int], affine: FloatArray) -> Placement:
    """Find the kept voxels (V,) of the grid in a file of the given spatial shape and affine.

    The affine alone decides: flips and permutations of the file's axes come out as another order of reading.
    """
    mapping = np.linalg.inv(affine) @ grid.matrix
    turn = np.rint(mapping[:3, :3])
    middle = (np.asarray(grid.shape, dtype=np.float64) - 1) / 2
    wanted = mapping[:3, :3] @ middle + mapping[:3, 3]
    shift = np.rint(wanted - turn @ middle)
    corners = np.asarray(list(np.ndindex(2, 2, 2))) * (np.asarray(grid.shape) - 1)
    drift = corners @ (mapping[:3, :3] - turn).T + (mapping[:3, 3] - shift)
    permutes = bool(np.array_equal(np.abs(turn).sum(axis=0), np.ones(3)) and abs(round(float(np.linalg.det(turn)))) == 1)
    exact = permutes and float(np.abs(drift).max()) <= TOLERANCE_VOXELS
    index = grid.indices(voxels).astype(np.float64)
    coordinates = index @ turn.T + shift if exact else _apply(mapping, index)
    extent = np.asarray(shape, dtype=np.float64)
    # A voxel belongs to the field of view up to its faces, half an index beyond its centre.
    inside = np.all((coordinates >= -0.5) & (coordinates <= extent - 0.5), axis=1)
    nearest = np.clip(np.rint(coordinates), 0, extent - 1).astype(np.int64)
    flat = nearest[:, 0] + shape[0] * (nearest[:, 1] + shape[1] * nearest[:, 2])
    sigma = (0.0, 0.0, 0.0) if exact else _antialiasing(mapping[:3, :3])
    return Placement(exact, coordinates, inside, np.where(inside, flat, 0), sigma)


def _antialiasing(steps: FloatArray) -> tuple[float, float, float]:
    """Sigma, in file voxels, along each axis of a file: sqrt(ratio^2 - 1) / 2.355, so that fine voxels get as wide as coarse.

    The rule (Cardoso et al., MICCAI 2015, "Scale factor point spread function matching"; torchio's too) takes a voxel for a
    Gaussian whose full width at half maximum is its edge. Stripes one voxel wide, which a grid of twice the edge cannot
    hold, are left with 14 % of their height, and what it can just hold with 52 %. scikit-image's (ratio - 1) / 2 would
    leave 57 % of the stripes as a false pattern, and all of them for 2 mm onto 3 mm.

    Args:
        steps: (3, 3), file voxels along each of the file's axes (rows) for one grid voxel along each of the grid's.
    """
    ratios = np.sqrt((steps**2).sum(axis=1))
    finer = ratios > 1.0 + TOLERANCE_VOXELS
    first, second, third = np.where(finer, np.sqrt(np.maximum(ratios**2 - 1.0, 0.0) / (8 * np.log(2))), 0.0)
    return float(first), float(second), float(third)
