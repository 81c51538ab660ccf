"""Fine-tuning on a generated cohort, by real processes: resumed bit for bit, equal however it is spread, judged once."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ranks import kill, swiftv2_run, swiftv2_started
from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score, roc_auc_score

from swiftv2 import weights
from swiftv2.cli import main
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.data.store.reader import Store
from swiftv2.engine.checkpoint import read_weights
from swiftv2.models.simmim import SimMIM
from swiftv2.recipes.export import hashes_of
from swiftv2.records import read_metrics

pytestmark = pytest.mark.slow

MODEL = {
    "name": "tiny",
    "image_size": [32, 32, 32],
    "frames": 4,
    "embed_dim": 12,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "patch_size": [8, 8, 8, 2],
    "packing": "template",
}
CONFIG = """
task:
  name: generated
  targets: [{column: coupling_strong, kind: classification}, {column: slope, kind: regression}]
  data: {store: STORE, normalisation: {kind: per_voxel}}
  clip: {frames: 4}
  split: {kind: kfold, count: 3}
encoder: {weights: WEIGHTS}
optimizer: {lr: 2e-3}
schedule: {warmup_steps: 2}
engine: {precision: fp32, device: cpu, backend: plain}
train: {max_steps: 8, global_batch: 4, save_every: 2, keep_last: 20, evaluate_every: 4, save_minutes: 0, deepspeed_files: false}
evaluate: {bootstrap: 50}
"""


@pytest.fixture(scope="module")
def exported(generated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of first values, with a card as pretraining on this store's geometry would write; no subject was seen."""
    folder = tmp_path_factory.mktemp("weights") / "first"
    return export_first(generated_store, folder, subjects=None)


def export_first(store: Path, folder: Path, subjects: dict[str, Any] | None) -> Path:
    model = SimMIM(ModelConfig.model_validate(MODEL), MaskConfig(patch_size=(8, 8, 8, 2)), LossConfig(), seed=1)
    opened = Store.open(store)
    template = torch.zeros(32**3, dtype=torch.bool)
    template[torch.as_tensor(np.asarray(opened.voxels)).long()] = True
    model.encoder.use_template(template.view(32, 32, 32))
    card = {
        "kind": "simmim",
        "model": MODEL,
        "mask": MaskConfig(patch_size=(8, 8, 8, 2)).model_dump(),
        "loss": LossConfig().model_dump(),
        "input": {
            "orientation": "RAS",
            "space": opened.grid.space,
            "grid": [32, 32, 32],
            "voxel_mm": [6, 6, 6],
            "tr_seconds": 2.0,
            "frames": 4,
            "normalisation": {"kind": "per_voxel"},
            "mask": "template",
        },
        "subjects": subjects,
    }
    weights.export(folder, model, card)
    return folder


@pytest.fixture
def config(generated_store: Path, exported: Path, tmp_path: Path) -> Path:
    path = tmp_path / "finetune.yaml"
    path.write_text(CONFIG.replace("STORE", str(generated_store)).replace("WEIGHTS", str(exported)), encoding="utf-8")
    return path


def finetune(config: Path, run: Path, *words: str, ranks: int = 1) -> dict[str, Any]:
    done = swiftv2_run(["finetune", str(config), f"run.dir={run}", *words], ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return result


def subjects(run: Path, part: str, target: str) -> pd.DataFrame:
    """Truth and scores of each subject, by pandas alone: clips to runs, runs to subjects."""
    rows = pd.read_csv(run / "predictions.csv")
    rows = rows[(rows.part == part) & (rows.target == target)].dropna(axis=1, how="all")
    columns = ["truth", *[name for name in rows.columns if name.startswith("score_")]]
    return rows.groupby(["unit", "run"])[columns].mean().groupby("unit").mean()


def test_results_are_what_scikit_learn_says_of_the_written_predictions_on_one_to_three_ranks(
    config: Path, tmp_path: Path
) -> None:
    results = [
        finetune(config, tmp_path / str(ranks), "train.global_batch=6", "train.max_steps=4", ranks=ranks) for ranks in (1, 2, 3)
    ]
    for ranks, result in enumerate(results, start=1):
        run = tmp_path / str(ranks)
        for part in ("val", "test"):
            sex = subjects(run, part, "coupling_strong")
            found = {name: one["value"] for name, one in result["targets"]["coupling_strong"][part]["metrics"].items()}
            threshold = result["targets"]["coupling_strong"]["threshold"]
            guess = sex.score_1 >= threshold
            assert len(sex) == result["targets"]["coupling_strong"][part]["n"]
            if sex.truth.nunique() == 2:
                assert found["auroc"] == pytest.approx(roc_auc_score(sex.truth, sex.score_1), abs=1e-12)
                assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(sex.truth, guess), abs=1e-12)
            slope = subjects(run, part, "slope")
            found = {name: one["value"] for name, one in result["targets"]["slope"][part]["metrics"].items()}
            assert found["mae"] == pytest.approx(mean_absolute_error(slope.truth, slope.score_0), abs=1e-12)
            assert found["r2"] == pytest.approx(r2_score(slope.truth, slope.score_0), abs=1e-9)
    # Uneven subjects, and the same numbers but for the rounding of sums over ranks.
    assert results[0]["subjects"]["test"] % 2 or results[0]["subjects"]["test"] % 3
    for other in results[1:]:
        ours, theirs = (one["targets"]["slope"]["test"]["metrics"]["mae"]["value"] for one in (results[0], other))
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("backend", ["plain", "deepspeed"])
def test_a_killed_run_goes_on_bit_for_bit(config: Path, tmp_path: Path, backend: str) -> None:
    words = [f"engine.backend={backend}", "encoder.regime=last_blocks", "encoder.fraction=0.4", "head.dropout=0.2"]
    undisturbed = finetune(config, tmp_path / "undisturbed", *words, ranks=2)
    run = tmp_path / "killed"
    with swiftv2_started(["finetune", str(config), f"run.dir={run}", *words], ranks=2) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= 4:
                break
            time.sleep(0.005)
        kill(process.pid)
    again = finetune(config, run, *words, ranks=2)
    assert again["targets"] == undisturbed["targets"]
    ours, theirs = (read_weights(one / "checkpoints" / "step_8") for one in (run, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("regime", ["scratch", "full", "frozen", "lora"])
def test_every_regime_learns_its_share_and_leaves_the_rest(config: Path, tmp_path: Path, exported: Path, regime: str) -> None:
    run = tmp_path / "run"
    result = finetune(config, run, f"encoder.regime={regime}", "encoder.rank=2", "augment.noise=0.5", "train.max_steps=2")
    assert result["name"] == regime
    before, _ = weights.load(exported)
    after = read_weights(run / "checkpoints" / "step_2")
    name = "layers.1.blocks.1.norm1.weight"
    same = torch.equal(after[f"predictor.encoder.{name}"], before[f"encoder.{name}"])
    assert same == (regime in ("frozen", "lora"))
    assert result["learned_share_of_encoder"] == pytest.approx({"scratch": 1, "full": 1, "frozen": 0}.get(regime, 0.1), abs=0.1)


def test_the_test_subjects_are_left_alone_where_a_search_is_under_way(config: Path, tmp_path: Path) -> None:
    result = finetune(config, tmp_path / "trial", "evaluate.test=false", "train.max_steps=2")
    assert all(target["test"] is None for target in result["targets"].values())
    assert set(pd.read_csv(tmp_path / "trial" / "predictions.csv").part) == {"val"}


def test_weights_that_saw_the_test_subjects_are_refused_or_declared(
    config: Path, generated_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store.open(generated_store)
    seen = export_first(generated_store, tmp_path / "seen", hashes_of(store, store.subject_keys))
    words = [f"encoder.weights={seen}", f"run.dir={tmp_path / 'run'}", "train.max_steps=2"]
    assert main(["finetune", str(config), *words]) == 1
    assert "were seen in the pretraining" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    result = finetune(config, tmp_path / "run", *words[::2], "encoder.overlap=declare")
    assert result["overlap"]["counted"] == result["subjects"]["val"] + result["subjects"]["test"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.data.normalisation.kind=robust"], "normalisation"),
        (["task.targets=[{column: sexx, kind: classification}]"], "no column 'sexx'"),
        (["task.targets=[{column: site, kind: regression}]"], "site"),
        (["task.split.count=99"], "99"),
        (["encoder.weights=nowhere"], "nowhere"),
        (["encoder.regime=lastblocks"], "encoder.regime"),
        (["task.split.index=3"], "index=3"),
        (["encoder.regime=scratch", "encoder.weights=null", "encoder.model=tiny", "task.clip.frames=5"], "model's 4 frames"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_made(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["finetune", str(config), f"run.dir={tmp_path / 'run'}", *words]) in (1, 2)
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told
    assert not (tmp_path / "run").exists()
