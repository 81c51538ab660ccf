"""Pretraining on real BOLD, by real processes: resumed as if nothing had happened, equal however it is spread."""

import json
import re
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ranks import Launcher, kill, swiftv2_run, swiftv2_started

from swiftv2 import weights
from swiftv2.cli import main
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.data.store.reader import Store
from swiftv2.engine.checkpoint import read_weights
from swiftv2.records import read_metrics

pytestmark = pytest.mark.slow

CONFIG = """
data:
  normalisation: {kind: per_voxel}
  split: {fractions: [0.5, 0.5, 0.0]}
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
train: {max_steps: 8, global_batch: 4, save_every: 2, keep_last: 20, evaluate_every: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def pretrain(config: Path, store: Path, run: Path, *words: str, ranks: int = 1, launcher: Launcher = "torchrun") -> None:
    done = swiftv2_run(
        ["pretrain", str(config), f"data.store={store}", f"run.dir={run}", *words], ranks=ranks, launcher=launcher
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def final_weights(run: Path, step: int = 8) -> dict[str, torch.Tensor]:
    return read_weights(run / "checkpoints" / f"step_{step}")


def test_two_ranks_killed_at_a_random_step_go_on_bit_for_bit(config: Path, real_store: Path, tmp_path: Path) -> None:
    pretrain(config, real_store, tmp_path / "undisturbed", ranks=2)
    run = tmp_path / "killed"
    words = ["pretrain", str(config), f"data.store={real_store}", f"run.dir={run}"]
    # From step 3 on the checkpoint of step 2 is there to go on from.
    kill_at = int(np.random.default_rng(time.time_ns()).integers(3, 8))
    with swiftv2_started(words, ranks=2) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and len(read_metrics(metrics)) >= kill_at:
                break
            time.sleep(0.005)
        kill(process.pid)
    reached = len(read_metrics(run / "metrics.jsonl"))
    pretrain(config, real_store, run, ranks=2)

    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert reached >= 8 or "resumed" in events, f"killed at step {kill_at}, {reached} steps seen, {events}"
    assert losses(run) == losses(tmp_path / "undisturbed")
    expected, found = final_weights(tmp_path / "undisturbed"), final_weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_losses_are_the_same_however_the_batch_is_spread(config: Path, real_store: Path, tmp_path: Path) -> None:
    """1 rank plain, 1 rank ZeRO-2, 2 ranks, 2 ranks with accumulation: 30 steps in fp32.

    Sums over 4 clips are taken in another order; relative differences of some 1e-7 a step grow a little with training.
    """
    steps = ("train.max_steps=30", "train.evaluate_every=30", "train.save_every=30")
    pretrain(config, real_store, tmp_path / "plain", "engine.backend=plain", *steps)
    reference = np.array(losses(tmp_path / "plain"))
    assert reference[-5:].mean() < reference[:5].mean()
    spreads = {"zero": (1, None), "two": (2, None), "accumulated": (2, 1)}
    for name, (ranks, micro) in spreads.items():
        words = [*steps, f"train.micro_batch={micro or 'null'}"]
        pretrain(config, real_store, tmp_path / name, *words, ranks=ranks)
        np.testing.assert_allclose(losses(tmp_path / name), reference, rtol=5e-6, err_msg=name)
        for key in ("loss_ratio", "total/brain_tokens", "total/flops"):
            kept, found = (
                [(row["step"], row[key]) for row in read_metrics(tmp_path / one / "metrics.jsonl") if key in row]
                for one in ("plain", name)
            )
            assert kept
            np.testing.assert_allclose(found, kept, rtol=5e-6, err_msg=f"{key} of {name}")


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_the_same_command_under_each_launcher(
    launcher: Launcher, config: Path, real_store: Path, tmp_path: Path, alone: list[float]
) -> None:
    pretrain(config, real_store, tmp_path / launcher, "train.max_steps=4", ranks=2, launcher=launcher)
    np.testing.assert_allclose(losses(tmp_path / launcher), alone, rtol=5e-6)
    recorded = json.loads((tmp_path / launcher / "environment.json").read_text())
    assert recorded["world_size"] == 2


@pytest.fixture
def alone(config: Path, real_store: Path, tmp_path: Path) -> list[float]:
    pretrain(config, real_store, tmp_path / "alone", "train.max_steps=4", launcher="alone")
    return losses(tmp_path / "alone")


def test_a_run_leaves_all_that_the_contract_names_and_exports_its_weights(
    config: Path, real_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pretrain(config, real_store, run)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "events.jsonl", "resume.sh", "evaluation.json"):
        assert (run / name).is_file(), name
    checkpoint = run / "checkpoints" / "step_8"
    assert {"manifest.json", "trainer.json", "state", "deepspeed"} <= {p.name for p in checkpoint.iterdir()}
    # Real subjects are not drawn unasked: the figure shows numbers only.
    assert (run / "figures" / "pretraining.png").is_file()
    assert json.loads((run / "figures/reconstructions/index.json").read_text())["drawn"] == []

    listed = swiftv2_run(["checkpoint", "list", str(run), "--json"])
    assert [c["step"] for c in json.loads(listed.stdout)["checkpoints"]] == [2, 4, 6, 8]
    exported = swiftv2_run(["checkpoint", "export", str(run), str(tmp_path / "weights"), "--json"])
    assert exported.returncode == 0, exported.stderr
    model, saved = weights.load_simmim(tmp_path / "weights"), final_weights(run)
    assert all(torch.equal(tensor, saved[f"simmim.{name}"]) for name, tensor in model.state_dict().items())
    card = weights.read_card(tmp_path / "weights")
    assert (card.input.orientation, card.input.frames, card.input.tr_seconds) == ("RAS", 8, 1.35)
    assert card.input.normalisation.kind == "per_voxel"
    store = Store.open(real_store)
    assert card.subjects is not None
    names = {weights.hash_subject(name, card.subjects.salt) for name in store.subject_ids() if "/" in name}
    assert set(card.subjects.hashes) < names, "the salted hashes of the training subjects, and not of the held-out one"
    again = swiftv2_run(["checkpoint", "export", str(run), str(tmp_path / "weights")])
    assert again.returncode == 1
    assert "already exists" in again.stderr

    fresh = tmp_path / "fresh"
    pretrain(config, real_store, fresh, f"run.init_from={tmp_path / 'weights'}", "train.max_steps=2")
    first = json.loads((fresh / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < losses(run)[0] - 0.001, "it starts from what was learned, not from nothing"
    assert first["step"] == 1

    damaged = checkpoint / "state" / "rank_0_of_1.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    verified = swiftv2_run(["checkpoint", "verify", str(run), "--json"])
    assert verified.returncode == 1
    problems = {c["step"]: c["problem"] for c in json.loads(verified.stdout)["checkpoints"]}
    assert "rank_0_of_1.safetensors" in problems[8]
    assert problems[6] is None


def test_another_world_size_goes_on_with_the_same_samples(config: Path, real_store: Path, tmp_path: Path) -> None:
    pretrain(config, real_store, tmp_path / "whole")
    pretrain(config, real_store, tmp_path / "changed", "train.max_steps=4", "schedule.warmup_steps=5", ranks=2)
    pretrain(config, real_store, tmp_path / "changed", ranks=1)
    # The cosine ends where the run was said to end, so only the steps of warm-up are comparable before the change.
    whole, changed = losses(tmp_path / "whole"), losses(tmp_path / "changed")
    np.testing.assert_allclose(changed[:5], whole[:5], rtol=5e-6)


def test_a_single_real_run_of_odd_shape_is_trained_on(tmp_path: Path, config: Path) -> None:
    """nibabel's functional.nii: 17 x 21 x 3 voxels, 20 volumes, LAS; as two subjects' runs, since splits are by subject."""
    source = Path(nib.__file__).parent / "tests" / "data" / "functional.nii"
    for subject in (1, 2):
        (tmp_path / f"sub-{subject}_bold.nii").write_bytes(source.read_bytes())
    grid = GridConfig(kind="source", mask="box", space="native-example")
    build(str(tmp_path / "*.nii"), tmp_path / "odd.zarr", grid, "nibabel", salt="1" * 32)
    store = Store.open(tmp_path / "odd.zarr")
    assert store.grid.shape == (17, 21, 3)
    words = ["model.image_size=[17, 21, 3]", "model.patch_size=[3, 3, 3, 2]", "mask.patch_size=[3, 3, 3, 2]"]
    pretrain(config, tmp_path / "odd.zarr", tmp_path / "run", *words, "train.max_steps=3")
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["data.store=none.zarr"], 1, r"none\.zarr"),
        (["model.image_size=[96, 96, 96]", "mask.patch_size=[6, 6, 6, 2]"], 2, "is not the grid of"),
        (["train.global_batch=3", "train.micro_batch=2"], 2, "micro-batches that work: 1, 3"),
        (["clip.frames=60", "model.frames=60"], 2, "are too short; lower clip.frames"),
        (["data.cohorts=[abcd]"], 2, "the store has no cohort 'abcd'; it has nitime"),
        (["data.split.fractions=[0.4, 0.3, 0.3]"], 2, "cannot fill the 3 parts"),
        (["data.split.fractions=[1, 0, 0]"], 2, "no run of the store is in the part val"),
        (["run.init_from=nowhere"], 1, "nowhere"),
        (["engine.device=cuda"], 1, "cuda"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_written(
    words: list[str],
    status: int,
    says: str,
    config: Path,
    real_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "engine.device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = sorted(tmp_path.iterdir())
    given = ["pretrain", str(config), f"data.store={real_store}", f"run.dir={tmp_path / 'refused'}", *words]
    assert main(given) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.search(says, lines[0]), lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_a_changed_configuration_does_not_resume(
    config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # DeepSpeed's state outlives a run, so that a test process runs plain PyTorch.
    words = ["pretrain", str(config), f"data.store={real_store}", f"run.dir={tmp_path / 'run'}", "engine.backend=plain"]
    assert main([*words, "train.max_steps=2", "schedule.warmup_steps=1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != "lease.json"}
    capsys.readouterr()
    assert main([*words, "optimizer.lr=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "optimizer.lr=0.002" in line
    assert all(path.read_bytes() == content for path, content in before.items())
