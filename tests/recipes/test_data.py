"""What a run finds in its store when it goes on: the same subjects and clips, whatever happened to the store since."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from swiftv2.config.data import GridConfig
from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes.build import build
from swiftv2.data.changes.drop import drop, read_withdrawals
from swiftv2.data.store.reader import Store
from swiftv2.data.synth import generate
from swiftv2.errors import SwiftError, UsageError
from swiftv2.recipes.data import Data, open_data
from swiftv2.recipes.export import write_contract

CONFIG = """
run: {dir: unused}
data: {split: {fractions: [0.6, 0.4, 0.0], families: false}}
clip: {frames: 6, stride_between: 0.5}
model:
  name: tiny
  image_size: [32, 32, 32]
  frames: 6
  embed_dim: 16
  depths: [2]
  num_heads: [2]
  patch_size: [4, 4, 4, 1]
mask: {patch_size: [4, 4, 4, 1]}
train: {max_steps: 8, global_batch: 4}
"""
Opened = Callable[..., Data]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort") / "bids"
    generate(SynthConfig(subjects=12, voxel_mm=6, frames=40, session_share=0.0), folder)
    return folder


@pytest.fixture
def store(files: Path, tmp_path: Path) -> Path:
    build(files, tmp_path / "store", GridConfig(voxel_mm=6), "a", salt="0" * 32)
    return tmp_path / "store"


@pytest.fixture
def opened(store: Path, tmp_path: Path) -> Opened:
    """Opens the store for a run with some settings; `begun` says whether the run directory was begun before."""

    def call(*words: str, begun: bool = False) -> Data:
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG)
        config = load(PretrainConfig, path, [f"data.store={store}", *words])
        data = open_data(config, tmp_path / "run" if begun else None)
        if not begun:
            (tmp_path / "run").mkdir(exist_ok=True)
            write_contract(tmp_path / "run", config, data)
        return data

    return call


def _withdraw(store: Path, subjects: tuple[str, ...]) -> None:
    listed = store.parent / "withdrawn.txt"
    listed.write_text("\n".join(subjects))
    drop(store, read_withdrawals(store, listed))


@pytest.mark.parametrize("gaps", [["clip.gaps=keep"], ["clip.gaps=avoid"], ["clip.gaps=between", "clip.displacement_mm=0.3"]])
def test_clips_keep_their_numbers_over_a_withdrawal_under_every_policy_of_gaps(
    gaps: list[str], store: Path, opened: Opened
) -> None:
    before = opened(*gaps)
    _withdraw(store, (before.splits.train[1], before.splits.val[0]))
    after = opened(*gaps, begun=True)
    assert after.store.version == before.version + 1 == after.version + 1
    assert after.splits == before.splits
    for one, other, gone in ((before.train, after.train, after.withdrawn_train),
                             (before.heldout, after.heldout, after.withdrawn_heldout)):  # fmt: skip
        np.testing.assert_array_equal(one.run, other.run)
        present = np.setdiff1d(np.arange(len(one)), gone)
        np.testing.assert_array_equal(one.start[present], other.start[present])
        assert 0 < len(gone) < len(one)
    positions = np.arange(40, 40 + 2 * len(before.train))
    assert not np.isin(after.order(0, 40, []).clips_at(positions), after.withdrawn_train).any()


def test_gaps_make_a_difference(opened: Opened) -> None:
    lengths = {gaps: len(opened(f"clip.gaps={gaps}").train) for gaps in ("keep", "avoid", "between")}
    assert lengths["avoid"] < lengths["keep"]
    assert lengths["avoid"] <= lengths["between"]


@pytest.mark.parametrize(("part", "named"), [("train", "training"), ("val", "held-out")])
def test_a_run_of_which_nobody_is_left_says_so(part: str, named: str, store: Path, opened: Opened) -> None:
    before = opened()
    _withdraw(store, before.splits.part(part))  # type: ignore[arg-type]
    with pytest.raises(SwiftError, match=f"all its {named} subjects were withdrawn"):
        opened(begun=True)


def test_another_store_is_told_from_a_later_version(store: Path, opened: Opened, files: Path) -> None:
    opened()
    other = store.with_name("other")
    build(files, other, GridConfig(voxel_mm=6), "b", salt="0" * 32)
    with pytest.raises(SwiftError, match="was begun on another store"):
        opened(f"data.store={other}", begun=True)


def test_cleaned_runs_are_refused_where_a_global_scale_would_mean_something_else(
    store: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_opened = Store.open(store)
    for run in store_opened.runs[:5]:
        object.__setattr__(run, "cleaned", True)
    monkeypatch.setattr(Store, "open", lambda _: store_opened)
    with pytest.raises(UsageError, match=r"5 of 12 runs are cleaned already.*data\.allow_cleaned=true"):
        opened()
    for words in (["data.normalisation.kind=per_voxel"], ["data.normalisation.kind=none"], ["data.allow_cleaned=true"]):
        assert len(opened(*words).train)
