"""The model card says what the weights and their run say, and its lines of code load them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swiftv2 import weights
from swiftv2.cli import main
from swiftv2.config.model import ModelConfig
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.models.swin4d import Swin4D
from swiftv2.recipes.export import export_checkpoint
from swiftv2.recipes.modelcard import write_model_card

CONFIG = """
data: {store: STORE, normalisation: {kind: per_voxel}, split: {fractions: [0.5, 0.5, 0.0]}}
run: {dir: RUN}
clip: {frames: 8, stride_between: 0.5}
model:
  {name: tiny, image_size: [10, 18, 10], frames: 8, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], patch_size: [2, 3, 2, 2]}
mask: {patch_size: [2, 3, 2, 2]}
engine: {precision: fp32, device: cpu, backend: plain}
train: {max_steps: 2, global_batch: 2, evaluate_every: 2, deepspeed_files: false}
"""


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE))


@pytest.mark.slow
def test_it_tells_what_the_run_was(real_store: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("STORE", str(real_store)).replace("RUN", str(tmp_path / "run")), encoding="utf-8")
    assert main(["pretrain", str(config)]) == 0
    folder = export_checkpoint(tmp_path / "run", tmp_path / "weights")
    text = write_model_card(folder, tmp_path / "run").read_text(encoding="utf-8")
    found = rows(text)
    encoder = weights.load_encoder(folder)
    assert found["Encoder"] == f"{sum(p.numel() for p in encoder.parameters()):,} parameters"
    contract = json.loads((tmp_path / "run" / "contract.json").read_text(encoding="utf-8"))
    run = next(one for one in Store.open(real_store).runs if one.subject in contract["splits"]["train"])
    assert found["Scan time trained on"] == f"{run.frames * run.tr / 3600:,.1f} hours"
    assert found["Subjects trained on"] == "1"
    assert found["Step"] == "2"
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found["Training loss"] == f"{metrics[-1]['loss']:.4g} at step 2"
    assert float(found["Held-out loss"].split()[0]) == pytest.approx(metrics[-1]["heldout/loss"], rel=1e-3)
    assert found["Repetition time"] == "1.35 s"
    assert weights.read_card(folder).sha256 in text
    assert str(tmp_path) not in text
    assert not [key for key in (*contract["splits"]["train"], *contract["splits"]["val"]) if key in text]


@pytest.mark.parametrize("packing", ["none", "subject"])
def test_its_lines_of_code_load_the_encoder(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"name": "tiny", "image_size": [6, 6, 4], "frames": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]}
    model |= {"patch_size": [2, 2, 2, 2], "packing": packing}
    contract = {"orientation": "LAS", "space": None, "grid": [6, 6, 4], "voxel_mm": [2, 2, 2], "tr_seconds": None, "frames": 4}
    card: dict[str, Any] = {"kind": "encoder", "model": model, "input": contract | {"normalisation": {}}}
    weights.export(tmp_path / "exported", Swin4D(ModelConfig.model_validate(model)), card)
    text = write_model_card(tmp_path / "exported").read_text(encoding="utf-8")
    found = rows(text)
    assert found["Training loss"] == found["Subjects trained on"] == found["Space"] == "not recorded"
    assert found["Pretrained by"] == "an encoder alone"
    code = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {"volume": torch.from_numpy(np.ones((2, 1, 6, 6, 4, 4), dtype=np.float32))}
    names["brain"] = torch.ones(2, 6, 6, 4, dtype=torch.bool)
    exec(code, names)  # noqa: S102 (the card's own lines)
    result: Any = names["features"]
    assert result.shape == (2, 24, 2, 2, 1, 2)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SwiftError, match="cannot be read"):
        write_model_card(tmp_path)
