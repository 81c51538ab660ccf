"""Data sheet, checks and results on the page of a run: what files say, in words, and nothing where there are none."""

import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest
from made_runs import EVIL, write_run

from swiftv2.report.run.datasheet import datasheet_section
from swiftv2.report.run.downstream import downstream_section
from swiftv2.report.run.overlap import overlap_section
from swiftv2.report.run.reading import Run, read_run

SHEET: dict[str, Any] = {
    "store": "34a97f4e90b11578",
    "version": 2,
    "generated": False,
    "grid": {"shape": [96, 96, 96], "voxel_mm": [2.0, 2.0, 2.0], "orientation": "RAS", "space": "MNI152NLin2009cAsym"},
    "voxels": 250000,
    "clip": {"frames": 20, "seconds": None},
    "unit": "subject",
    "cohorts": {
        EVIL: {
            "runs": 1200,
            "subjects": {"train": 900, "val": 100},
            "clips": {"train": 9000, "val": 1000},
            "hours": 120.5,
            "tr": {"0.72": 1000, "2": 200},
            "spaces": {"MNI152NLin2009cAsym": 1200},
            "orientations": {"LAS": 1200},
            "resampled": 200,
            "cleaned": 0,
            "looked_at": 200,
            "framewise_displacement_mm": None,
            "temporal_snr": {"median": 55.2, "percentile_90": 80.0, "runs": 200},
        }
    },
    "runs_in_store": 1300,
    "refused": {"constant: no brain voxel changes over the run": 3},
    "withdrawn": 4,
    "too_short": 0,
    "leakage": {"subjects": 0, "families": None, "files": 0, "families_known": 0},
}


def _run(folder: Path, **files: Any) -> Run:
    path = write_run(folder / "run", steps=3)
    for name, tree in files.items():
        (path / f"{name}.json").write_text(json.dumps(tree))
    return read_run(path)


def _text(section: Element | None) -> str:
    assert section is not None
    return " ".join("".join(section.itertext()).split())


def test_a_run_without_files_has_no_sections(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert datasheet_section(run) is overlap_section(run) is downstream_section(run) is None


def test_the_data_sheet_tells_counts_motion_and_refusals(tmp_path: Path) -> None:
    text = _text(datasheet_section(_run(tmp_path, datasheet=SHEET)))
    assert "1,200 runs of 1,000 subjects in 1 cohort, 120.5 hours of BOLD, measured." in text
    assert EVIL in text
    assert "0.72 (1,000), 2 (200)" in text
    assert "not known" in text
    assert "200 resampled onto the grid and 4 withdrawn since" in text
    assert "3 files refused by the builds of the store" in text
    assert "some runs of each cohort" in text


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"subjects": 0, "families": None, "files": 0, "families_known": 0}, "No leak was found. 1 check could not be made."),
        ({"subjects": 0, "families": 0, "files": 0, "families_known": 8}, "No leak was found."),
        ({"subjects": 1, "families": 2, "files": 0, "families_known": 8}, "2 checks failed: held-out scores are not"),
        ({"subjects": 0, "families": 0, "files": 3, "families_known": 8}, "1 check failed: held-out scores are not"),
    ],
)
def test_leaks_are_told_first(tmp_path: Path, found: dict[str, int | None], says: str) -> None:
    assert says in _text(overlap_section(_run(tmp_path, datasheet=SHEET | {"leakage": found})))


def test_subjects_in_two_parts_are_as_asked_where_runs_are_divided(tmp_path: Path) -> None:
    leakage = {"subjects": 5, "families": 0, "files": 0, "families_known": 5}
    text = _text(overlap_section(_run(tmp_path, datasheet=SHEET | {"unit": "run", "leakage": leakage})))
    assert "as asked: the split divides runs" in text
    assert "No leak was found." in text


RESULT: dict[str, Any] = {
    "task": EVIL,
    "name": "last_blocks",
    "split": {},
    "subjects": {"train": 37, "val": 7, "test": 4},
    "seed": 0,
    "best_step": 120,
    "overlap": {"known": True, "counted": 3, "asked": 11, "why": None},
    "targets": {
        "sex": {
            "kind": "classification",
            "val": {"n": 7, "metrics": {"auroc": {"value": 0.8123, "low": 0.6, "high": 0.95}}},
            "test": {"n": 4, "metrics": {"auroc": {"value": None, "low": None, "high": None, "reason": "one class only"}}},
        }
    },
}


def test_results_stand_with_their_intervals_and_their_reasons(tmp_path: Path) -> None:
    text = _text(downstream_section(_run(tmp_path, result=RESULT)))
    assert "37 train, 7 val, 4 test" in text
    assert "0.812" in text
    assert "0.600 to 0.950" in text
    assert "not defined" in text
    assert "one class only" in text


def test_subjects_that_the_weights_have_seen_fail_a_check(tmp_path: Path) -> None:
    seen = _text(overlap_section(_run(tmp_path / "a", datasheet=SHEET, result=RESULT)))
    assert "3 of 11, declared by encoder.overlap" in seen
    assert "1 check failed" in seen
    unknown = RESULT | {"overlap": {"known": False, "counted": 0, "asked": 11, "why": "no hashes"}}
    assert "2 checks could not be made" in _text(overlap_section(_run(tmp_path / "b", datasheet=SHEET, result=unknown)))


def test_a_forest_plot_above_the_run_stands_beside_its_result(tmp_path: Path) -> None:
    run = _run(tmp_path, result=RESULT)
    assert "Beside other methods" not in _text(downstream_section(run))
    (tmp_path / "forest.png").write_bytes(b"\x89PNG made by task compare")
    section = downstream_section(run)
    assert "Beside other methods" in _text(section)
    assert section is not None
    assert [image.get("src", "")[:22] for image in section.iter("img")] == ["data:image/png;base64,"]
