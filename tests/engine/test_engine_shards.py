"""The state in pieces: whatever number of ranks wrote it, any other reads the same numbers."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from swiftv2.engine.shards import SavedState, Snapshot, Stretch, shard_name, write_shard
from swiftv2.errors import SwiftError

Shapes = dict[str, tuple[int, ...]]


def _save(folder: Path, tensors: dict[str, torch.Tensor], ranks: int, adam_steps: int = 3) -> None:
    """Every rank keeps a stretch of the concatenation of all tensors, as ZeRO's flat partitions are cut."""
    total = sum(t.numel() for t in tensors.values())
    for rank in range(ranks):
        low, high = total * rank // ranks, total * (rank + 1) // ranks
        stretches, begin = [], 0
        for key, tensor in tensors.items():
            start, stop = max(low - begin, 0), min(high - begin, tensor.numel())
            if start < stop:
                stretches.append(Stretch(key, start, tensor.reshape(-1)[start:stop]))
            begin += tensor.numel()
        shapes = {key: tuple(tensors[key].shape) for key, _, _ in stretches}
        write_shard(folder / shard_name(rank, ranks), stretches, shapes, adam_steps)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=0, max_size=3), min_size=1, max_size=5),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], writers: int, readers: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"weight/{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    _save(folder, tensors, writers)
    with SavedState(folder) as saved:
        assert saved.adam_steps == 3
        for key, tensor in tensors.items():
            assert torch.equal(saved.whole(key), tensor)
            count = tensor.numel()
            cuts = [count * part // readers for part in range(readers + 1)]
            parts = [saved.read(key, low, high - low) for low, high in itertools.pairwise(cuts) if low < high]
            assert torch.equal(torch.cat(parts), tensor.reshape(-1))


def test_formats_survive_and_the_file_is_what_the_hash_says(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    stretches = [Stretch(f"other/{i}", 0, torch.tensor([1, 0, 1]).to(kind)) for i, kind in enumerate(kinds)]
    path = tmp_path / shard_name(0, 1)
    written = write_shard(path, stretches, {key: (3,) for key, _, _ in stretches}, 0)
    assert (written.size, written.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)  # the library's own reader
    for key, _, values in stretches:
        assert loaded[key].dtype == values.dtype
        assert torch.equal(loaded[key], values)


def test_a_missing_shard_is_told_by_the_tensor_that_it_held(tmp_path: Path) -> None:
    _save(tmp_path, {"weight/a": torch.arange(4.0), "weight/b": torch.arange(4.0)}, 4)
    (tmp_path / shard_name(2, 4)).unlink()
    with pytest.raises(SwiftError, match="weight/b is not whole"):
        SavedState(tmp_path)


def test_a_folder_without_state_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SwiftError, match="no state of ours"):
        SavedState(tmp_path)
    path = tmp_path / shard_name(0, 1)
    path.parent.mkdir()
    path.write_bytes(b"\x10" * 64)
    with pytest.raises(SwiftError, match="not a shard of a state"):
        SavedState(tmp_path)


def test_a_snapshot_does_not_follow_what_it_was_taken_of() -> None:
    values = torch.zeros(5)
    snapshot = Snapshot()
    taken = snapshot.take(iter([Stretch("weight/a", 0, values)]), lambda: None)
    values += 1
    assert torch.equal(taken[0].values, torch.zeros(5))
    again = snapshot.take(iter([Stretch("weight/a", 0, values)]), lambda: None)
    assert again[0].values.data_ptr() == taken[0].values.data_ptr(), "the memory is used again"
    assert torch.equal(again[0].values, torch.ones(5))
