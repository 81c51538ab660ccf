"""Grids of the stages, windows and shifts, and patches that hold brain."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.model import ModelConfig
from swiftv2.models.geometry import WindowSpec, block_specs, patches_with_brain, split_axes, stage_grids


def test_a_short_axis_takes_its_own_length_and_no_shift() -> None:
    spec = WindowSpec.fit((8, 4, 3, 10), (4, 4, 4, 4), shifted=True, mask_padding=True)
    assert (spec.window, spec.shift, spec.padded) == ((4, 4, 3, 4), (2, 0, 0, 2), (8, 4, 3, 12))


def test_the_last_stage_spans_its_grid_and_never_shifts() -> None:
    config = ModelConfig(name="x")
    assert stage_grids(config) == [(16, 16, 16, 10), (8, 8, 8, 10), (4, 4, 4, 10), (2, 2, 2, 10)]
    (spec,) = block_specs(config, 3, 1, (2, 2, 2, 10))
    assert (spec.window, spec.shift) == ((2, 2, 2, 4), (0, 0, 0, 0))
    (spec,) = block_specs(config, 0, 1, (16, 16, 16, 10))
    assert spec.shift == (2, 2, 2, 2)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 6)])
def test_split_axes(sizes: tuple[int, int]) -> None:
    x = torch.arange(72).reshape(2, 6, 6)
    cells = split_axes(x, 1, sizes)
    a, b = sizes
    assert cells.shape == (2, 6 // a, a, 6 // b, b)
    assert torch.equal(cells.reshape(2, 6, 6), x)


@given(st.tuples(*[st.integers(1, 7)] * 3), st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_patch_holds_brain_where_any_of_its_voxels_does(
    size: tuple[int, int, int], patch: tuple[int, int, int], seed: int
) -> None:
    brain = np.random.default_rng(seed).random((2, *size)) < 0.2
    expected = np.zeros((2, *(-(-n // p) for n, p in zip(size, patch, strict=True))), dtype=bool)
    for clip, *voxel in np.argwhere(brain):
        expected[(clip, *(v // p for v, p in zip(voxel, patch, strict=True)))] = True
    assert np.array_equal(patches_with_brain(torch.from_numpy(brain), patch).numpy(), expected)
