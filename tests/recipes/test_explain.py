"""Integrated gradients of a fine-tuned run: complete, of the model that was trained, in the store's space."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from ranks import swiftv2_run
from test_finetune import CONFIG, export_first

from swiftv2.cli import main
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError
from swiftv2.recipes.explain import explain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(generated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    first = export_first(generated_store, folder / "first", None)
    path = folder / "finetune.yaml"
    path.write_text(CONFIG.replace("STORE", str(generated_store)).replace("WEIGHTS", str(first)), encoding="utf-8")
    done = swiftv2_run(
        ["finetune", str(path), f"run.dir={folder / 'run'}", "train.max_steps=4", "encoder.regime=lora", "encoder.rank=2"]
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("target", ["coupling_strong", "slope"])
def test_attributions_add_up_to_the_outputs_difference_and_lie_in_the_brain(
    finished: Path, generated_store: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "gradients", str(finished), str(tmp_path / "map"), "--target", target, "--clips", "4", "--json"]
    assert main(words) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["completeness_error"] < 0.01
    # Another model's map is another one: what is drawn is not the input's or the architecture's.
    assert abs(facts["randomised_correlation"]) < 0.7
    assert facts["clips"] == 4
    store = Store.open(generated_store)
    image = nib.load(tmp_path / "map" / "gradients.nii.gz")
    assert np.allclose(image.affine, store.grid.matrix)  # type: ignore[attr-defined]
    values = np.asarray(image.get_fdata())  # type: ignore[attr-defined]
    kept = np.zeros(values.size, dtype=bool)
    kept[np.asarray(store.voxels)] = True
    # Patches of the template's tokens reach beyond it by a patch at most, and most of the weight is within.
    assert np.abs(values.ravel()[kept]).sum() > 0.5 * np.abs(values).sum() > 0
    assert (tmp_path / "map" / "gradients.png").stat().st_size > 10_000


def test_the_two_classes_of_a_target_have_opposite_maps(finished: Path, tmp_path: Path) -> None:
    maps = []
    for label in ("0", "1"):
        words = ["explain", "gradients", str(finished), str(tmp_path / label), "--class", label, "--clips", "1", "--steps", "4"]
        assert main(words) == 0
        maps.append(np.asarray(nib.load(tmp_path / label / "gradients.nii.gz").get_fdata()))  # type: ignore[attr-defined]
    np.testing.assert_allclose(maps[0], -maps[1], atol=1e-5 * np.abs(maps[1]).max())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "age"], "the run predicts coupling_strong, slope"),
        (["--class", "2"], "classes of coupling_strong are 0, 1"),
        (["--target", "slope", "--class", "0"], "none, for it is a number"),
        (["--clips", "0"], "--clips takes 1 or more"),
    ],
)
def test_what_cannot_be_explained_is_said(
    finished: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "gradients", str(finished), str(tmp_path / "map"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "map").exists()


def test_a_map_of_a_few_real_subjects_is_written_for_its_owner_alone_or_not_at_all(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.open

    def as_real(path: Path) -> Store:
        store = read(path)
        store.generated = False
        return store

    monkeypatch.setattr(Store, "open", as_real)
    options: dict[str, Any] = {"clips": 4, "steps": 4}
    with pytest.raises(SwiftError, match="3 real subjects shows single brains"):
        explain(finished, tmp_path / "map", **options)
    assert not (tmp_path / "map").exists()
    explain(finished, tmp_path / "map", draw_subjects=True, **options)
    assert (tmp_path / "map").stat().st_mode & 0o777 == 0o700


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert main(["explain", "gradients", str(tmp_path / "run"), str(tmp_path / "map")]) == 1
    assert "has no result.json" in capsys.readouterr().err
