"""Embeddings: those of the encoder itself, the same however they are spread, resumed, and refused where input differs."""

import json
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from numpy.typing import NDArray
from ranks import swiftv2_run, swiftv2_started

from swiftv2 import weights
from swiftv2.cli import main
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.data.changes.drop import drop, read_withdrawals
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sha256
from swiftv2.models.simmim import SimMIM
from swiftv2.recipes.embed import FEWEST_RUNS, embed
from swiftv2.recipes.embeddings import read_clips, read_embeddings
from swiftv2.recipes.encoding import EmbedOptions
from swiftv2.recipes.export import hashes_of
from swiftv2.recipes.withdrawal import find_users

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
INPUT: dict[str, Any] = {
    "orientation": "RAS",
    "grid": [32, 32, 32],
    "voxel_mm": [6, 6, 6],
    "tr_seconds": 2.0,
    "frames": 4,
    "normalisation": {"kind": "per_voxel"},
    "mask": "template",
}


def export(store: Path, folder: Path, subjects: dict[str, Any] | None = None, **changes: Any) -> Path:
    opened = Store.open(store)
    model = SimMIM(ModelConfig.model_validate(MODEL), MaskConfig(patch_size=(8, 8, 8, 2)), LossConfig(), seed=1)
    template = torch.zeros(32**3, dtype=torch.bool)
    template[torch.as_tensor(np.asarray(opened.voxels)).long()] = True
    model.encoder.use_template(template.view(32, 32, 32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    card = {
        "kind": "simmim",
        "model": MODEL,
        "mask": MaskConfig(patch_size=(8, 8, 8, 2)).model_dump(),
        "loss": LossConfig().model_dump(),
        "input": INPUT | {"space": opened.grid.space} | changes,
        "subjects": subjects,
    }
    weights.export(folder, model, card)
    return folder


@pytest.fixture(scope="module")
def exported(generated_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(generated_store, tmp_path_factory.mktemp("weights") / "first")


@pytest.fixture(scope="module")
def embedded(generated_store: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedded") / "all"
    assert main(["embed", str(exported), str(generated_store), str(out), "--stages", "all", "--tokens", "--device", "cpu"]) == 0
    return out


def card_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "embeddings.json").read_text(encoding="utf-8"))
    return content


def by_hand(store: Store, run: int, exported: Path) -> list[NDArray[np.float64]]:
    """Means over tokens with brain of each stage, clip by clip, straight from the run's numbers."""
    encoder, info = weights.load_encoder(exported).eval(), store.runs[run]
    brain = store.brain(run)
    signal = store.read_bold(run, 0, info.frames).astype(np.float64) * info.slope + info.intercept
    mean, std = store.voxel_mean(run).astype(np.float64), store.voxel_std(run).astype(np.float64)
    scaled = np.where(brain & (std > 0), (signal - mean) / np.where(std > 0, std, 1.0), 0.0)
    inside = np.zeros(32**3, dtype=bool)
    inside[store.voxels[brain]] = True
    first = inside.reshape(4, 8, 4, 8, 4, 8).any((1, 3, 5))
    counted = [first, first.reshape(2, 2, 2, 2, 2, 2).any((1, 3, 5))]
    rows: list[list[NDArray[np.float64]]] = [[], []]
    for start in range(info.steady_from, info.frames - 3, 4):
        volume = np.zeros((32**3, 4), dtype=np.float32)
        volume[store.voxels] = scaled[start : start + 4].T
        with torch.no_grad():
            found = encoder.stages(torch.from_numpy(volume).view(1, 1, 32, 32, 32, 4))
        for stage in (0, 1):
            tokens = found[stage][0].numpy().astype(np.float64)
            rows[stage].append(tokens[:, counted[stage]].mean((1, 2)))
    return [np.stack(one) for one in rows]


def test_a_clip_is_embedded_as_the_encoder_does_by_hand(generated_store: Path, exported: Path, embedded: Path) -> None:
    store = Store.open(generated_store)
    shards = list(read_clips(embedded))
    keys = np.concatenate([shard.keys["run"] for shard in shards])
    assert len(shards) == -(-len(store.runs) // FEWEST_RUNS)
    assert set(keys) == {run.key for run in store.runs}
    for run in (0, len(store.runs) - 1):
        for stage, expected in enumerate(by_hand(store, run, exported), start=1):
            own = np.concatenate([shard.stages[stage] for shard in shards])[keys == store.runs[run].key]
            np.testing.assert_allclose(own, expected, atol=2e-5)
    table = pq.read_table(embedded / "clips-00000.parquet")
    assert table.column_names[:5] == ["subject", "run", "cohort", "start", "tr"]
    assert table.column_names[5:] == [f"stage1_{i}" for i in range(12)] + [f"stage2_{i}" for i in range(24)]
    assert set(table["tr"].to_pylist()) == {2.0}


def test_a_subject_is_the_mean_over_runs_of_means_over_clips(generated_store: Path, embedded: Path) -> None:
    subjects, matrix, columns = read_embeddings(embedded)
    assert subjects == Store.open(generated_store).subject_keys
    assert len(columns) == matrix.shape[1] == 36
    shards = list(read_clips(embedded))
    keys = np.concatenate([shard.keys["subject"] for shard in shards])
    runs = np.concatenate([shard.keys["run"] for shard in shards])
    values = np.concatenate([np.concatenate([shard.stages[s] for shard in shards]) for s in (1, 2)], axis=1)
    for place in (0, 7, len(subjects) - 1):
        own = keys == subjects[place]
        means = [values[own & (runs == run)].astype(np.float64).mean(0) for run in np.unique(runs[own])]
        np.testing.assert_allclose(matrix[place], np.mean(means, axis=0), atol=1e-6)
    assert matrix.std(0).min() > 1e-4


def test_tokens_are_there_and_their_mean_is_the_embedding(embedded: Path) -> None:
    shard = next(read_clips(embedded))
    group: Any = zarr.open_group(embedded / "tokens-00000.zarr", mode="r")
    for stage, grid in ((1, (4, 4, 4)), (2, (2, 2, 2))):
        assert group[f"stage{stage}"].shape == (len(shard.start), *grid, 2, 12 * stage)
        tokens, counted = group[f"stage{stage}"][3], group[f"counted{stage}"][3]
        np.testing.assert_allclose(tokens[counted].mean((0, 1)), shard.stages[stage][3], atol=1e-5)


def test_the_card_tells_what_they_are_and_names_nobody(generated_store: Path, exported: Path, embedded: Path) -> None:
    store, card = Store.open(generated_store), card_of(embedded)
    assert card["weights"]["sha256"] == weights.read_card(exported).sha256
    assert card["store"]["id"] == store.attributes["store_id"]
    assert card["store"]["version"] == store.version
    assert card["counts"]["subjects"] == len(card["subjects"]["hashes"]) == len(store.subject_keys)
    assert card["overlap"] == {
        "known": False,
        "counted": 0,
        "asked": 24,
        "why": "the weights carry no hashes of their subjects",
    }
    ids = {name.partition("/")[2] for name in store.subject_ids() if "/" in name}
    text = "".join(path.read_text(encoding="utf-8") for path in embedded.glob("*.json"))
    # Bare numbers come by chance in hexadecimal digits.
    assert not [one for one in ids if re.search(rf"(?<![0-9a-f]){one}(?![0-9a-f])", text)]


@pytest.mark.slow
def test_ranks_and_batches_do_not_change_what_comes_out(
    generated_store: Path, exported: Path, embedded: Path, tmp_path: Path
) -> None:
    words = ["embed", str(exported), str(generated_store)]
    spread = swiftv2_run([*words, str(tmp_path / "two"), "--stages", "all", "--batch", "3", "--device", "cpu"], ranks=2)
    assert spread.returncode == 0, spread.stderr
    expected, found = read_embeddings(embedded), read_embeddings(tmp_path / "two")
    assert found.subjects == expected.subjects
    np.testing.assert_allclose(found.matrix, expected.matrix, atol=2e-6)
    assert main([*words, str(tmp_path / "zarr"), "--format", "zarr", "--device", "cpu"]) == 0
    last = read_embeddings(tmp_path / "zarr")
    np.testing.assert_allclose(last.matrix, expected.matrix[:, 12:], atol=2e-6)
    assert last.columns == expected.columns[12:]
    assert sorted(path.name for path in (tmp_path / "zarr").iterdir()) == [
        "clips.zarr",
        "embeddings.json",
        "plan.json",
        "subjects.zarr",
    ]
    clips: Any = zarr.open_group(tmp_path / "zarr" / "clips.zarr", mode="r")
    assert clips["stage2"].shape == (card_of(embedded)["counts"]["clips"], 24)
    names = clips["run"].attrs["names"]
    assert [names[place] for place in clips["run"][:]] == [key for shard in read_clips(embedded) for key in shard.keys["run"]]


@pytest.mark.slow
def test_a_stopped_command_keeps_its_shards_and_goes_on(
    generated_store: Path, exported: Path, embedded: Path, tmp_path: Path
) -> None:
    """Stopped by SIGTERM after the first shard; shards that are there are not touched again."""
    out = tmp_path / "stopped"
    words = [
        "embed",
        str(exported),
        str(generated_store),
        str(out),
        "--stages",
        "all",
        "--tokens",
        "--batch",
        "1",
        "--device",
        "cpu",
    ]
    with swiftv2_started(words, ranks=1) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("clips-*.parquet")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert not (out / "embeddings.json").exists()
    with pytest.raises(SwiftError, match="no finished embeddings"):
        read_embeddings(out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("clips-*.parquet")}
    assert before
    assert main(words) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    np.testing.assert_allclose(read_embeddings(out).matrix, read_embeddings(embedded).matrix, atol=2e-6)
    assert not list(out.glob(".*"))
    # A third time there is nothing to do, and other options are another embedding.
    assert main(words) == 0
    assert main([word for word in words if word != "--tokens"]) == 1


def test_deviations_over_tokens_stand_behind_the_means(
    generated_store: Path, exported: Path, embedded: Path, tmp_path: Path
) -> None:
    options = EmbedOptions(stages="all", pool="mean_std", device="cpu")
    both = read_embeddings(embed(exported, generated_store, tmp_path / "both", options).parent)
    means = read_embeddings(embedded)
    width = means.matrix.shape[1]
    assert both.matrix.shape == (len(means.matrix), 2 * width)
    first = both.columns.index("stage2_0")
    # Of each stage: its means, then its deviations, which are above 0.
    assert np.allclose(both.matrix[:, :12], means.matrix[:, :12], atol=1e-6)
    assert np.allclose(both.matrix[:, first : first + width - 12], means.matrix[:, 12:], atol=1e-6)
    assert (both.matrix[:, 12:first] > 0).all()


def test_an_untrained_encoder_is_another_one_of_the_same_shape(
    generated_store: Path, exported: Path, embedded: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "first_values"
    (folder / "logs").mkdir(parents=True)  # A job's launcher may have been there before.
    embed(exported, generated_store, folder, EmbedOptions(untrained=True, device="cpu", clip={"stride_between": 5.0}))
    found, trained = read_embeddings(folder), read_embeddings(embedded)
    assert found.columns == trained.columns[12:]
    assert np.abs(found.matrix - trained.matrix[:, 12:]).max() > 0.1
    assert card_of(folder)["overlap"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tr_seconds": 0.8}, "tr_seconds 2.0 \\(made for 0.8\\)"),
        ({"space": "MNI152NLin6Asym"}, "space MNI152NLin2009cAsym"),
        ({"orientation": "LAS"}, "orientation RAS"),
        ({"mask": "box"}, "mask template"),
    ],
)
def test_input_that_the_weights_were_not_made_for_is_refused(
    generated_store: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = export(generated_store, tmp_path / "other", **changes)
    with pytest.raises(SwiftError, match=said):
        embed(folder, generated_store, tmp_path / "out", EmbedOptions(device="cpu"))
    assert not (tmp_path / "out").exists()


def test_wrong_words_are_refused(
    generated_store: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", str(exported), str(generated_store), str(tmp_path / "out")]
    for word, said in (
        ("clip.frames=40", "frames 40 (made for 4)"),
        ("clip.frmes=4", "did you mean frames"),
        ("data.normalisation.kind=none", "comes from the weights"),
        ("data.cohorts=[HCP]", "no cohort 'HCP'"),
        ("grid.resample=true", "is for a NIfTI file"),
        ("train.steps=1", "embed takes"),
    ):
        assert main([*words, word]) in (1, 2)
        assert said in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(SwiftError, match="holds other files"):
        embed(exported, generated_store, tmp_path / "full")
    with pytest.raises(UsageError, match="for GPUs"):
        embed(exported, generated_store, tmp_path / "half", EmbedOptions(precision="bf16", device="cpu"))


def test_subjects_of_the_pretraining_are_declared_or_refused(generated_store: Path, tmp_path: Path) -> None:
    store = Store.open(generated_store)
    folder = export(generated_store, tmp_path / "seen", subjects=hashes_of(store, store.subject_keys[:5]))
    options: dict[str, Any] = {"device": "cpu", "clip": {"stride_between": 10.0}}
    embed(folder, generated_store, tmp_path / "out", EmbedOptions(**options))
    assert card_of(tmp_path / "out")["overlap"] == {"known": True, "counted": 5, "asked": 24, "why": None}
    with pytest.raises(SwiftError, match="trained on 5 of the 24 subjects"):
        embed(folder, generated_store, tmp_path / "refused", EmbedOptions(**options, refuse_overlap=True))


def test_withdrawn_subjects_have_no_embedding_and_older_ones_are_found(
    generated_store: Path, exported: Path, embedded: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cohort.zarr"
    shutil.copytree(generated_store, copy)
    gone = Store.open(copy).subject_keys[3]
    (tmp_path / "list.txt").write_text(f"{gone}\n", encoding="utf-8")
    withdrawal = read_withdrawals(copy, tmp_path / "list.txt")
    users = find_users([embedded], copy, withdrawal).users
    assert [(user.kind, user.trained_on) for user in users] == [("other", 1)]
    drop(copy, withdrawal)
    embed(exported, copy, tmp_path / "after", EmbedOptions(device="cpu", stages="all", clip={"stride_between": 10.0}))
    found = read_embeddings(tmp_path / "after")
    assert len(found.subjects) == 23
    assert gone not in found.subjects


def test_a_nifti_file_is_embedded_as_the_same_run_of_a_store(
    generated_store: Path, exported: Path, embedded: Path, tmp_path: Path
) -> None:
    """With what lies beside it, from a folder whose name holds a glob's own characters; nothing stays behind."""
    store = Store.open(generated_store)
    scan = max((generated_store.parent / "bids").rglob("*_desc-preproc_bold.nii.gz"))
    folder = tmp_path / "a [strange] folder"
    folder.mkdir()
    for beside in scan.parent.glob(f"{scan.name.partition('_space')[0]}_*"):
        shutil.copy(beside, folder)
    out = tmp_path / "one"
    assert main(["embed", str(exported), str(folder / scan.name), str(out), "--stages", "all", "--device", "cpu"]) == 0
    found = read_embeddings(out)
    assert len(found.subjects) == 1
    same = next(run for run in store.runs if run.source_sha256 == sha256(scan))
    shards = list(read_clips(embedded))
    keys = np.concatenate([shard.keys["run"] for shard in shards])
    values = np.concatenate([np.concatenate([shard.stages[s] for shard in shards]) for s in (1, 2)], axis=1)
    np.testing.assert_allclose(found.matrix[0], values[keys == same.key].mean(0), atol=2e-6)
    card = card_of(out)
    assert card["store"] is None
    assert card["subjects"] is None
    assert not card["overlap"]["known"]
    assert not list(Path(tempfile.gettempdir()).glob("swiftv2-embed-*"))


def test_a_nifti_file_of_unknown_space_or_another_grid_is_refused(
    generated_store: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = min((generated_store.parent / "bids").rglob("*_desc-preproc_bold.nii.gz"))
    nibabel: Any = nib
    image = nibabel.load(scan)
    nibabel.save(image, tmp_path / "my_bold.nii.gz")
    shifted = image.affine.copy()
    shifted[:3, 3] += 2.0
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), shifted, image.header), tmp_path / "shifted_bold.nii.gz")
    slow = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    slow.header.set_zooms((*image.header.get_zooms()[:3], 3.0))
    nibabel.save(slow, tmp_path / "slow_bold.nii.gz")
    space = "grid.space=MNI152NLin2009cAsym"
    for name, given, said in (
        ("my", [], "space"),
        ("my", ["grid.space=MNI152NLin6Asym"], "made for MNI152NLin2009cAsym: bring it"),
        ("shifted", [space], "grid.resample=true"),
        ("slow", [space], "tr_seconds 3.0 (made for 2.0)"),
        ("missing", [space], "not there"),
    ):
        words = ["embed", str(exported), str(tmp_path / f"{name}_bold.nii.gz"), str(tmp_path / "out"), *given]
        assert main(words) in (1, 2)
        assert said in capsys.readouterr().err, name
        assert not (tmp_path / "out").exists()
    words = ["embed", str(exported), str(tmp_path / "shifted_bold.nii.gz"), str(tmp_path / "out"), space]
    assert main([*words, "grid.resample=true", "--cohort", "generated", "--device", "cpu"]) == 0
    assert card_of(tmp_path / "out")["subjects"] is not None
