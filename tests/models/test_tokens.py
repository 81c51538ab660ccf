"""Token sets and their parents."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.models.tokens import TokenSet


@given(st.tuples(*[st.integers(1, 5)] * 3, st.integers(1, 3)), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_parents_know_their_children(grid: tuple[int, int, int, int], seed: int, own: bool) -> None:
    kept = np.random.default_rng(seed).random((2, *grid)) < 0.4
    kept[:, 0, 0, 0, 0] = True
    tokens = TokenSet.per_sample(kept) if own else TokenSet.shared(kept[0])
    parents, children = tokens.merged()
    samples = range(2) if own else [0]
    index = {}
    for token in range(len(tokens)):
        sample = 0 if tokens.sample is None else int(tokens.sample[token])
        index[(sample, *(int(axis[token]) for axis in tokens.coordinates))] = token
    expected = {}
    coarse = (*(-(-n // 2) for n in grid[:3]), grid[3])
    for sample, (h, w, d, t) in itertools.product(samples, itertools.product(*map(range, coarse))):
        own_children = [
            index.get((sample, 2 * h + i, 2 * w + j, 2 * d + k, t), -1) for i, j, k in itertools.product(range(2), repeat=3)
        ]
        if max(own_children) >= 0:
            expected[sample, h, w, d, t] = own_children
    assert parents.grid == coarse
    owners = np.zeros(len(parents), dtype=int) if parents.sample is None else parents.sample
    found = {
        (int(owners[i]), *(int(axis[i]) for axis in parents.coordinates)): children[i].tolist() for i in range(len(parents))
    }
    assert found == expected


def test_rows_lie_by_cell_then_sample() -> None:
    kept = np.zeros((2, 1, 1, 2, 2), dtype=bool)
    kept[0, 0, 0, 1, 0] = kept[1, 0, 0, 0, 1] = True
    tokens = TokenSet.per_sample(kept)
    assert tokens.cells.tolist() == [2, 1]
    assert tokens.rows(2).tolist() == [4, 3]
    assert TokenSet.dense((1, 1, 2, 2)).rows(5).tolist() == [0, 1, 2, 3]
