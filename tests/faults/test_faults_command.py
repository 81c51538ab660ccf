"""The command itself on real BOLD: its store vanishes and comes back, a clip is damaged, ranks are killed."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from crew import Job, command, events, once
from endings import assert_readable, assert_same_end

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run
from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.recipes.data import open_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = """
data:
  normalisation: {kind: per_voxel}
  split: {fractions: [0.5, 0.5, 0.0]}
  prefetch: 2
clip: {frames: 8, stride_between: 0.5}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 16
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
  drop_path: 0.1
mask: {patch_size: [2, 3, 2, 2]}
optimizer: {lr: 2e-3}
schedule: {warmup_steps: 5}
engine: {precision: fp32, device: cpu}
train: {max_steps: 40, global_batch: 4, save_every: 4, evaluate_every: 20, deepspeed_files: false}
"""
STEPS = 40
QUARANTINE = ("data.on_bad_clip=quarantine", "data.quarantine_limit=0.6")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture
def store(real_store: Path, tmp_path: Path) -> Path:
    """A store that may be damaged and moved."""
    return Path(shutil.copytree(real_store, tmp_path / "mounted" / "real.zarr"))


def _words(config: Path, store: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", str(config), f"data.store={store}", f"run.dir={run}", *more]


def _complete(config: Path, store: Path, run: Path, *more: str) -> Job:
    with command(run, _words(config, store, run, *more)) as one:
        assert one.wait(120) == [0, 0], one.said()[-3000:]
    return one


def test_the_store_vanishes_and_comes_back(config: Path, store: Path, tmp_path: Path) -> None:
    """Away for too long: one line, and the same command goes on. Away for a while: waited for, nothing filled in."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    mounted, elsewhere = store.parent, tmp_path / "elsewhere"
    with command(run, _words(config, store, run, "data.patience_seconds=2")) as one:
        one.until_step(6)
        mounted.rename(elsewhere)
        assert one.wait(120) == [75, 75], one.said()[-3000:]
        said = [line for rank in range(2) for line in one.lines(rank) if "data.patience_seconds" in line]
        assert any(str(store) in line for line in said), one.said()[-3000:]
    elsewhere.rename(mounted)
    assert_readable(run)
    reached = list_checkpoints(run)[0].step
    with command(run, _words(config, store, run)) as one:
        one.until_step(reached + 3)
        mounted.rename(elsewhere)
        one.until(lambda: "cannot be reached" in one.said(), "a line that says that the store is away")
        elsewhere.rename(mounted)
        assert one.wait(120) == [0, 0], one.said()[-3000:]
        assert "is back after" in one.said()
    assert once(events(run, "resumed"))["step"] == reached
    _complete(config, store, undisturbed)
    assert_same_end(run, undisturbed, STEPS)


def _damage(store: Path, run: Run, frame: int) -> None:
    """Flip a bit of the chunk that holds a frame of a run."""
    path = layout.bold_shards(store, run.dtype, run.row)[0]
    data = bytearray(path.read_bytes())
    data[int(frame / run.frames * 0.9 * len(data))] ^= 4
    path.write_bytes(data)


def test_a_damaged_clip_is_left_out_also_when_ranks_are_killed(
    config: Path, store: Path, real_store: Path, tmp_path: Path
) -> None:
    """The end is that of the run that nobody killed, and of one on the sound store told to leave the same clips out."""
    run, told = tmp_path / "run", tmp_path / "told"
    plain = (*QUARANTINE, "engine.backend=plain")
    data = open_data(load(PretrainConfig, config, [f"data.store={store}", f"run.dir={run}"]))
    for row in set(data.train.run.tolist()):
        _damage(store, data.store.runs[row], 15)
    for killed in (1, 0):
        with command(run, _words(config, store, run, *plain)) as one:
            resumed = list_checkpoints(run)
            one.until_step((resumed[0].step if resumed else 0) + 6)
            one.send(signal.SIGKILL, killed)
            statuses = one.wait(60)
        assert statuses[killed] == -signal.SIGKILL
        assert statuses[1 - killed] == 75, one.said()[-3000:]
        assert "the same command goes on from the last checkpoint" in once(one.lines(1 - killed))
    _complete(config, store, run, *plain)
    assert events(run, "quarantined")
    _complete(config, real_store, told, "engine.backend=plain", f"data.exclude={run / 'exclusions.json'}")
    assert events(told, "quarantined") == []
    assert_same_end(run, told, STEPS)
    left_out = [list_checkpoints(one)[0].trainer().exclusions for one in (run, told)]
    assert [one.clip for one in left_out[0]] == [one.clip for one in left_out[1]] != []


def test_a_rank_that_dies_before_training_begins_is_not_waited_for(config: Path, real_store: Path, tmp_path: Path) -> None:
    """Ranks build their backends together: DeepSpeed's new groups would wait half an hour for one that is gone."""
    run = tmp_path / "run"
    with command(run, _words(config, real_store, run, "faults.hang_seconds=6")) as one:
        one.until((run / "contract.json").exists, "the last that is done before")
        time.sleep(0.3)  # Both import DeepSpeed now.
        one.send(signal.SIGKILL, 1)
        assert one.wait(90) == [75, -signal.SIGKILL], one.said()[-3000:]
    assert_readable(run)
