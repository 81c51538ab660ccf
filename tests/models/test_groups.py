"""Attention groups and buckets, held to definitions written out token by token."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftv2.models.geometry import Grid, WindowSpec
from swiftv2.models.groups import REGION_PENALTY, attention_groups, bucket_lengths, slot_sources, slot_tokens
from swiftv2.models.tokens import TokenSet

grids = st.tuples(*[st.integers(1, 7)] * 4)
windows = st.tuples(*[st.integers(1, 4)] * 4)


def tokens_of(grid: Grid, seed: int, share: float, batch: int | None) -> TokenSet:
    kept = np.random.default_rng(seed).random((batch or 1, *grid)) < share
    kept[:, 0, 0, 0, 0] = True
    return TokenSet.shared(kept[0]) if batch is None else TokenSet.per_sample(kept)


def along_axes(spec: WindowSpec) -> list[list[set[int]]]:
    """Places that attend to one another along each axis: a shifted axis is cut at shift, shift + window, ..."""
    axes = []
    for size, window, shift in zip(spec.grid, spec.window, spec.shift, strict=True):
        cells = [{i for i in range(size) if (i - shift) // window == cell} for cell in range(-1, size // window + 1)]
        axes.append([cell for cell in cells if cell])
    return axes


@given(grids, windows, st.booleans(), st.integers(0, 99), st.sampled_from([0.1, 0.6, 1.0]), st.sampled_from([None, 1, 3]))
@settings(max_examples=80, deadline=None)
def test_groups_are_the_regions_of_the_windows(
    grid: Grid, window: Grid, shifted: bool, seed: int, share: float, batch: int | None
) -> None:
    spec = WindowSpec.fit(grid, window, shifted, mask_padding=True)
    tokens = tokens_of(grid, seed, share, batch)
    sample = np.zeros(len(tokens), dtype=int) if tokens.sample is None else tokens.sample
    places = list(zip(sample.tolist(), *(axis.tolist() for axis in tokens.coordinates), strict=True))
    expected = set()
    for one in range(batch or 1):
        for h, w, d, t in itertools.product(*along_axes(spec)):
            members = frozenset(p for p in places if p[0] == one and p[1] in h and p[2] in w and p[3] in d and p[4] in t)
            expected |= {members} if members else set()
    buckets = attention_groups(tokens, spec, 4, 24)
    found = [frozenset(places[t] for t in row if t >= 0) for bucket in buckets for row in bucket.slots]
    filled = [group for group in found if group]
    assert len(filled) == len(set(filled))
    assert set(filled) == expected
    assert sorted(t for t in slot_tokens(buckets) if t >= 0) == list(range(len(tokens)))
    for bucket in buckets:
        padded = (bucket.slots < 0) & (bucket.slots >= 0).any(1, keepdims=True)
        assert (bucket.bias is None) == (not padded.any() and batch is None)
        if bucket.bias is not None:
            assert np.array_equal(np.isneginf(bucket.bias[:, 0, 0]), padded)
            assert np.isfinite(bucket.bias).any(-1).all(), "a query without any key is not a number"


def expected_logit(spec: WindowSpec, query: tuple[int, ...], key: tuple[int, ...]) -> float:
    """What SwiFT v1 adds to the logit of two positions of the shifted, padded grid."""

    def region(position: tuple[int, ...]) -> tuple[int, ...]:
        bounds = [(s - w, s - h) if h else (s, s) for s, w, h in zip(spec.padded, spec.window, spec.shift, strict=True)]
        return tuple(sum(p >= b for b in pair) for p, pair in zip(position, bounds, strict=True))

    return 0.0 if region(query) == region(key) else REGION_PENALTY


@given(st.tuples(*[st.integers(1, 5)] * 4), st.tuples(*[st.integers(1, 3)] * 4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_swift_v1_takes_whole_windows_and_its_penalty(grid: Grid, window: Grid, shifted: bool) -> None:
    spec = WindowSpec.fit(grid, window, shifted, mask_padding=False)
    buckets = attention_groups(TokenSet.dense(grid), spec, 8, 12)
    rows = [
        (row.tolist(), None if bucket.bias is None else bucket.bias[index, 0])
        for bucket in buckets
        for index, row in enumerate(bucket.slots)
    ]
    by_tokens = {tuple(slots): bias for slots, bias in rows}
    counts = [n // w for n, w in zip(spec.padded, spec.window, strict=True)]
    assert len(rows) == math.prod(counts)
    for place in itertools.product(*map(range, counts)):
        cells = [
            tuple(p * w + o for p, w, o in zip(place, spec.window, offset, strict=True))
            for offset in itertools.product(*map(range, spec.window))
        ]
        rolled = [tuple((c + s) % n for c, s, n in zip(cell, spec.shift, spec.padded, strict=True)) for cell in cells]
        slots = tuple(
            int(np.ravel_multi_index(token, grid)) if all(t < g for t, g in zip(token, grid, strict=True)) else -1
            for token in rolled
        )
        expected = np.array([[expected_logit(spec, q, k) for k in cells] for q in cells], dtype=np.float32)
        bias = by_tokens[slots]
        assert np.array_equal(np.zeros_like(expected) if bias is None else bias, expected)
        assert (bias is None) == (not expected.any()), "masks belong to windows that need one, and to these alone"


@given(st.lists(st.integers(1, 256), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from([12, 36, 384]))
@settings(max_examples=60, deadline=None)
def test_bucket_lengths_cost_least(sizes: list[int], buckets: int, width: int) -> None:
    counts = np.array(sizes)
    lengths = bucket_lengths(counts, buckets, width)
    possible = sorted({-(-n // 8) * 8 if max(sizes) > 8 else n for n in sizes})
    assert len(lengths) <= buckets
    assert list(lengths) == sorted(set(lengths))

    def cost(chosen: tuple[int, ...]) -> float:
        padded = [min(c for c in chosen if c >= n) for n in sizes]
        return sum(n * (6.0 * width + n) for n in padded)

    if len(possible) > 9:
        possible = possible[-9:]
        sizes = [n for n in sizes if n > possible[0] - 8]
        lengths = bucket_lengths(np.array(sizes), buckets, width)
    best = min(
        cost((*chosen, possible[-1]))
        for number in range(min(buckets, len(possible)))
        for chosen in itertools.combinations(possible[:-1], number)
    )
    assert cost(tuple(int(n) for n in lengths)) == pytest.approx(best)


def test_regions_of_unpadded_windows_need_no_mask() -> None:
    """Halving a window of 4^4 along any axes gives 256, 128, 64, 32, 16 tokens: five exact lengths."""
    spec = WindowSpec.fit((16, 16, 16, 20), (4, 4, 4, 4), shifted=True, mask_padding=True)
    buckets = attention_groups(TokenSet.dense((16, 16, 16, 20)), spec, 8, 36)
    assert {bucket.length: len(bucket.slots) for bucket in buckets} == {256: 108, 128: 270, 64: 252, 32: 104, 16: 16}
    assert all(bucket.bias is None for bucket in buckets)
    assert len(slot_tokens(buckets)) == 16**3 * 20


def test_overhanging_windows_are_not_computed() -> None:
    """10 times under a window of 4 were padded to 12: the last window is half as long, and nothing is padded."""
    buckets = attention_groups(TokenSet.dense((8, 8, 8, 10)), WindowSpec.fit((8, 8, 8, 10), (4,) * 4, False, True), 8, 96)
    assert {bucket.length: len(bucket.slots) for bucket in buckets} == {256: 16, 128: 8}
    assert all(bucket.bias is None for bucket in buckets)


def test_masks_of_their_own_come_in_fewer_shapes() -> None:
    """Subjects' masks differ in every batch; groups are filled up so that kernels see fewer shapes than masks have."""
    rng = np.random.default_rng(0)
    places = np.stack(np.meshgrid(*[np.arange(16) - 7.5] * 3, indexing="ij"), axis=-1)
    spec = WindowSpec.fit((16, 16, 16, 4), (4,) * 4, False, True)
    lengths, exact, shapes = set(), set(), set()
    for _ in range(60):
        kept = ((places - rng.uniform(-1, 1, 3)) ** 2).sum(-1) < rng.uniform(40, 50)
        tokens = TokenSet.per_sample(np.broadcast_to(kept[None, ..., None], (1, 16, 16, 16, 4)))
        buckets = attention_groups(tokens, spec, 8, 36)
        assert all(bucket.bias is not None for bucket in buckets), "a mask that comes and goes is compiled for anew"
        lengths |= {bucket.length for bucket in buckets}
        exact.add(tuple(int((bucket.slots >= 0).any(1).sum()) for bucket in buckets))
        shapes.add(tuple(bucket.slots.shape for bucket in buckets))
    assert lengths <= {32 * n for n in range(1, 9)}
    assert len(shapes) < len(exact)


def test_padding_repeats_its_own_group() -> None:
    """A NaN of one sample must not reach another one through padded slots."""
    tokens = tokens_of((4, 3, 2, 3), 1, 0.5, 3)
    buckets = attention_groups(tokens, WindowSpec.fit((4, 3, 2, 3), (2, 2, 2, 2), True, True), 2, 12)
    assert tokens.sample is not None
    sources, filled = slot_sources(buckets), slot_tokens(buckets)
    assert np.array_equal(sources[filled >= 0], filled[filled >= 0])
    place = 0
    for bucket in buckets:
        for row in bucket.slots:
            group = sources[place : place + len(row)]
            place += len(row)
            if (row >= 0).any():
                assert len(set(tokens.sample[group])) == 1


def test_pieces_hold_the_same_groups() -> None:
    (bucket,) = attention_groups(TokenSet.dense((4, 4, 2, 3)), WindowSpec.fit((4, 4, 2, 3), (1, 1, 1, 2), False, True), 1, 12)
    pieces = bucket.pieces(10)
    assert [len(piece.slots) for piece in pieces] == [10] * 6 + [4]
    assert np.array_equal(np.concatenate([piece.slots for piece in pieces]), bucket.slots)
    assert bucket.bias is not None
    assert np.array_equal(np.concatenate([piece.bias for piece in pieces if piece.bias is not None]), bucket.bias)
