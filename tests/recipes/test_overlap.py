"""Subjects of the pretraining: found by their salted hashes in any store that has their cohort, else declared unknown."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from swiftv2 import weights
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.data.store.reader import Store
from swiftv2.recipes.export import hashes_of
from swiftv2.recipes.overlap import Overlap, find_overlap

MODEL = {"name": "tiny", "image_size": [32, 32, 32], "frames": 4, "embed_dim": 12, "depths": [1], "num_heads": [2]}
INPUT: dict[str, Any] = {
    "orientation": "RAS",
    "space": None,
    "grid": [32, 32, 32],
    "voxel_mm": [6, 6, 6],
    "tr_seconds": None,
    "frames": 4,
    "normalisation": {},
}


def card(store: Store, subjects: tuple[str, ...]) -> weights.Card:
    tree = {"kind": "encoder", "model": MODEL, "input": INPUT, "subjects": hashes_of(store, subjects)}
    return weights.Card.model_validate(tree)


def test_only_those_that_were_trained_on_count(generated_store: Path) -> None:
    store = Store.open(generated_store)
    seen, others = store.subject_keys[:7], store.subject_keys[7:]
    trained = card(store, seen)
    assert find_overlap(trained, store, seen) == Overlap(known=True, counted=7, asked=7)
    assert find_overlap(trained, store, others) == Overlap(known=True, counted=0, asked=17)
    assert find_overlap(trained, store, [*seen[:2], *seen[:2], *others]) == Overlap(known=True, counted=2, asked=19)
    # The card itself gives nobody away: neither ids nor the store's keys are in it.
    text = trained.model_dump_json()
    names = {name for name in store.subject_ids() if "/" in name}
    assert not [one for one in (*names, *store.subject_keys) if one in text]


@pytest.mark.slow
def test_a_store_with_other_keys_knows_the_same_people(generated_store: Path, tmp_path: Path) -> None:
    """Keys are salted by store; ids within a cohort are what is compared."""
    bids = tmp_path / "bids"
    bids.mkdir()
    for entry in (generated_store.parent / "bids").iterdir():
        if entry.is_file() or entry.name in sorted(p.name for p in entry.parent.glob("sub-*"))[:4]:
            (bids / entry.name).symlink_to(entry)
    for cohort, counted in (("generated", 4), ("elsewhere", 0)):
        build(_copied(bids, tmp_path / cohort), tmp_path / f"{cohort}.zarr", GridConfig(voxel_mm=6), cohort)
        other, first = Store.open(tmp_path / f"{cohort}.zarr"), Store.open(generated_store)
        assert not set(other.subject_keys) & set(first.subject_keys)
        found = find_overlap(card(first, first.subject_keys), other, other.subject_keys)
        assert found == Overlap(known=True, counted=counted, asked=4)


def _copied(bids: Path, folder: Path) -> Path:
    shutil.copytree(bids, folder)
    return folder


def test_what_cannot_be_told_is_said_so(generated_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cohort.zarr"
    shutil.copytree(generated_store, copy)
    store = Store.open(copy)
    trained = card(store, store.subject_keys)
    nameless = trained.model_copy(update={"subjects": None})
    assert find_overlap(nameless, store, store.subject_keys).why == "the weights carry no hashes of their subjects"
    next(copy.glob("*subjects*.json")).unlink()
    found = find_overlap(trained, Store.open(copy), store.subject_keys)
    assert (found.known, found.counted, found.asked) == (False, 0, 24)
    assert "file of ids" in str(found.why)
