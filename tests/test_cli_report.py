"""`swiftv2 report`: what it writes where, what it says, and that a run in any state has a page."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from made_runs import BEGAN, EVIL, evaluation, rows, write_run

from swiftv2.cli import main


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", *words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_the_page_stands_in_the_run_and_nothing_else_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    told = answers(capsys, str(run))
    assert told["page"] == str(run / "report.html")
    assert told["runs"][0]["verdicts"][0]["word"] == "yes"
    page = run / "report.html"
    assert told["bytes"] == page.stat().st_size
    assert {path.name: path.read_bytes() for path in run.iterdir() if path != page} == before
    text = page.read_text()
    # The library is there once, and nothing leads out of the page.
    assert text.count("plotly.js v") == 1
    assert "default-src 'none'" in text
    assert "<link" not in text
    assert " src=" not in text.split("<script>")[0]


def test_several_runs_get_names_that_differ_and_a_page_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_run(tmp_path / parent / "run", optimizer={"lr": lr}) for parent, lr in (("a", 1e-3), ("b", 2e-3))]
    monkeypatch.chdir(tmp_path)
    told = answers(capsys, *map(str, paths))
    assert told["page"] == "report.html"
    text = (tmp_path / "report.html").read_text()
    assert "a/run" in text
    assert "b/run" in text
    assert "optimizer.lr" in text
    # The same run twice is one run.
    assert len(answers(capsys, str(paths[0]), str(paths[0]))["runs"]) == 1


@pytest.mark.parametrize("words", [["nowhere"], ["empty"]])
def test_what_is_no_run_is_refused_in_a_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / words[0])]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert words[0] in said


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "page.html" in said
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


TORN = "".join(json.dumps(row) + "\n" for row in rows(30)) + '{"step": 31, "att'
NOT_FINITE = "".join(json.dumps(row | {"loss": None, "gradient_norm": None, "loss_ratio": None}) + "\n" for row in rows(30))
START = json.dumps({"step": None, "attempt": 1, "time": BEGAN, "event": "start", "world_size": 2, "launcher": "x", "host": "h"})
FAILED = json.dumps(
    {"step": None, "attempt": 1, "time": BEGAN + 1, "event": "failed", "error": "SwiftError", "problem": "no room"}
)
STATES: dict[str, dict[str, Any]] = {
    "just begun": {"metrics.jsonl": None, "evaluation.json": None, "events.jsonl": None, "environment.json": None},
    "no resume script": {"resume.sh": None, "environment.json": None},
    "never evaluated": {"evaluation.json": None},
    "failed before step one": {"metrics.jsonl": None, "evaluation.json": None, "events.jsonl": f"{START}\n{FAILED}\n"},
    "no finite loss": {"metrics.jsonl": NOT_FINITE},
    "torn last line": {"metrics.jsonl": TORN},
    "damaged middle line": {"metrics.jsonl": TORN + "\n" + TORN},
    "lines of something else": {"metrics.jsonl": "5\n[]\n", "events.jsonl": '{"a": 1}\n'},
    "damaged evaluation": {"evaluation.json": '{"groups": '},
    "evaluation of something else": {"evaluation.json": {"groups": {"all": {"methods": []}, "x": 3}, "step": "a"}},
    "evaluation without R2": {"evaluation.json": {"step": 1, "groups": {"all": {"methods": {"model": {"r2": None}}}}}},
    "one held-out subject": {"evaluation.json": evaluation(0.3, -0.1, subjects=1)},
    "odd names": {"evaluation.json": evaluation(0.3, -0.1, cohorts=(EVIL, "two"))},
    "numbers of something else": {"metrics.jsonl": TORN.replace('"mfu": 0.31', '"mfu": "x", "total/flops": NaN')},
    "events of something else": {"events.jsonl": f'{START}\n[1]\n3\n{{"event": "saved", "time": 1e300, "step": "x"}}\n'},
    "damaged trackers": {"trackers.json": "{"},
    "damaged settings": {"config.yaml": "a: [1\n"},
    "settings of something else": {"config.yaml": "- 1\n"},
    "odd environment": {"environment.json": {"git": 3, "packages": [], "command": "x", "world_size": "many"}},
    "unknown preset": {
        "environment.json": {"command": ["swiftv2", "pretrain", "gone.yaml", "run.dir=x"], "folder": "/nowhere"}
    },
}


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_page(state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=30, made=STATES[state])
    told = answers(capsys, str(run))
    assert len(told["runs"][0]["verdicts"]) == 3
    text = (run / "report.html").read_text()
    assert "<script>document.title" not in text.replace("\\u003c", "<") or state == "odd names"
    assert "nan" not in text.split("</style>")[1].split("plotly.js v")[0].lower().split()
    # Beside a good one, too.
    other = write_run(tmp_path / "other", steps=20)
    answers(capsys, str(run), str(other), "--out", str(tmp_path / "both.html"))


def test_a_very_long_path_and_an_odd_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / ("long" * 40) / ("long" * 40) / '<i>&"', steps=30)
    answers(capsys, str(run))
    text = (run / "report.html").read_text()
    assert "<h1>&lt;i&gt;&amp;" in text


@pytest.mark.slow
def test_a_hundred_thousand_steps_take_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", steps=100_000)
    began = time.process_time()
    told = answers(capsys, str(run))
    assert time.process_time() - began < 10
    assert told["bytes"] < 8e6


def test_shared_pages_name_no_host_user_or_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", data={"store": "/data/of/ada/cohort.zarr"})
    answers(capsys, str(run))
    whole = (run / "report.html").read_text()
    assert "node-1" in whole
    assert "/home/ada" in whole
    answers(capsys, str(run), "--share")
    shared = (run / "report.html").read_text()
    for secret in ("node-1", "ada", str(tmp_path), "/home"):
        assert secret not in shared.replace(shared[shared.index("plotly.js v") : shared.rindex("<script>")], "")
    assert "cohort.zarr" in shared
    assert "configs/pretrain/demo.yaml" in shared


def test_nothing_that_names_a_place_or_a_person_is_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = "../hidden-place/cohort.zarr"
    failed = json.loads(FAILED) | {
        "problem": "rank 3 on nid009999 cannot read /mnt/Lab Data/hidden-place/x.zarr, ~eve/hidden-place/y, "
        "$SCRATCH/hidden-place/z or https://hidden-place.example/v: J\u00fcrgen's /p/j\u00fcrgen/hidden-place/w"
    }
    environment = {"command": ["swiftv2", "pretrain", "x.yaml", f"data.store={store}"], "folder": "/pscratch/sd/e/eve/code"}
    made = {"environment.json": environment, "events.jsonl": f"{START}\n{json.dumps(failed)}\n"}
    runs = [
        write_run(tmp_path / name / "run", made=made, data={"store": store}) for name in ("hidden-place-1", "hidden-place-2")
    ]
    answers(capsys, str(runs[0]), str(runs[1]), "--share", "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    shared = page.replace(page[page.index("plotly.js v") : page.rindex("<script>")], "")
    for secret in ("hidden-place", "nid009999", "eve/", str(tmp_path)):
        assert secret not in shared
    for kept in ("cohort.zarr", "x.zarr", "run (1)", "run (2)"):
        assert kept in shared
