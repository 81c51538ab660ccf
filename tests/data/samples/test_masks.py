import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swiftv2.config.model import MaskConfig
from swiftv2.data import keyed
from swiftv2.data.samples.masks import (
    brain_cells,
    brain_ratio,
    cell_counts,
    draw_mask,
    expand_mask,
    masked_count,
    voxel_cells,
)
from swiftv2.errors import UsageError

GRID = (7, 6, 5)
CELL = (3, 2, 2, 2)
small = st.integers(1, 4)


def _rng(*ids: int) -> np.random.Generator:
    return keyed.generator(0, "mask", *ids)


@settings(deadline=None)
@given(
    st.tuples(small, small, small, st.integers(1, 6)),
    st.sampled_from(["random", "tube", "temporal"]),
    st.sampled_from(["brain", "all"]),
    st.sampled_from(["last", "random"]),
    st.integers(1, 99),
    st.integers(0, 1000),
)
def test_the_count_is_the_ceiling_of_the_share(
    cells: tuple[int, int, int, int], kind: str, among: str, choice: str, percent: int, seed: int
) -> None:
    config = MaskConfig.model_validate({"kind": kind, "ratio": percent / 100, "among": among, "temporal_choice": choice})
    brain = np.random.default_rng(seed).random(cells[:3]) < 0.6
    places = int(brain.sum()) if among == "brain" else math.prod(cells[:3])
    units = {"random": places * cells[3], "tube": places, "temporal": cells[3]}[kind]
    count = -((-percent * units) // 100)
    assume(places > 0 and count < units)
    mask = draw_mask(config, cells, brain, _rng(seed))
    assert mask.shape == cells
    assert mask.sum() == count * {"random": 1, "tube": cells[3], "temporal": places}[kind]
    if among == "brain":
        assert not mask[~brain].any()
    if kind == "tube":
        assert (mask == mask[..., :1]).all()
    if kind == "temporal":
        frames = np.flatnonzero(mask.reshape(-1, cells[3]).sum(0))
        assert len(frames) == count
        assert choice == "random" or frames[0] == cells[3] - count
    np.testing.assert_array_equal(mask, draw_mask(config, cells, brain, _rng(seed)))


@pytest.mark.parametrize("kind", ["random", "tube"])
def test_every_cell_is_hidden_equally_often(kind: str) -> None:
    cells, draws = (3, 2, 2, 2), 2000
    config = MaskConfig.model_validate({"kind": kind, "ratio": 0.5, "among": "all"})
    brain = np.ones(cells[:3], dtype=np.bool_)
    share = np.mean([draw_mask(config, cells, brain, _rng(i)) for i in range(draws)], axis=0)
    assert np.abs(share - 0.5).max() < 4.5 * math.sqrt(0.25 / draws)


def test_the_ratio_counts_as_it_is_written() -> None:
    assert 0.55 * 100 > 55
    assert masked_count(0.55, 100) == 55
    assert all(masked_count(r / 10, n) == math.ceil(Fraction(r, 10) * n) for r in range(1, 10) for n in range(500))


@pytest.mark.parametrize("kind", ["random", "tube", "temporal"])
def test_a_mask_that_would_leave_nothing_visible_is_refused(kind: str) -> None:
    config = MaskConfig.model_validate({"kind": kind, "ratio": 0.9})
    with pytest.raises(UsageError, match="hides all of the"):
        draw_mask(config, (2, 1, 1, 1), np.array([[[True]], [[False]]]), _rng())


def test_a_mask_without_brain_is_refused() -> None:
    with pytest.raises(UsageError, match="0 places"):
        draw_mask(MaskConfig(), (2, 2, 2, 4), np.zeros((2, 2, 2), dtype=np.bool_), _rng())


voxel_sets = st.sets(st.integers(0, math.prod(GRID) - 1), min_size=1, max_size=60).map(sorted)


@settings(deadline=None)
@given(voxel_sets)
def test_cells_hold_the_voxels_that_lie_in_them(voxels: list[int]) -> None:
    cells = brain_cells(np.array(voxels), GRID, CELL)
    assert cells.shape == (3, 3, 3) == cell_counts(GRID, 1, CELL)[:3]
    expected = np.zeros((3, 3, 3), dtype=np.bool_)
    for voxel in voxels:
        x, y, z = np.unravel_index(voxel, GRID)
        expected[x // 3, y // 2, z // 2] = True
    np.testing.assert_array_equal(cells, expected)
    assert cells.reshape(-1)[voxel_cells(np.array(voxels), GRID, CELL)].all()


@settings(deadline=None)
@given(voxel_sets, st.integers(1, 7), st.integers(0, 1000))
def test_expanding_looks_up_each_voxel_s_cell(voxels: list[int], frames: int, seed: int) -> None:
    counts = cell_counts(GRID, frames, CELL)
    rng = np.random.default_rng(seed)
    mask = rng.random((2, *counts)) < 0.5
    hidden = expand_mask(torch.from_numpy(mask), torch.tensor(voxels), GRID, CELL, frames)
    dense = mask.repeat(3, 1).repeat(2, 2).repeat(2, 3).repeat(2, 4)[:, : GRID[0], : GRID[1], : GRID[2], :frames]
    np.testing.assert_array_equal(hidden.numpy(), dense.reshape(2, -1, frames)[:, voxels].transpose(0, 2, 1))


def test_brain_ratio_counts_brain_voxels_only() -> None:
    hidden = torch.tensor([[[True, True, False], [False, True, False]]] * 2)
    brain = torch.tensor([[True, False, True], [False, False, False]])
    torch.testing.assert_close(brain_ratio(hidden, brain), torch.tensor([0.25, 0.0]))
