"""What a run says of its data: counts that agree with the store, leaks that are found, and nobody's name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from swiftv2.config.data import ClipConfig
from swiftv2.config.load import presets_root, read_yaml
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.clips import index_clips
from swiftv2.data.store.reader import Store
from swiftv2.recipes.data import open_data, sheet_of
from swiftv2.recipes.datasheet import Part, data_sheet

CLIP = ClipConfig(frames=10)


def _config(store: Path, run: Path) -> PretrainConfig:
    tree = read_yaml(presets_root() / "model" / "tiny.yaml") | {"frames": 10}
    values = {
        "run": {"dir": run},
        "data": {"store": store, "split": {"seed": 1, "fractions": [0.75, 0.25, 0.0]}},
        "clip": {"frames": 10},
        "model": tree,
        "mask": {"patch_size": tree["patch_size"]},
        "train": {"max_steps": 1, "global_batch": 1},
    }
    return PretrainConfig.model_validate(values)


def _part(store: Store, name: str, subjects: list[str]) -> Part:
    runs = [index for index, run in enumerate(store.runs) if run.subject in subjects]
    return Part(name, subjects, index_clips(store.runs, CLIP, runs))


@pytest.fixture(scope="module")
def store(generated_store: Path) -> Store:
    return Store.open(generated_store)


def test_a_sheet_counts_what_the_run_takes(store: Store, generated_store: Path, tmp_path: Path) -> None:
    data = open_data(_config(generated_store, tmp_path / "run"))
    sheet = sheet_of(_config(generated_store, tmp_path / "run"), data)
    cohort = sheet["cohorts"]["generated"]
    assert cohort["subjects"] == {"train": len(data.splits.train), "val": len(data.splits.val)}
    assert cohort["clips"] == {"train": len(data.train), "val": len(data.heldout)}
    assert cohort["runs"] == len(store.runs)
    assert cohort["hours"] == pytest.approx(sum(run.frames * run.tr for run in store.runs) / 3600, abs=1e-3)
    assert cohort["tr"] == {"2": len(store.runs)}
    frames = [store.frame_values("framewise_displacement", i) for i in range(len(store.runs))]
    own = [np.nanmean(values) for values in frames if values is not None]
    assert cohort["framewise_displacement_mm"]["median"] == pytest.approx(np.median(own), abs=1e-4)
    brain = store.brain(0)
    snr = np.median(store.voxel_mean(0)[brain] / store.voxel_std(0)[brain])
    assert snr == pytest.approx(cohort["temporal_snr"]["median"], rel=0.5)
    assert sheet["leakage"]["subjects"] == 0
    assert sheet["leakage"]["families"] == 0
    assert sheet["refused"] == {}


def test_what_cannot_be_read_of_a_run_is_counted_and_refuses_nothing(generated_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    shutil.copytree(generated_store, store)
    chunk = max((path for path in store.rglob("*") if path.is_file() and "voxel_mean/c" in path.as_posix()), key=str)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 64] = bytes(64)
    chunk.write_bytes(content)
    config = _config(store, tmp_path / "run")
    cohort = sheet_of(config, open_data(config))["cohorts"]["generated"]
    assert cohort["unreadable"] > 0
    assert cohort["temporal_snr"] is None or cohort["temporal_snr"]["runs"] == cohort["runs"] - cohort["unreadable"]


def test_planted_leaks_are_counted(store: Store) -> None:
    keys = list(dict.fromkeys(run.subject for run in store.runs))
    parts = [_part(store, "train", keys[:8]), _part(store, "val", keys[7:10])]
    families = {keys[0]: "a", keys[8]: "a", keys[1]: "b", keys[2]: "b"}
    found = data_sheet(store, parts, families, CLIP)["leakage"]
    assert found["subjects"] == 1
    assert found["families"] == 1
    assert data_sheet(store, parts, {}, CLIP)["leakage"]["families"] is None


def test_files_of_equal_content_in_two_parts_are_found(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list(dict.fromkeys(run.subject for run in store.runs))
    parts = [_part(store, "train", keys[:4]), _part(store, "val", keys[4:6])]
    assert data_sheet(store, parts, {}, CLIP)["leakage"]["files"] == 0
    twin = next(index for index, run in enumerate(store.runs) if run.subject == keys[4])
    runs = list(store.runs)
    runs[twin] = type(runs[twin]).from_json(runs[twin].to_json() | {"source_sha256": runs[0].source_sha256})
    monkeypatch.setattr(store, "runs", tuple(runs))
    assert data_sheet(store, parts, {}, CLIP)["leakage"]["files"] == 1


def test_where_runs_are_divided_a_subject_counts_in_both_parts_and_so_do_its_files(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list(store.runs[:2])
    # Two runs of one subject, of one file's content, on either side of the split.
    runs[1] = type(runs[1]).from_json(
        runs[1].to_json() | {"subject": runs[0].subject, "cohort": runs[0].cohort, "source_sha256": runs[0].source_sha256}
    )
    monkeypatch.setattr(store, "runs", (*runs, *store.runs[2:]))
    subject = [runs[0].subject]
    parts = [Part(name, subject, index_clips(store.runs, CLIP, [place])) for place, name in enumerate(("train", "test"))]
    sheet = data_sheet(store, parts, {}, CLIP, "run")
    assert sheet["cohorts"][runs[0].cohort]["subjects"] == {"test": 1, "train": 1}
    assert sheet["leakage"]["subjects"] == sheet["leakage"]["files"] == 1


def test_no_subject_and_no_file_is_named(store: Store, generated_store: Path, tmp_path: Path) -> None:
    config = _config(generated_store, tmp_path / "run")
    text = json.dumps(sheet_of(config, open_data(config)))
    named = [*store.subject_ids(), *store.subject_ids().values(), *(run.subject for run in store.runs), str(generated_store)]
    assert not [name for name in named if name in text]


def test_refusals_are_counted_by_their_reason_and_without_names(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [
        {"status": "refused", "reason": "NaN or infinity: 5 of 100 numbers in the kept voxels"},
        {"status": "refused", "reason": "NaN or infinity: 17 of 120 numbers in the kept voxels"},
        {"status": "refused", "reason": "the file sub-0042/func/a.nii.gz is missing"},
        {"status": "taken", "reason": ""},
    ]
    (tmp_path / "build_report.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(store, "path", tmp_path)
    refused = data_sheet(store, [], {}, CLIP)["refused"]
    assert sorted(refused.values()) == [1, 2]
    assert "sub-0042" not in json.dumps(refused)
    (tmp_path / "build_report.jsonl").write_text("{torn")
    assert data_sheet(store, [], {}, CLIP)["refused"] is None
