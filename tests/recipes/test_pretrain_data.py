"""What happens to a run when its data are damaged, withdrawn or added to, by real processes on real BOLD."""

import json
import shutil
from pathlib import Path
from typing import Any

import nitime
import numpy as np
import pytest
from ranks import swiftv2_run
from test_pretrain import CONFIG, losses, pretrain

from swiftv2.cli import main
from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store
from swiftv2.recipes.data import open_data
from swiftv2.records import read_lines, read_metrics

pytestmark = pytest.mark.slow

FILES = Path(nitime.__file__).parent / "data"
QUARANTINE = ("data.on_bad_clip=quarantine", "data.quarantine_limit=0.6")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == kind]


def copied(store: Path, folder: Path) -> Path:
    return Path(shutil.copytree(store, folder / "copy.zarr"))


def damage(store: Path, run: Run, frame: int) -> None:
    """Flip a bit of the chunk that holds a frame of a run."""
    path = layout.bold_shards(store, run.dtype, run.row)[0]
    data = bytearray(path.read_bytes())
    data[int(frame / run.frames * 0.9 * len(data))] ^= 4
    path.write_bytes(data)


def in_part(run: Path, part: str) -> set[str]:
    return set(json.loads((run / "contract.json").read_text())["splits"][part])


def test_damaged_clips_end_the_run_by_name_or_are_left_out_by_all_ranks(config: Path, real_store: Path, tmp_path: Path) -> None:
    steps = ("train.max_steps=12", "train.save_every=5", "train.evaluate_every=12")
    pretrain(config, real_store, tmp_path / "sound", "train.max_steps=1")
    store = copied(real_store, tmp_path)
    bad = next(run for run in Store.open(store).runs if run.subject in in_part(tmp_path / "sound", "train"))
    damage(store, bad, 15)

    failed = swiftv2_run(["pretrain", str(config), f"data.store={store}", f"run.dir={tmp_path / 'failed'}", *steps], ranks=2)
    assert failed.returncode == 1
    assert f"run {bad.key}, frames " in failed.stderr
    assert "checksum" in failed.stderr

    for ranks in (1, 2):
        pretrain(config, store, tmp_path / f"ranks{ranks}", *steps, *QUARANTINE, ranks=ranks)
    first, second = (events(tmp_path / name, "quarantined") for name in ("ranks1", "ranks2"))
    told = [{key: e[key] for key in ("step", "clip", "position", "run", "first", "last", "reason")} for e in first]
    assert told == [{key: e[key] for key in told[0]} for e in second]
    assert {e["run"] for e in first} == {bad.key}
    assert len({e["clip"] for e in first}) == len(first) > 1
    assert all(e["position"] == 4 * (e["step"] - 1) for e in first), "an exclusion holds from the first sample of its step"
    np.testing.assert_allclose(losses(tmp_path / "ranks2"), losses(tmp_path / "ranks1"), rtol=5e-6)
    assert [row["clips_left_out"] for row in read_metrics(tmp_path / "ranks2" / "metrics.jsonl")][-1] == len(first)

    # Gone on with from step 5, on another number of ranks, it is the same run.
    again = Path(shutil.copytree(tmp_path / "ranks2", tmp_path / "again"))
    shutil.rmtree(again / "checkpoints" / "step_12")
    shutil.rmtree(again / "checkpoints" / "step_10")
    pretrain(config, store, again, *steps, *QUARANTINE, ranks=1)
    np.testing.assert_allclose(losses(again), losses(tmp_path / "ranks1"), rtol=5e-6)

    crowded = ["pretrain", str(config), f"data.store={store}", f"run.dir={tmp_path / 'limit'}", *steps, QUARANTINE[0]]
    refused = swiftv2_run(crowded, ranks=1)
    assert refused.returncode == 1
    assert "more than data.quarantine_limit allows" in refused.stderr


def test_damaged_held_out_clips_are_counted(config: Path, real_store: Path, tmp_path: Path) -> None:
    pretrain(config, real_store, tmp_path / "sound", "train.max_steps=1")
    store = copied(real_store, tmp_path)
    damage(store, next(run for run in Store.open(store).runs if run.subject in in_part(tmp_path / "sound", "val")), 15)
    pretrain(config, store, tmp_path / "run", "train.max_steps=1", *QUARANTINE, ranks=2)
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["clips_left_out"] > 0
    sound = json.loads((tmp_path / "sound" / "evaluation.json").read_text())
    assert sound["clips_left_out"] == 0
    assert report["loss"] == pytest.approx(sound["loss"], rel=0.5)


def add(store: Path, tmp_path: Path, subjects: range, cohort: str) -> None:
    files = tmp_path / f"files-{cohort}"
    files.mkdir()
    for subject in subjects:
        (files / f"sub-{subject}_bold.nii.gz").symlink_to(FILES / f"fmri{1 + subject % 2}.nii.gz")
    assert main(["store", "append", f"{files}/*.nii.gz", str(store), "--cohort", cohort, "grid.space=native-nitime"]) == 0


def test_a_run_goes_on_over_appended_and_withdrawn_runs(config: Path, real_store: Path, tmp_path: Path) -> None:
    """The same samples as without, but those of the withdrawn subject from the resumed step on."""
    store = copied(real_store, tmp_path)
    add(store, tmp_path, range(3, 9), "nitime")
    begun_on = Path(shutil.copytree(store, tmp_path / "begun.zarr"))
    run = tmp_path / "run"
    pretrain(config, store, run, "train.max_steps=4", "schedule.kind=constant")
    before = in_part(run, "train")
    withdrawn = min(before)
    gone = tmp_path / "gone.txt"
    gone.write_text(withdrawn + "\n")
    add(store, tmp_path, range(20, 24), "later")
    assert main(["store", "drop", str(store), "--subjects", str(gone)]) == 0
    pretrain(config, store, run, "train.max_steps=8", "schedule.kind=constant", ranks=2)
    assert in_part(run, "train") == before
    newest = max((run / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    exclusions = json.loads((newest / "trainer.json").read_text())["exclusions"]
    assert {position for _, position, _ in exclusions} == {16}
    told = events(run, "data")
    assert told[0]["clips"] == told[1]["clips"], "clips keep their numbers"
    assert told[1]["store_version_now"] == told[0]["store_version_now"] + 2
    assert told[1]["withdrawn_clips"]["train"] == len(exclusions) > 0

    words = [f"run.dir={run}", "train.max_steps=8", "schedule.kind=constant"]
    before_all, after_all = (
        open_data(load(PretrainConfig, config, [f"data.store={path}", *words]), folder)
        for path, folder in ((begun_on, None), (store, run))
    )
    for one, other in ((before_all.train, after_all.train), (before_all.heldout, after_all.heldout)):
        np.testing.assert_array_equal(one.run, other.run)
        np.testing.assert_array_equal(one.start, other.start)
    positions = np.arange(3 * len(before_all.train))
    plain, mended = (data.order(0, 16, []).clips_at(positions) for data in (before_all, after_all))
    held = (positions >= 16) & np.isin(plain, after_all.withdrawn_train)
    np.testing.assert_array_equal(plain[~held], mended[~held])
    assert held.any()
    assert not np.isin(mended[held], after_all.withdrawn_train).any()

    refused = swiftv2_run(["pretrain", str(config), f"data.store={real_store}", f"run.dir={run}", "train.max_steps=9"])
    assert refused.returncode == 1
    assert "was begun on another store" in refused.stderr


def test_cohorts_are_mixed_as_asked_and_every_epoch_says_so(config: Path, real_store: Path, tmp_path: Path) -> None:
    store = copied(real_store, tmp_path)
    add(store, tmp_path, range(3, 9), "other")
    words = ("train.max_steps=15", "data.mixing={kind: weights, weights: {nitime: 3, other: 1}}", "clip.target_tr=2.0")
    pretrain(config, store, tmp_path / "run", *words, "clip.frames=6", ranks=2)
    epochs = events(tmp_path / "run", "epoch")
    assert [e["epoch"] for e in epochs] == list(range(len(epochs)))
    assert len(epochs) > 1
    for epoch in epochs:
        counts = epoch["samples"]
        assert counts["nitime"] == pytest.approx(3 * counts["other"], abs=3)
    card = json.loads((tmp_path / "run" / "contract.json").read_text())
    assert card["input"]["tr_seconds"] == 2.0
