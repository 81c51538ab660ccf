"""`swiftv2 sweep` as its users meet it, where no Slurm is needed: what would be queued, what is refused, how things stand."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from swiftv2 import cli
from swiftv2.cluster.book import Entry, note, now
from swiftv2.cluster.sweep import resolve
from swiftv2.config.sweep import load_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "scaling" / "sweeps").glob("*.yaml"))
STORE = "data.store=cohort.zarr"
FOUR = {
    "config": "5M",
    "folder": "runs/four",
    "common": ["train.max_steps=100"],
    "elements": [{"name": "a"}, {"name": "b", "set": ["run.seed=1"]}, {"name": "c"}, {"name": "last", "after": ["a", "c"]}],
    "tasks_per_node": 2,
    "time": "1:30:00",
    "at_most": 2,
}


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's file, in a folder where it is submitted from; Slurm is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SWIFTV2_ROOT", raising=False)
    return write(tmp_path / "four.yaml")


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(FOUR | changes, sort_keys=False), encoding="utf-8")
    return path


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["sweep", *words, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def fails(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["sweep", *words]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def finished(run: Path) -> None:
    run.mkdir(parents=True)
    row = {"step": 100, "attempt": 1, "time": 1.0, "event": "finished"}
    (run / "events.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.stem))
def test_the_shipped_sweeps_are_whole(path: Path) -> None:
    sweep = load_sweep(path)
    configs = resolve(sweep, [STORE])
    assert len({config.run.dir for config in configs}) == len(configs) > 1
    assert sweep.folder == Path("runs") / path.stem


def test_a_rehearsal_tells_the_arrays_and_leaves_nothing(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = answered(capsys, "submit", str(four), STORE, "--dry-run", "--after", "41")
    first, second = values["arrays"]
    assert [one["name"] for one in first["elements"]] == ["a", "b", "c"]
    assert first["command"][:2] == ["sbatch", "--array=0-2%2"]
    assert {"--dependency=afterok:41", "--kill-on-invalid-dep=yes", "--ntasks-per-node=2", "--time=1:30:00"} <= set(
        first["command"]
    )
    assert not [word for word in first["command"] if word.startswith("--nodes")]
    assert first["command"][-1] == STORE
    assert second["command"][1] == "--array=3%2"
    assert "--dependency=afterok:JOB1_0:JOB1_2:41" in second["command"]
    assert list(four.parent.iterdir()) == [four]
    assert cli.main(["sweep", "submit", str(four), STORE, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would queue last, after a (job JOB1_0), c (job JOB1_2)" in said
    assert "--array=0-2%2" in said


def test_an_element_alone_keeps_its_index_and_a_finished_parent_is_not_waited_for(
    four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "c"):
        finished(Path("runs/four") / name)
    (array,) = answered(capsys, "submit", str(four), "--dry-run", "--only", "last", STORE)["arrays"]
    assert "--array=3%2" in array["command"]
    assert not [word for word in array["command"] if word.startswith("--dependency")]
    assert array["command"][-1] == STORE
    values = answered(capsys, "submit", str(four), STORE, "--dry-run")
    assert values["passed_over"] == {"a": "finished", "c": "finished"}
    assert [one["index"] for array in values["arrays"] for one in array["elements"]] == [1, 3]
    assert not answered(capsys, "submit", str(four), STORE, "--dry-run", "--failed")["arrays"]


@pytest.mark.parametrize(
    ("words", "changes", "says"),
    [
        (["data.stor=x"], {}, "element a: "),
        (["run.dir=x"], {}, "run.dir=x: the run directory of an element is the sweep's folder and its name"),
        (["--only", "z"], {}, "--only z: the sweep has no element of that name; it has a, b, c, last"),
        (["--only", "x=1"], {}, "--only: give the names of elements"),
        (["--only", "last"], {}, "element last comes after a, which is not begun: queue that one, too"),
        (["--after", "soon"], {}, "--after soon: give the number of a job"),
        ([], {"config": "6M"}, "there is no file or pretrain preset named '6M'"),
        ([], {"foldr": "x"}, "unknown key foldr; did you mean folder?"),
        ([], {"common": ["train.max_steps=0"]}, "element a: "),
        (["--fail"], {}, "unknown words: --fail"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_what_is_wrong_is_refused_before_anything_is_queued(
    words: list[str], changes: dict[str, Any], says: str, options: list[str], four: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(four, **changes)
    assert says in fails(capsys, 2, "submit", str(four), STORE, *words, *options)
    assert not (four.parent / "runs" / "four" / "sweep.json").exists()


def test_a_checkout_without_launchers_is_told(
    four: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SWIFTV2_ROOT", str(four.parent))
    assert "sweep.sh is not there: set SWIFTV2_ROOT" in fails(capsys, 1, "submit", str(four), STORE)


def test_where_slurm_lacks_nothing_is_noted_as_queued(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sbatch is not found: this host has no Slurm" in fails(capsys, 1, "submit", str(four), STORE)
    assert not (four.parent / "runs" / "four" / "sweep.json").exists()


def test_status_without_slurm_says_so_and_tells_what_runs_have_left(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(Path("runs/four/a"))
    states = {one["name"]: one for one in answered(capsys, "status", str(four))["elements"]}
    assert (states["a"]["state"], states["a"]["step"], states["a"]["index"]) == ("finished", 100, 0)
    assert states["last"]["state"] == "not begun"
    note(Path("runs/four"), {"b": Entry("5_1", 1, (), now(), "sweep_0.yaml", {})})
    assert cli.main(["sweep", "status", str(four)]) == 0
    said = capsys.readouterr()
    assert "told by the run directories alone" in said.err
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["element", "a", "b", "c", "last"]
    assert lines[1].split()[1:3] == ["0", "finished"]
    assert lines[2].split()[1:4] == ["1", "pending", "5_1"]
    assert lines[5] == "1 finished, 1 pending, 2 not begun"
