"""Packed pretraining on real BOLD, by real processes."""

from pathlib import Path
from typing import Any

import nibabel as nib
import nitime
import numpy as np
import pytest
from test_pretrain import CONFIG, losses, pretrain

from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.engine.checkpoint import read_weights
from swiftv2.records import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uneven_brains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real BOLD of four subjects, of whom each has another part of the box."""
    folder = tmp_path_factory.mktemp("uneven")
    for subject in range(4):
        image: Any = nib.load(Path(nitime.__file__).parent / "data" / f"fmri{1 + subject % 2}.nii.gz")
        bold = np.asarray(image.dataobj).copy()
        bold[..., 4 + 4 * subject :, :] = 0
        nib.Nifti1Image(bold, image.affine, image.header).to_filename(  # type: ignore[no-untyped-call]
            folder / f"sub-{subject}_bold.nii.gz"
        )
    grid = GridConfig(kind="source", mask="box", space="native-nitime")
    build(str(folder / "*.nii.gz"), folder / "uneven.zarr", grid, "nitime", expect_tr=1.35, salt="0" * 32)
    return folder / "uneven.zarr"


def test_subjects_masks_train_the_same_on_two_ranks(config: Path, uneven_brains: Path, tmp_path: Path) -> None:
    """Ranks compute different tokens; the losses stay those of one rank, and how uneven they were is logged."""
    words = ("model.packing=subject", *(f"train.{key}=6" for key in ("max_steps", "evaluate_every", "save_every")))
    words = (*words, "data.split.fractions=[0.8, 0.2, 0.0]")
    pretrain(config, uneven_brains, tmp_path / "one", "engine.backend=plain", *words)
    pretrain(config, uneven_brains, tmp_path / "two", *words, ranks=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=5e-6)
    pretrain(config, uneven_brains, tmp_path / "dense", *words[1:])
    assert not np.allclose(losses(tmp_path / "dense"), losses(tmp_path / "one"), rtol=5e-6)
    logged = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]
    assert 1.0 <= logged["packing/imbalance"] < 2.0
    assert logged["packing/shapes"] > 1
    assert "packing/imbalance" not in read_metrics(tmp_path / "dense" / "metrics.jsonl")[-1]


def test_the_template_is_in_the_exported_weights(config: Path, real_store: Path, tmp_path: Path) -> None:
    pretrain(config, real_store, tmp_path / "run", "model.packing=template", "train.max_steps=2", "train.save_every=2")
    tensors = read_weights(tmp_path / "run" / "checkpoints" / "step_2")
    template = tensors["simmim.encoder.template"]
    assert template.shape == (5, 6, 5)
    assert bool(template.any())
