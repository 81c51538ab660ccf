"""The brainmarks plug-in: where brainmarks looks for it, and embeddings like those of `swiftv2 embed` on the same scan."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from setuptools import find_namespace_packages
from torch.utils.data import default_collate

from swiftv2 import weights
from swiftv2.config.model import ModelConfig
from swiftv2.data.grid import kept_voxels, mni152_grid
from swiftv2.errors import UsageError
from swiftv2.models.swin4d import Swin4D
from swiftv2.recipes.embed import embed
from swiftv2.recipes.embeddings import read_embeddings
from swiftv2.recipes.encoding import EmbedOptions

SOURCE = Path(__file__).parents[2] / "tools" / "brainmarks_plugin" / "src"
SPACE = "MNI152NLin6Asym"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SOURCE))
    monkeypatch.delenv("SWIFTV2_WEIGHTS", raising=False)
    return importlib.import_module("swiftv2_brainmarks")


def export(folder: Path, space: str = SPACE, kind: str = "znorm_minback") -> Path:
    tree = {
        "name": "tiny",
        "image_size": [32, 32, 32],
        "frames": 4,
        "embed_dim": 12,
        "depths": [1, 2],
        "num_heads": [2, 4],
        "patch_size": [8, 8, 8, 2],
        "packing": "template",
    }
    model = Swin4D(ModelConfig.model_validate(tree), seed=1)
    kept = torch.zeros(32**3, dtype=torch.bool)
    kept[torch.from_numpy(kept_voxels(mni152_grid(6.0, "RAS", space), "template").astype(np.int64))] = True
    model.use_template(kept.view(32, 32, 32))
    contract = {
        "orientation": "RAS",
        "space": space,
        "grid": [32, 32, 32],
        "voxel_mm": [6, 6, 6],
        "tr_seconds": 2.0,
        "frames": 4,
        "normalisation": {"kind": kind},
        "mask": "template",
    }
    weights.export(folder, model, {"kind": "encoder", "model": tree, "input": contract})
    return folder


def ball() -> NDArray[np.bool_]:
    """(Z, Y, X) of a brain-sized ellipsoid on brainmarks' grid."""
    z, y, x = np.ogrid[:91, :109, :91]
    return np.asarray(((z - 42) / 38) ** 2 + ((y - 52) / 45) ** 2 + ((x - 45) / 35) ** 2 < 1)


def test_it_lies_where_brainmarks_looks_for_models() -> None:
    """In a namespace that it shares: a file `__init__.py` in it would hide brainmarks itself."""
    assert find_namespace_packages(where=str(SOURCE)) == ["brainmarks", "brainmarks.models"]
    assert not list(SOURCE.rglob("__init__.py"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["znorm_minback", "per_voxel"])
def test_a_scan_is_embedded_as_by_swiftv2_itself(plugin: ModuleType, tmp_path: Path, kind: str) -> None:
    """The same scan as brainmarks' z-scored sample, and as a NIfTI file that `embed` brings to the grid."""
    mask, rng = ball(), np.random.default_rng(0)
    smooth = [ndimage.gaussian_filter(rng.standard_normal((91, 109, 91)), 3) for _ in range(9)]
    volumes = np.stack([1000 + 400 * smooth[0] + 300 * one for one in smooth[1:]]).astype(np.float32)
    volumes[:, ~mask] = 0
    image: Any = nibabel
    header = image.Nifti1Image(volumes.transpose(3, 2, 1, 0), np.asarray(plugin.AFFINE))
    header.header.set_zooms((2, 2, 2, 2.0))
    header.header.set_xyzt_units("mm", "sec")
    stem = f"sub-1_space-{SPACE}_desc"
    image.save(header, tmp_path / f"{stem}-preproc_bold.nii.gz")
    brain = image.Nifti1Image(mask.transpose(2, 1, 0).astype(np.uint8), np.asarray(plugin.AFFINE))
    image.save(brain, tmp_path / f"{stem}-brain_mask.nii.gz")
    folder = export(tmp_path / "weights", kind=kind)
    embed(folder, tmp_path / f"{stem}-preproc_bold.nii.gz", tmp_path / "out", EmbedOptions(device="cpu", resample=True))
    expected = read_embeddings(tmp_path / "out").matrix

    transform, found = plugin.prepare(str(folder), other_space=False, mask=lambda: mask)
    bold = torch.from_numpy(volumes[:, mask])
    mean, std = bold.mean(0, keepdim=True), bold.std(0, keepdim=True)
    sample = transform({"bold": (bold - mean) / std, "mean": mean, "std": std, "tr": 2.0})
    encoder = plugin.Encoder(found, transform)
    cls, registers, patches = encoder(default_collate([sample, sample]))
    assert registers is None
    assert cls.shape == (2, 1, 24)
    assert patches.shape[0] == 2
    np.testing.assert_allclose(patches.mean(1), cls[:, 0], atol=1e-5)
    # The store keeps 16 bits.
    np.testing.assert_allclose(cls[0], expected, atol=2e-3)
    assert np.abs(expected).max() > 0.1


def test_weights_of_another_template_or_none_are_refused(plugin: ModuleType, tmp_path: Path) -> None:
    folder = export(tmp_path / "other", "MNI152NLin2009cAsym")
    with pytest.raises(UsageError, match="made for MNI152NLin2009cAsym, and brainmarks' scans are in MNI152NLin6Asym"):
        plugin.prepare(str(folder), other_space=False, mask=ball)
    with pytest.raises(UsageError, match="SWIFTV2_WEIGHTS"):
        plugin.prepare(None, other_space=False, mask=ball)
    transform, _ = plugin.prepare(str(folder), other_space=True, mask=ball)
    # Slower than a scan of 1 s the weights' 4 frames of 2 s take 9 of its volumes; a short scan is filled up.
    for frames, tr, clips in ((18, 1.0, 2), (3, 2.0, 1)):
        count = int(ball().sum())
        sample = {
            "bold": torch.randn(frames, count),
            "mean": torch.full((1, count), 9.0),
            "std": torch.ones(1, count),
            "tr": tr,
        }
        found = transform(sample)
        assert found["bold"].shape == (clips, 4, len(transform.voxels))
        assert found["bold"].isfinite().all()


@pytest.mark.slow
def test_brainmarks_accepts_it(tmp_path: Path) -> None:
    """Its own model tests, where it and the plug-in are installed; TemplateFlow's mask must be there or reachable."""
    pytest.importorskip("brainmarks.models.registry")
    pytest.importorskip("brainmarks.models.swiftv2")
    environment = os.environ | {"SWIFTV2_WEIGHTS": str(export(tmp_path / "weights"))}
    words = [sys.executable, "-m", "brainmarks.models.test_models", "swiftv2"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout
