"""The brain's shape: tissue and network maps from what nilearn ships, sampled on any voxel lattice.

Arrays are in (z, y, x) order, RAS+: the order of a NIfTI file's bytes, so that no run is ever transposed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from swiftv2.data.grid import mni152_grid

Array = NDArray[np.float32]

SPACE = "MNI152NLin2009cAsym"
MASTER_MM = 2.0
ROI_SIGMA_MM = 8.0
WINDOW_CENTRE_MM = (0.0, -18.0, 6.0)

SPLIT_NETWORKS = ("DefaultMode", "FrontoParietal", "Visual")
NETWORKS = (
    "Auditory",
    "CinguloOpercular",
    "DefaultModeAnterior",
    "DefaultModePosterior",
    "DorsalAttention",
    "FrontoParietalAnterior",
    "FrontoParietalPosterior",
    "MedialTemporalLobe",
    "ParietoMedial",
    "Reward",
    "Salience",
    "SomatomotorDorsal",
    "SomatomotorLateral",
    "VentralAttention",
    "VisualAnterior",
    "VisualPosterior",
    "unassigned",
)
"""Networks of the Seitzman 300 regions; the three largest are split at the median of their regions' y."""

TISSUES = ("mask", "grey", "white", "ventricles")


@dataclass(frozen=True)
class Lattice:
    """A box of cubic voxels: `shape` (z, y, x) voxels, the first centred at `origin` (x, y, z) in mm."""

    shape: tuple[int, int, int]
    origin: tuple[float, float, float]
    voxel_mm: float

    def affine(self, las: bool) -> NDArray[np.float64]:
        """The NIfTI affine (4 x 4) of the box in RAS or LAS voxel order."""
        affine = np.diag([self.voxel_mm, self.voxel_mm, self.voxel_mm, 1.0])
        affine[:3, 3] = self.origin
        if las:
            affine[0, 0] = -self.voxel_mm
            affine[0, 3] += (self.shape[2] - 1) * self.voxel_mm
        return affine

    def axes(self) -> tuple[Array, Array, Array]:
        """World coordinates in mm along z, y and x, shaped to broadcast."""
        z, y, x = (
            (start + self.voxel_mm * np.arange(n)).astype(np.float32)
            for start, n in zip(reversed(self.origin), self.shape, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]


@dataclass(frozen=True)
class Atlas:
    """Maps (M, z, y, x) float32 at 2 mm: the tissues, then the networks; `origin` is the first voxel's centre in mm."""

    maps: Array
    origin: tuple[float, float, float]

    def sample(self, lattice: Lattice, shift: NDArray[np.float64], scale: float) -> Array:
        """Every map (M, z, y, x) on a lattice, with the brain grown by `scale` about its centre, then moved by `shift` mm.

        Outside the maps the value is 0.
        """
        centre = np.array(WINDOW_CENTRE_MM)
        first = (np.array(lattice.origin) - shift - centre) / scale + centre
        offset = ((first - np.array(self.origin)) / MASTER_MM)[::-1]
        step = np.full(3, lattice.voxel_mm / scale / MASTER_MM)
        out = np.empty((len(self.maps), *lattice.shape), np.float32)
        for source, target in zip(self.maps, out, strict=True):
            ndimage.affine_transform(source, step, offset, lattice.shape, output=target, order=1)
        return out


def window_lattice(voxel_mm: float, low: tuple[int, int, int], high: tuple[int, int, int]) -> Lattice:
    """The store's window on its own lattice, without `low` voxels at the start and `high` at the end of x, y and z."""
    grid = mni152_grid(voxel_mm, "RAS", SPACE)
    nx, ny, nz = (n - a - b for n, a, b in zip(grid.shape, low, high, strict=True))
    x, y, z = (float(grid.matrix[axis, 3]) + low[axis] * voxel_mm for axis in range(3))
    return Lattice((nz, ny, nx), (x, y, z), voxel_mm)


def brain_margins(atlas: Atlas, voxel_mm: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Empty voxels of the window before and after the template's brain along x, y and z."""
    whole = window_lattice(voxel_mm, (0, 0, 0), (0, 0, 0))
    mask = Atlas(atlas.maps[:1], atlas.origin).sample(whole, np.zeros(3), 1.0)[0] > 0.5
    low, high = [], []
    for axis in (2, 1, 0):
        filled = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low.append(int(filled[0]))
        high.append(int(mask.shape[axis] - 1 - filled[-1]))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def load_atlas(voxel_mm: float) -> Atlas:
    """The maps, smoothed to the resolution at which they will be sampled (FWHM of one voxel)."""
    from nilearn import datasets  # Seconds to import: workers, who are handed the maps, do without.

    brain = datasets.load_mni152_brain_mask(resolution=1)
    origin = brain.affine[:3, 3] + 0.5
    sigma = np.sqrt(max(voxel_mm**2 - MASTER_MM**2, 0.0)) / 2.355 / MASTER_MM
    grey, white = datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1)
    tissue = [ndimage.gaussian_filter(_halve(image), sigma) for image in (brain, grey, white)]
    tissue = [tissue[0], *(np.minimum(t, tissue[0]) for t in tissue[1:])]
    lattice = Lattice(tissue[0].shape, (origin[0], origin[1], origin[2]), MASTER_MM)
    regions = datasets.fetch_coords_seitzman_2018(ordered_regions=True)
    places = np.array([[roi["x"], roi["y"], roi["z"]] for _, roi in regions["rois"].iterrows()], float)
    networks = _network_maps(tissue[1], lattice, places, np.asarray(regions["networks"], object))
    maps = [*tissue, _ventricle_growth(tissue, lattice), *networks]
    return Atlas(np.stack(maps).astype(np.float32), lattice.origin)


def _halve(image: Any) -> Array:
    """A 1 mm image as 2 mm block means in (z, y, x) order."""
    data = np.asarray(image.dataobj, np.float32).T
    nz, ny, nx = (n // 2 for n in data.shape)
    data = data[: 2 * nz, : 2 * ny, : 2 * nx]
    mean: Array = data.reshape(nz, 2, ny, 2, nx, 2).mean(axis=(1, 3, 5))
    return mean


def _ventricle_growth(tissue: list[Array], lattice: Lattice) -> Array:
    """Share of each voxel that turns into fluid where the lateral ventricles are large; the left one grows more."""
    z, y, x = lattice.axes()
    near = (np.abs(x) < 28) & (y > -48) & (y < 36) & (z > -8) & (z < 32)
    fluid = np.clip(tissue[0] - tissue[1] - tissue[2], 0, 1) * near
    wide = ndimage.grey_dilation(fluid, size=(5, 5, 5))
    growth: Array = np.clip(wide - fluid, 0, 1) * np.where(x < 0, 1.0, 0.7)
    return growth


def _network_maps(grey: Array, lattice: Lattice, places: NDArray[np.float64], labels: NDArray[np.object_]) -> list[Array]:
    """For each network the sum of Gaussians at its regions and their mirror images, times grey matter; largest 1.

    Args:
        grey: share of grey matter (z, y, x).
        lattice: of `grey`.
        places: centres (300, 3) of the regions in mm.
        labels: network of each region (300,).
    """
    names = labels.copy()
    for name in SPLIT_NETWORKS:
        middle = np.median(places[labels == name, 1])
        names[(labels == name) & (places[:, 1] > middle)] = name + "Anterior"
        names[(labels == name) & (places[:, 1] <= middle)] = name + "Posterior"
    z, y, x = lattice.axes()
    maps = []
    for name in NETWORKS:
        px, py, pz = places[names == name].T
        along_z, along_y, along_x = (
            np.exp(-0.5 * ((axis.reshape(1, -1) - place[:, None]) / ROI_SIGMA_MM) ** 2)
            for axis, place in ((z, pz), (y, py), (x, px))
        )
        along_x += np.exp(-0.5 * ((x.reshape(1, -1) + px[:, None]) / ROI_SIGMA_MM) ** 2)
        planes = (along_z[:, :, None] * along_y[:, None, :]).reshape(len(px), -1)
        total = (planes.T @ along_x).reshape(lattice.shape) * grey
        maps.append(total / np.percentile(total, 99.9))
    return maps
