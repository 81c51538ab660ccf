"""The browser that these tests share; where none can be, they skip and say what lacks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, lacking, started


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A Chromium without a window."""
    if reason := lacking():
        pytest.skip(reason)
    with started(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """A run of one rank and eight steps on nitime's real BOLD, evaluated twice."""
    from ranks import swiftv2_run

    folder = tmp_path_factory.mktemp("seen")
    (folder / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    words = ["pretrain", str(folder / "tiny.yaml"), f"data.store={real_store}", f"run.dir={folder / 'run'}"]
    done = swiftv2_run(words, ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


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
  depths: [1, 1]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
mask: {patch_size: [2, 3, 2, 2]}
schedule: {warmup_steps: 2}
engine: {backend: plain, precision: fp32, device: cpu}
train: {max_steps: 8, global_batch: 4, save_every: 4, evaluate_every: 4}
"""
