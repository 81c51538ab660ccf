import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.data import GridConfig
from swiftv2.data.grid import Grid, kept_voxels, make_grid, mni152_grid, place, source_grid, template_voxels
from swiftv2.errors import UsageError

FSL, FMRIPREP = "MNI152NLin6Asym", "MNI152NLin2009cAsym"


def affine_at(voxel_mm: float, corner: tuple[float, float, float], left: bool = False) -> np.ndarray:
    affine = np.diag([-voxel_mm if left else voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = corner
    return affine


@pytest.mark.parametrize("space", [FSL, FMRIPREP])
@pytest.mark.parametrize("voxel_mm", [3.0, 4.0, 6.0])
def test_cube_holds_the_whole_template_mask(space: str, voxel_mm: float) -> None:
    grid = mni152_grid(voxel_mm, "RAS", space)
    voxels = template_voxels(grid)
    assert grid.shape == (round(192 / voxel_mm),) * 3
    assert (np.diff(voxels) > 0).all()
    assert voxels.dtype == np.int32
    litres = len(voxels) * voxel_mm**3 / 1e6
    assert 1.85 < litres < 1.92  # the mask has 1.883 litres at 1 mm


def test_las_keeps_the_same_places_as_ras() -> None:
    right, left = (mni152_grid(6.0, orientation, FSL) for orientation in ("RAS", "LAS"))
    places = [sorted(map(tuple, grid.world(template_voxels(grid)))) for grid in (right, left)]
    assert places[0] == places[1]
    assert left.matrix[0, 0] == -6.0


@pytest.mark.parametrize(
    ("space", "shape", "affine"),
    [
        (FSL, (91, 109, 91), affine_at(2, (90, -126, -72), left=True)),
        (FSL, (91, 109, 91), affine_at(2, (-90, -126, -72))),
        (FMRIPREP, (97, 115, 97), affine_at(2, (-96.5, -132.5, -78.5))),
    ],
)
def test_standard_files_at_2_mm_need_no_resampling(space: str, shape: tuple[int, int, int], affine: np.ndarray) -> None:
    grid = mni152_grid(2.0, "RAS", space)
    voxels = kept_voxels(grid, "template")
    placement = place(grid, voxels, shape, affine)
    assert placement.exact
    assert placement.inside.all()


def test_half_a_millimetre_off_is_not_exact() -> None:
    grid = mni152_grid(2.0, "RAS", FSL)
    voxels = kept_voxels(grid, "box")
    assert not place(grid, voxels, (97, 115, 97), affine_at(2, (-96.5, -132.5, -78.5))).exact


@pytest.mark.parametrize(("fine", "ratio"), [(1.0, 6.0), (3.0, 2.0), (4.0, 1.5)])
def test_fine_files_are_smoothed_to_the_width_of_the_grids_voxels(fine: float, ratio: float) -> None:
    grid = mni152_grid(6.0, "RAS", FSL)
    turn = np.eye(4)
    turn[:2, :2] = [[0.6, -0.8], [0.8, 0.6]]  # an oblique file has the same voxels
    for affine in (affine_at(fine, (-90, -126, -72)), turn @ affine_at(fine, (-90, -126, -72), left=True)):
        placement = place(grid, kept_voxels(grid, "box"), (10, 10, 10), affine)
        width = np.asarray(placement.sigma) * np.sqrt(8 * np.log(2))  # full width at half maximum, in voxels of the file
        np.testing.assert_allclose(np.sqrt(width**2 + 1), ratio)


@pytest.mark.parametrize("edges", [(6.0, 6.0, 6.0), (8.0, 7.0, 6.02)])
def test_coarse_files_need_no_smoothing(edges: tuple[float, float, float]) -> None:
    grid = mni152_grid(6.0, "RAS", FSL)
    affine = np.diag([*edges, 1.0])
    affine[:3, 3] = 0.7
    assert place(grid, kept_voxels(grid, "box"), (10, 10, 10), affine).sigma == (0.0, 0.0, 0.0)


def test_only_fine_axes_are_smoothed() -> None:
    grid = mni152_grid(6.0, "RAS", FSL)
    affine = np.diag([6.0, 6.0, 3.0, 1.0])
    sigma = place(grid, kept_voxels(grid, "box"), (10, 10, 10), affine).sigma
    assert sigma == pytest.approx((0.0, 0.0, np.sqrt(3 / (8 * np.log(2)))))


@pytest.mark.parametrize("voxel_mm", [5.0, 7.0, 12.0, 96.0])
def test_voxels_that_do_not_divide_the_cube_are_refused(voxel_mm: float) -> None:
    with pytest.raises(UsageError, match="does not divide"):
        mni152_grid(voxel_mm, "RAS", FSL)


def test_other_templates_are_refused() -> None:
    with pytest.raises(UsageError, match=r"grid\.kind=source"):
        mni152_grid(2.0, "RAS", "Talairach")


@settings(max_examples=60, deadline=None)
@given(
    axes=st.permutations([0, 1, 2]),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    shift=st.tuples(*[st.integers(-3, 3)] * 3),
    orientation=st.sampled_from(["RAS", "LAS"]),
)
def test_any_axis_order_finds_the_same_places(
    axes: list[int], flips: tuple[bool, ...], shift: tuple[int, ...], orientation: str
) -> None:
    grid = Grid("source", (4, 5, 6), mni152_grid(6.0, orientation, FSL).affine, orientation, FSL, (6.0, 6.0, 6.0))
    voxels = kept_voxels(grid, "box")
    base = affine_at(6.0, tuple(grid.matrix[:3, 3] + 6.0 * np.asarray(shift)))
    shape = (7, 9, 11)
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for target, axis in enumerate(axes):
        turn[axis, target] = -1 if flips[target] else 1
        turn[axis, 3] += shape[target] - 1 if flips[target] else 0
    affine = base @ turn
    placement = place(grid, voxels, shape, affine)
    assert placement.exact
    volume = np.asarray(list(itertools.product(*map(range, shape))), dtype=float) @ affine[:3, :3].T + affine[:3, 3]
    flat = volume.reshape(*shape, 3).transpose(2, 1, 0, 3).reshape(-1, 3)  # first axis fastest
    np.testing.assert_allclose(flat[placement.flat][placement.inside], grid.world(voxels)[placement.inside], atol=1e-9)
    low, high = flat.min(axis=0) - 1e-6, flat.max(axis=0) + 1e-6
    world = grid.world(voxels)
    np.testing.assert_array_equal(placement.inside, ((world >= low) & (world <= high)).all(axis=1))


def test_source_grid_turns_axes_without_moving_voxels() -> None:
    affine = affine_at(4.0, (32.0, -40.0, 0.0), left=True)
    grid = source_grid((17, 21, 3), affine, "RAS", "scanner")
    assert grid.shape == (17, 21, 3)
    np.testing.assert_allclose(grid.matrix[:3, 3], (32.0 - 64.0, -40.0, 0.0))
    assert source_grid((17, 21, 3), affine, "LAS", "scanner").matrix.tolist() == affine.tolist()


def test_json_round_trip() -> None:
    grid = make_grid(GridConfig(voxel_mm=4.0, orientation="LAS"), FMRIPREP)
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid
