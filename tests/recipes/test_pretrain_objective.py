"""Visible-only pretraining on real BOLD: equal under ZeRO-2 and in plain PyTorch; the objective travels with the weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import swiftv2_run

from swiftv2 import weights
from swiftv2.cli import main
from swiftv2.errors import SwiftError
from swiftv2.models import VisibleOnly
from swiftv2.records import read_metrics

CONFIG = """
objective: visible_only
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
  decoder: {visible: {width: 16, num_heads: 2}}
mask: {patch_size: [2, 6, 10, 2]}
optimizer: {lr: 2e-3}
schedule: {warmup_steps: 2}
engine: {precision: fp32, device: cpu}
train: {max_steps: 4, global_batch: 4, save_every: 4, evaluate_every: 4}
"""
PATCH = ("model.patch_size=[5,9,5,1]", "model.depths=[2]", "model.num_heads=[2]", "mask.patch_size=[5,9,5,1]")
"""What SwiFT v1 can do."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def words(config: Path, store: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", str(config), f"data.store={store}", f"run.dir={run}", *more]


@pytest.mark.slow
def test_visible_only_pretraining_and_its_weights(
    config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spreads = {"plain": (1, "engine.backend=plain"), "zero": (2, "train.micro_batch=1")}
    losses = {}
    for name, (ranks, word) in spreads.items():
        done = swiftv2_run(words(config, real_store, tmp_path / name, word), ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]
    np.testing.assert_allclose(losses["zero"], losses["plain"], rtol=5e-6)

    exported = tmp_path / "weights"
    assert main(["checkpoint", "export", str(tmp_path / "zero"), str(exported)]) == 0
    assert weights.read_card(exported).kind == "visible_only"
    model = weights.load_masked(exported)
    assert isinstance(model, VisibleOnly)
    batch = torch.randn(1, 1, 10, 18, 10, 8), torch.zeros(1, 5, 3, 1, 4, dtype=torch.bool), torch.ones(1, 10, 18, 10) > 0
    assert model.eval()(*batch).reconstruction.shape == (1, 1, 10, 18, 10, 8)
    assert torch.equal(weights.load_encoder(exported).eval()(batch[0]), model.encoder(batch[0]))
    with pytest.raises(SwiftError, match="trained for the objective visible_only, not simmim"):
        weights.load_simmim(exported)

    fresh = words(config, real_store, tmp_path / "fresh", f"run.init_from={exported}", "objective=simmim")
    assert main(fresh) == 1
    assert "weights of kind visible_only, where objective=simmim wants its own" in capsys.readouterr().err


def test_swift_v1_is_refused(config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(config, real_store, tmp_path / "run", "model.variant=swift_v1", *PATCH)) == 2
    assert "objective=visible_only" in capsys.readouterr().err
