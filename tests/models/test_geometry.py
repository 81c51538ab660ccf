"""Windows, shifts, padding and masks, held to definitions written out token by token."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.config.model import ModelConfig
from swiftv2.models.geometry import (
    REGION_PENALTY,
    Grid,
    WindowSpec,
    attention_mask,
    block_specs,
    partition,
    split_axes,
    stage_grids,
)

CPU = torch.device("cpu")
grids = st.tuples(*[st.integers(1, 7)] * 4)
windows = st.tuples(*[st.integers(1, 4)] * 4)


@given(grids, windows, st.booleans(), st.booleans(), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_split_then_join_is_the_identity(grid: Grid, window: Grid, shifted: bool, mask: bool, batch: int) -> None:
    spec = WindowSpec.fit(grid, window, shifted, mask)
    cut = partition(spec, batch, CPU, torch.float32)
    rows = torch.randn(batch * math.prod(grid), 2, dtype=torch.float64, requires_grad=True)
    split = cut.split(rows)
    assert split.shape == (spec.windows, spec.length, batch, 2)
    assert torch.equal(cut.join(split), rows)
    # Padding is zero, so the sum of squares and its gradient know nothing of it.
    (gradient,) = torch.autograd.grad(split.square().sum(), rows)
    torch.testing.assert_close(gradient, 2 * rows.detach())
    assert int((split.detach().abs().sum(-1) > 0).sum()) == rows.shape[0]


@given(grids, windows, st.booleans())
@settings(max_examples=40, deadline=None)
def test_gathers_differentiate_as_autograd_would(grid: Grid, window: Grid, shifted: bool) -> None:
    cut = partition(WindowSpec.fit(grid, window, shifted, mask_padding=True), 2, CPU, torch.float64)
    count = 2 * math.prod(grid)
    split = cut.split(torch.eye(count, dtype=torch.float64)).reshape(-1, count)
    cotangent = torch.randn(split.shape[0], 1, dtype=torch.float64)
    rows = torch.randn(count, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((cut.split(rows).reshape(-1, 1) * cotangent).sum(), rows)
    torch.testing.assert_close(gradient, split.T @ cotangent)
    padded = torch.randn(split.shape[0], 1, dtype=torch.float64, requires_grad=True)
    shape = (cut.spec.windows, cut.spec.length, 2, 1)
    back = torch.randn(count, 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((cut.join(padded.view(shape)) * back).sum(), padded)
    torch.testing.assert_close(gradient, split @ back)


def expected_logit(spec: WindowSpec, query: tuple[int, ...], key: tuple[int, ...]) -> float:
    """What is added to the logit of two positions of the shifted, padded grid."""
    for axis in range(4):
        source = (key[axis] + spec.shift[axis]) % spec.padded[axis]
        if spec.mask_padding and source >= spec.grid[axis]:
            return -math.inf

    def region(position: tuple[int, ...]) -> tuple[int, ...]:
        bounds = [(s - w, s - h) if h else (s, s) for s, w, h in zip(spec.padded, spec.window, spec.shift, strict=True)]
        return tuple(sum(p >= b for b in pair) for p, pair in zip(position, bounds, strict=True))

    return 0.0 if region(query) == region(key) else REGION_PENALTY


@given(st.tuples(*[st.integers(1, 5)] * 4), st.tuples(*[st.integers(1, 3)] * 4), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_masks_are_those_of_the_definition(grid: Grid, window: Grid, shifted: bool, mask_padding: bool) -> None:
    spec = WindowSpec.fit(grid, window, shifted, mask_padding)
    position = torch.from_numpy(np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), -1)).double()
    cut = partition(spec, 1, CPU, torch.float64)
    source = cut.split(position + 1)[:, :, 0].long() - 1  # -1 marks padding
    counts = [n // w for n, w in zip(spec.padded, spec.window, strict=True)]
    by_first_real_token = {}
    for place in itertools.product(*map(range, counts)):
        cells = [
            tuple(p * w + o for p, w, o in zip(place, spec.window, offset, strict=True))
            for offset in itertools.product(*map(range, spec.window))
        ]
        rolled = [tuple((c + s) % n for c, s, n in zip(cell, spec.shift, spec.padded, strict=True)) for cell in cells]
        real = [token if all(t < g for t, g in zip(token, grid, strict=True)) else (-1,) * 4 for token in rolled]
        by_first_real_token[tuple(real)] = cells
    mask = attention_mask(spec, CPU, torch.float64)
    for index in range(spec.windows):
        cells = by_first_real_token[tuple(tuple(token) for token in source[index].tolist())]
        expected = torch.tensor([[expected_logit(spec, q, k) for k in cells] for q in cells], dtype=torch.float64)
        if index < cut.free_windows:
            assert not expected.any()
        else:
            assert mask is not None
            assert expected.any(), "a window that needs no mask was given one"
            assert torch.equal(mask[index - cut.free_windows, 0], expected)


@given(grids, windows, st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_row_is_masked_throughout(grid: Grid, window: Grid, shifted: bool) -> None:
    mask = attention_mask(WindowSpec.fit(grid, window, shifted, mask_padding=True), CPU, torch.float32)
    assert mask is None or bool(torch.isfinite(mask).any(-1).all())


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


def test_unshifted_blocks_without_padding_carry_no_mask() -> None:
    spec = WindowSpec.fit((8, 8, 8, 20), (4, 4, 4, 4), shifted=False, mask_padding=True)
    assert attention_mask(spec, CPU, torch.float32) is None
    shifted = WindowSpec.fit((8, 8, 8, 20), (4, 4, 4, 4), shifted=True, mask_padding=True)
    assert partition(shifted, 1, CPU, torch.float32).free_windows == 4  # the inner one of 2 x 2 x 2, four times in time


def test_tensors_made_while_inferring_serve_training() -> None:
    spec = WindowSpec.fit((5, 3, 2, 7), (2, 2, 2, 3), shifted=True, mask_padding=True)
    with torch.inference_mode():
        partition(spec, 3, CPU, torch.float32)
    rows = torch.randn(3 * 210, 1, requires_grad=True)
    split = partition(spec, 3, CPU, torch.float32).split(rows)
    assert bool((torch.autograd.grad(split.sum(), rows)[0] == 1).all())


@pytest.mark.parametrize("sizes", [(2, 3), (1, 6)])
def test_split_axes(sizes: tuple[int, int]) -> None:
    x = torch.arange(72).reshape(2, 6, 6)
    cells = split_axes(x, 1, sizes)
    a, b = sizes
    assert cells.shape == (2, 6 // a, a, 6 // b, b)
    assert torch.equal(cells.reshape(2, 6, 6), x)
