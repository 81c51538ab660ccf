"""Baselines through the whole path: planted traits are found by whom they were planted for, and results can be compared."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from swiftv2 import cli, weights
from swiftv2.config.data import GridConfig
from swiftv2.config.load import build as checked
from swiftv2.config.load import load, presets_root
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.config.task import TaskConfig
from swiftv2.data.changes.build import build
from swiftv2.data.store.reader import Store
from swiftv2.downstream.predictions import by_subject, read
from swiftv2.errors import SwiftError, UsageError
from swiftv2.models.simmim import SimMIM
from swiftv2.recipes.comparison import Source, compare_folders
from swiftv2.recipes.embed import embed
from swiftv2.recipes.encoding import EmbedOptions
from swiftv2.recipes.feature_sets import FeatureOptions
from swiftv2.recipes.probe import ProbeOptions, permutations, probe, rows_of
from swiftv2.recipes.task import open_task
from swiftv2.recipes.task_facts import describe_task

Floats = NDArray[np.float64]
SHAPE, FRAMES, SUBJECTS = (6, 5, 4), 40, 60
AFFINE = np.array([[20.0, 0, 0, -50], [0, 20, 0, -50], [0, 0, 20, -30], [0, 0, 0, 1]])
SPACE = "MNI152NLin6Asym"
OVERLAP = {"known": True, "counted": 3, "asked": 60, "why": None}
FEW = 50
"""Draws of subjects: intervals are tested where they are made."""


def _write(folder: Path, name: str, bold: Floats, moved: Floats) -> None:
    func = folder / name.partition("_")[0] / "func"
    func.mkdir(parents=True, exist_ok=True)
    image: Any = nib.Nifti1Image(bold.astype(np.int16), AFFINE)  # type: ignore[no-untyped-call]
    image.header.set_zooms((20, 20, 20, 2.0))
    nib.save(image, func / f"{name}_space-{SPACE}_desc-preproc_bold.nii.gz")
    (func / f"{name}_space-{SPACE}_desc-preproc_bold.json").write_text('{"RepetitionTime": 2.0}')
    table = pd.DataFrame({"framewise_displacement": moved})
    table.to_csv(func / f"{name}_desc-confounds_timeseries.tsv", sep="\t", index=False, na_rep="n/a")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty subjects, ten pairs of siblings, two sites; each label is planted in one place and nowhere else."""
    folder, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0)
    rows = []
    for number in range(SUBJECTS):
        image, coupling, restless, nothing = rng.integers(0, 2, 4)
        bold = 1000 + 100 * rng.normal(size=(*SHAPE, 1)) + 20 * rng.normal(size=(*SHAPE, FRAMES))
        bold[0, 0, :, :] += 300 * image
        left, right = rng.normal(size=(2, FRAMES))
        bold[:3] += 30 * left
        bold[3:] += 30 * (0.9 * left + 0.4 * right if coupling else right)
        age = 40 + 10 * rng.normal()
        bold[4, 4] += 10 * (age - 40)
        moved = np.append(np.nan, np.abs(rng.normal(0.3 if restless else 0.1, 0.05, FRAMES - 1)))
        _write(folder / "bids", f"sub-{number:02d}_task-rest", bold, moved)
        values = {"image": image, "coupling": coupling, "restless": restless, "nothing": nothing, "age": age}
        family = f"f{number // 2}" if number < 20 else "n/a"
        rows.append({"participant_id": f"sub-{number:02d}", "family_id": family, "site": f"s{number % 2}"} | values)
    table = pd.DataFrame(rows)
    table.loc[[3, 30], ["image", "age"]] = np.nan
    for column in ("image",):
        table[column] = table[column].map(lambda value: "n/a" if np.isnan(value) else str(int(value)))
    table.to_csv(folder / "bids" / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    build(folder / "bids", folder / "store", GridConfig(kind="source", mask="box"), "a", salt="0" * 32)
    halves = np.ones(SHAPE, dtype=np.int16)
    halves[3:] = 2
    nib.save(nib.Nifti1Image(halves, AFFINE), folder / "halves.nii.gz")  # type: ignore[no-untyped-call]
    return folder


def _task(cohort: Path, **changes: Any) -> TaskConfig:
    targets = [{"column": name, "kind": "classification"} for name in ("image", "coupling", "restless", "nothing")]
    tree = {
        "name": "planted",
        "targets": [*targets, {"column": "age", "kind": "regression"}],
        "data": {"store": str(cohort / "store")},
        "split": {"kind": "kfold", "count": 4},
    }
    return checked(TaskConfig, tree | changes, "test")


def _options(cohort: Path, **changes: Any) -> ProbeOptions:
    return ProbeOptions(FeatureOptions(atlas=str(cohort / "halves.nii.gz"), **changes), bootstrap=FEW)


@pytest.fixture(scope="module")
def results(cohort: Path) -> Path:
    done = probe(_task(cohort), cohort / "out", _options(cohort, cache=cohort / "cache"))
    assert done.left_out == {"covariates": "the task names no covariates"}
    assert len(done.results) == 5 * 4
    return cohort / "out"


def _means(out: Path, metric: str = "auroc") -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for path in out.glob("*/split_*/result.json"):
        tree = json.loads(path.read_text())
        for column, target in tree["targets"].items():
            if metric in target["test"]["metrics"]:
                found.setdefault((tree["name"], column), []).append(target["test"]["metrics"][metric]["value"])
    return {key: float(np.mean(values)) for key, values in found.items()}


@pytest.mark.slow
def test_planted_traits_are_found_by_the_features_that_hold_them_and_by_no_other(results: Path) -> None:
    auroc = _means(results)
    assert auroc["mean_image", "image"] > 0.8
    assert auroc["connectivity", "coupling"] > 0.9
    assert auroc["motion", "restless"] > 0.9
    assert _means(results, "mae")["mean_image", "age"] < 0.8 * _means(results, "mae")["majority", "age"]
    # Over 60 subjects an AUROC of nothing varies by about 0.075.
    for method, column in (("motion", "coupling"), ("connectivity", "restless"), ("connectivity", "nothing")):
        assert 0.2 < auroc[method, column] < 0.8
    assert {auroc[key] for key in auroc if key[0] == "majority"} == {0.5}


@pytest.mark.slow
def test_a_result_says_what_its_predictions_say(cohort: Path, results: Path) -> None:
    tree = json.loads((results / "mean_image" / "split_1" / "result.json").read_text())
    predictions = read(results / "mean_image" / "split_1" / "predictions.csv")
    assert tree["split"] == {"kind": "kfold", "index": 1, "count": 4, "seed": 0, "unit": "subject"}
    assert set(tree["subjects"]) == {"train", "val", "test"}
    assert sum(tree["subjects"].values()) == SUBJECTS
    found = by_subject(predictions["test"]["image"])
    assert tree["targets"]["image"]["test"]["n"] == len(found)
    value = tree["targets"]["image"]["test"]["metrics"]["auroc"]["value"]
    assert value == pytest.approx(roc_auc_score(found.truth, found.score[:, 1]))
    own = open_task(_task(cohort, split={"kind": "kfold", "count": 4, "index": 1}))
    assert set(found.unit) <= set(own.splits.test)
    assert tree["targets"]["image"]["threshold"] != 0.5
    store = Store.open(cohort / "store")
    text = (results / "mean_image" / "split_1" / "predictions.csv").read_text() + json.dumps(tree)
    assert not any(name in text for name in store.subject_ids() if name.startswith("sub-"))


@pytest.mark.slow
def test_what_is_done_stays_and_another_task_is_refused_in_its_folder(cohort: Path, results: Path) -> None:
    path = results / "motion" / "split_0" / "result.json"
    before = path.stat().st_mtime_ns
    probe(_task(cohort), results, _options(cohort, methods=("motion",)))
    assert path.stat().st_mtime_ns == before
    with pytest.raises(SwiftError, match="of another task, store or way to measure features"):
        probe(_task(cohort, split={"kind": "kfold", "count": 4, "seed": 1}), results, _options(cohort, methods=("motion",)))


@pytest.mark.slow
def test_methods_are_compared_on_the_same_subjects(cohort: Path, results: Path) -> None:
    tree = compare_folders([Source(results)], "majority", bootstrap=FEW)
    found = tree["targets"]["restless"]["metrics"]["auroc"]["methods"]["motion"]
    assert found["difference"]["mean"] > 0.4
    assert found["difference"]["corrected_t"]["low"] > 0.2
    assert compare_folders([Source(results)], bootstrap=0)["reference"] == "connectivity"
    renamed = compare_folders([Source(results / "motion", "moves"), Source(results / "majority")], bootstrap=0)
    assert renamed["methods"] == ["moves", "majority"]
    with pytest.raises(UsageError, match=r"no result\.json there or below it"):
        compare_folders([Source(cohort / "bids")])


def test_covariates_are_a_baseline_and_are_taken_out_of_the_others(cohort: Path, tmp_path: Path) -> None:
    task = _task(
        cohort,
        targets=[{"column": "restless", "kind": "classification"}],
        covariates=["motion", "site"],
        split={"kind": "kfold", "count": 3},
    )
    probe(task, tmp_path, _options(cohort, methods=("covariates", "motion")))
    auroc = _means(tmp_path)
    assert auroc["covariates", "restless"] > 0.9
    assert auroc["motion", "restless"] < 0.8  # The mean is gone; the largest and the spikes still tell a little.


def test_numbers_are_judged_without_what_covariates_explain(cohort: Path) -> None:
    data = open_task(_task(cohort, targets=[{"column": "age", "kind": "regression"}], covariates=["site", "motion"]))
    rows = rows_of(data)
    train = rows.part == "train"
    known = train & ~np.isnan(rows.numbers["age"])
    for column in rows.covariates.T:
        assert abs(np.corrcoef(column[known], rows.numbers["age"][known])[0, 1]) < 1e-9
    np.testing.assert_array_equal(rows.numbers["age"], data.judged(data.config.targets[0]))


def test_families_are_one_group_and_whole_in_permutations(cohort: Path, tmp_path: Path) -> None:
    task = _task(cohort, split={"kind": "kfold", "count": 3})
    rows = rows_of(open_task(task))
    names, sizes = np.unique(rows.group, return_counts=True)
    assert sorted(sizes[[name.startswith("family") for name in names]]) == [2] * 10
    options = _options(cohort, methods=("motion", "majority"))
    found = permutations(task, tmp_path, "restless", 20, options, within_sites=False)
    assert set(found) == {"motion"}
    assert found["motion"]["observed"] > 0.9
    assert found["motion"]["p"] == pytest.approx(1 / 21)
    assert abs(found["motion"]["mean"] - 0.5) < 0.1
    assert json.loads((tmp_path / "motion" / "permutations.json").read_text())["values"] == found["motion"]["values"]
    with pytest.raises(UsageError, match="not of numbers"):
        permutations(task, tmp_path, "age", 2, options)
    with pytest.raises(UsageError, match="the task's targets are image"):
        permutations(task, tmp_path, "height", 2, options)


def test_embeddings_are_means_over_clips_and_runs(cohort: Path, tmp_path: Path) -> None:
    """An embedding that holds the label in one of its stages is read by that stage, and by no other."""
    store = Store.open(cohort / "store")
    labels = store.labels()
    rng = np.random.default_rng(5)
    rows = []
    for run, row in zip(store.runs, labels, strict=True):
        for start in (0, 20):
            told = float(row["nothing"] or 0) + (5.0 if start else -5.0)
            key = {"subject": run.subject, "run": run.key, "cohort": "a", "start": start, "tr": 2.0}
            rows.append(key | {"stage1_0": rng.normal(), "stage2_0": told, "stage2_1": rng.normal()})
    folder = tmp_path / "embeddings"
    folder.mkdir()
    table = pd.DataFrame(rows).sample(frac=1.0, random_state=0)
    for number, part in enumerate((table[:50], table[50:])):
        part.to_parquet(folder / f"clips-{number:05d}.parquet")
    stages = [{"stage": 1, "width": 1}, {"stage": 2, "width": 2}]
    (folder / "embeddings.json").write_text(json.dumps({"format": "parquet", "stages": stages, "overlap": OVERLAP}))
    embeddings = {"second": f"{folder}#2", "first": f"{folder}#1"}
    task = _task(cohort, targets=[{"column": "nothing", "kind": "classification"}], split={"kind": "kfold", "count": 3})
    done = probe(task, tmp_path / "out", _options(cohort, methods=tuple(embeddings), embeddings=embeddings))
    assert "3 of 60 embedded subjects were seen in pretraining" in done.about["first"]
    assert json.loads((done.results[0] / "result.json").read_text())["overlap"] == OVERLAP
    auroc = _means(tmp_path / "out")
    assert auroc["second", "nothing"] == 1.0
    assert 0.2 < auroc["first", "nothing"] < 0.8
    with pytest.raises(SwiftError, match="stages are 1, 2"):
        probe(task, tmp_path / "out", _options(cohort, methods=("x",), embeddings={"x": f"{folder}#7"}))
    (folder / "clips-00001.parquet").unlink()
    with pytest.raises(SwiftError, match=r"has nothing of \d+ of the 60 units"):
        probe(task, tmp_path / "new", _options(cohort, methods=("x",), embeddings={"x": str(folder)}))


def test_an_encoder_is_probed_on_what_it_embeds(cohort: Path, tmp_path: Path) -> None:
    """An untrained encoder's means over tokens hold the mean image: what was planted there is found, and nothing else."""
    store = Store.open(cohort / "store")
    model = {"name": "tiny", "image_size": SHAPE, "frames": 4, "embed_dim": 12, "depths": [1], "num_heads": [2]}
    model |= {"patch_size": [3, 5, 2, 2]}
    mask = MaskConfig(patch_size=(3, 5, 2, 2), among="all")
    given = {"orientation": "RAS", "grid": SHAPE, "voxel_mm": [20, 20, 20], "tr_seconds": 2.0, "frames": 4, "mask": "box"}
    card = {"kind": "simmim", "model": model, "mask": mask.model_dump(), "loss": LossConfig().model_dump(), "subjects": None}
    card["input"] = given | {"space": store.grid.space, "normalisation": {"kind": "znorm_zeroback"}}
    weights.export(tmp_path / "weights", SimMIM(ModelConfig.model_validate(model), mask, LossConfig(), seed=1), card)
    embed(tmp_path / "weights", store.path, tmp_path / "embedded", EmbedOptions(untrained=True, device="cpu"))
    task = _task(cohort, split={"kind": "kfold", "count": 3})
    probe(
        task, tmp_path / "out", _options(cohort, methods=("untrained",), embeddings={"untrained": str(tmp_path / "embedded")})
    )
    auroc = _means(tmp_path / "out")
    assert auroc["untrained", "image"] > 0.7
    assert 0.2 < auroc["untrained", "nothing"] < 0.8


def test_what_a_task_cannot_have_is_told(cohort: Path, tmp_path: Path) -> None:
    task = _task(cohort)
    with pytest.raises(UsageError, match="the task names no covariates"):
        probe(task, tmp_path, _options(cohort, methods=("covariates",)))
    with pytest.raises(UsageError, match="this task has no 'pattern'; there are majority"):
        probe(task, tmp_path, _options(cohort, methods=("pattern",)))
    with pytest.raises(UsageError, match="the task has 4 splits"):
        probe(task, tmp_path, ProbeOptions(FeatureOptions(methods=("motion",)), splits=(4,)))


def test_a_task_is_described_in_numbers(cohort: Path) -> None:
    tree = describe_task(_task(cohort, split={"kind": "site", "val_share": 0.3}))
    assert tree["subjects"] == SUBJECTS
    assert tree["families_of_several"] == 10
    assert tree["sites"] == {"s0": 30, "s1": 30}
    assert tree["targets"]["image"]["missing"] == 2
    assert len(tree["splits"]) == 2
    # Siblings are at different sites here: whoever has one where it is tested is left out.
    assert [split["unassigned"] for split in tree["splits"]] == [10, 10]
    assert sum(tree["targets"]["coupling"]["classes"].values()) == SUBJECTS


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs of one subject, of three states in blocks of ten volumes, each with an image of its own."""
    folder, rng = tmp_path_factory.mktemp("states"), np.random.default_rng(1)
    images = 60 * rng.normal(size=(3, *SHAPE))
    level = 1000 + 100 * rng.normal(size=SHAPE)
    for run in range(8):
        order = rng.permutation([0, 1, 2, 0, 1, 2])
        bold = np.stack([level + images[state] + 30 * rng.normal(size=SHAPE) for state in np.repeat(order, 10)], axis=-1)
        name = f"sub-01_task-see_run-{run + 1}"
        _write(folder / "bids", name, bold, np.append(np.nan, np.full(59, 0.1)))
        lines = [f"{20 * block}\t20\t{'ABC'[state]}" for block, state in enumerate(order)]
        path = folder / "bids" / "sub-01" / "func" / f"{name}_events.tsv"
        path.write_text("\n".join(["onset\tduration\ttrial_type", *lines]) + "\n")
    build(folder / "bids", folder / "store", GridConfig(kind="source", mask="box"), "a", salt="0" * 32)
    return folder


def _decoding(states: Path) -> TaskConfig:
    tree = {
        "name": "states",
        "targets": [{"column": "trial_type", "kind": "classification"}],
        "data": {"store": str(states / "store"), "normalisation": {"kind": "none"}},
        "clip": {"frames": 5},
        "events": {"folder": str(states / "bids"), "delay_seconds": 0.0},
        "split": {"kind": "kfold", "count": 4, "unit": "run"},
    }
    return checked(TaskConfig, tree, "test")


def test_states_are_decoded_from_clips_with_whole_runs_held_out(states: Path, tmp_path: Path) -> None:
    done = probe(_decoding(states), tmp_path, ProbeOptions(bootstrap=FEW))
    assert done.left_out == {"connectivity": "clips of 5 frames are too short for correlations; 10 are needed"}
    accuracy = _means(tmp_path, "balanced_accuracy")
    assert accuracy["mean_image", "trial_type"] > 0.95
    assert accuracy["pattern", "trial_type"] > 0.9
    assert accuracy["motion", "trial_type"] < 0.6
    assert accuracy["majority", "trial_type"] == pytest.approx(1 / 3)
    predictions = read(tmp_path / "mean_image" / "split_0" / "predictions.csv")["test"]["trial_type"]
    data = open_task(_decoding(states))
    assert set(predictions.run) == set(data.splits.test)
    assert len(set(predictions.unit)) == len(predictions) == 2 * 12
    tree = json.loads((tmp_path / "mean_image" / "split_0" / "result.json").read_text())
    assert tree["targets"]["trial_type"]["test"]["groups"] == 2
    with pytest.raises(UsageError, match="of states within a run"):
        permutations(_decoding(states), tmp_path, "trial_type", 2, ProbeOptions())


READY = sorted((presets_root() / "task").glob("*.yaml"))


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_tasks_load(path: Path) -> None:
    assert load(TaskConfig, path, ["data.store=elsewhere.zarr"]).name == path.stem


def test_there_are_ready_tasks_for_the_cohorts() -> None:
    traits = {
        "ukb": "sex age intelligence depression",
        "hcp": "sex age intelligence",
        "abcd": "sex age intelligence depression",
    }
    wanted = {f"{cohort}_{trait}" for cohort, names in traits.items() for trait in names.split()}
    wanted |= {"abide_asd", "embarc_response", "tops_pain", "hcp_task_state", "generated"}
    assert wanted <= {path.stem for path in READY}


@pytest.fixture
def task_file(cohort: Path, tmp_path: Path) -> Path:
    path = tmp_path / "task.yaml"
    target = "{column: restless, kind: classification}"
    path.write_text(f"name: planted\ntargets: [{target}]\ndata: {{store: {cohort / 'store'}}}\n")
    return path


def test_the_commands_show_fit_and_compare(task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = [str(task_file), "split.count=3"], str(tmp_path / "out")
    assert cli.main(["task", "show", *words]) == 0
    assert "no subject or family is in two parts" in capsys.readouterr().out
    some = ["--methods", "motion,majority", "--bootstrap", str(FEW)]
    assert cli.main(["task", "baselines", words[0], out, words[1], *some, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["means"]["motion"]["restless"]["mean"] > 0.9
    assert cli.main(["task", "baselines", words[0], out, words[1], *some, "--permutations", "3", "--target", "restless"]) == 0
    assert "motion, restless permuted 3 times: mean AUROC" in capsys.readouterr().out
    assert cli.main(["task", "compare", out, "--task", words[0], "--out", str(tmp_path / "report")]) == 0
    assert "less majority" in capsys.readouterr().out
    assert (tmp_path / "report" / "forest.png").stat().st_size > 1000
    assert json.loads((tmp_path / "report" / "comparison.json").read_text())["reference"] == "majority"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--permutations", "5"], "--permutations N and --target COLUMN go together"),
        (["--band", "0.1"], "--band 0.1: write LOW,HIGH in Hz"),
        (["--splits", "one"], "--splits one: write numbers"),
        (["--embeddings", "folder"], "--embeddings folder: write NAME=FOLDER"),
        (["--methods", "magic"], "this task has no 'magic'"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    words: list[str], problem: str, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["task", "baselines", str(task_file), str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1
