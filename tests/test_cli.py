"""The command line in one process: help, answers for people and machines, and refusals in one line."""

import argparse
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import nitime
import numpy as np
import pytest
import yaml
from ranks import environment, swiftv2_run

from swiftv2 import cli
from swiftv2.commands.ranks import LAUNCHER_VARIABLES
from swiftv2.config.load import load, load_model, presets_root
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.store.reader import Store
from swiftv2.terminal import Shown

REAL = Path(nitime.__file__).parent / "data"
SOURCE_GRID = ("grid.kind=source", "grid.mask=box", "grid.space=native-nitime")
SALT = "0123456789abcdef0123456789abcdef"
COMMANDS = [
    *(["store", verb] for verb in ("build", "info", "verify", "synth")),
    *(["checkpoint", verb] for verb in ("list", "verify", "export", "adopt", "suggest")),
    ["pretrain"],
    ["doctor"],
    ["plan"],
    ["status"],
    *(["sweep", verb] for verb in ("submit", "status")),
    *(["job", verb] for verb in ("begin", "end")),
]
MODELS = sorted(path.stem for path in (presets_root() / "model").glob("*.yaml"))
PRETRAININGS = sorted((presets_root() / "pretrain").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Call:
    """Runs a command in this process and keeps what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path, status: int = 0) -> str:
        """Standard output of a command that must end with this status."""
        self._capsys.readouterr()
        found = cli.main([str(word) for word in words])
        said = self._capsys.readouterr()
        assert found == status, said
        self.err = said.err
        return said.out

    def json(self, *words: str | Path, status: int = 0) -> Any:
        """The one JSON object that a command prints."""
        return json.loads(self(*words, "--json", status=status))

    def fails(self, *words: str | Path, status: int) -> str:
        """The one line of a command that must fail."""
        out = self(*words, status=status)
        assert out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("swiftv2: ")
        return lines[0]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with nitime's two runs as of two subjects."""
    folder = tmp_path / "files"
    folder.mkdir()
    for index in (1, 2):
        (folder / f"sub-{index}_bold.nii.gz").symlink_to(REAL / f"fmri{index}.nii.gz")
    return folder


def build(call: Call, files: Path, store: Path, *words: str, status: int = 0) -> Any:
    glob = f"{files}/*.nii.gz"
    return call.json("store", "build", glob, store, "--cohort", "nitime", *SOURCE_GRID, *words, status=status)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Help


def test_help_comes_at_once_and_without_heavy_libraries() -> None:
    program = (
        "import sys, time\nfrom swiftv2.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'deepspeed', 'zarr', 'nibabel', 'nilearn', 'scipy', 'mpi4py', 'matplotlib'}\n"
        "print(time.process_time(), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True)
    seconds, _, loaded = done.stdout.splitlines()[-1].partition(" ")
    assert float(seconds) < 1.0
    assert loaded == "[]"


def parser_of(words: Sequence[str]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = cli._parser()
    for word in words:
        (choices,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choices.choices[word]
    return parser


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_argument_is_explained_and_every_example_can_be_typed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"Examples?:\n  \S", shown)
    parser = parser_of(words)
    assert [action.dest for action in parser._actions if not action.help] == []
    examples = [line for line in (parser.epilog or "").splitlines() if line.startswith("  ")]
    assert examples
    for line in examples:
        assert line in shown, "examples are not wrapped"
        typed = shlex.split(line)
        assert cli._parse(typed[typed.index("swiftv2") + 1 :]).command is parser.get_default("command")


def test_overrides_count_wherever_they_stand(call: Call) -> None:
    path = presets_root() / "pretrain" / "demo.yaml"
    resolved = yaml.safe_load(call("pretrain", path, "run.seed=7", "--dry-run", "train.max_steps=9"))
    assert (resolved["run"]["seed"], resolved["train"]["max_steps"]) == (7, 9)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["teach"], "invalid choice: 'teach'"),
        (["store"], "VERB"),
        (["store", "info"], "required: store"),
        (["store", "info", "a", "b"], "unknown words: b"),
        (["plan", "--mod", "5M"], "unknown words: --mod"),
        (["plan"], "--model NAME"),
        (["plan", "--model", "9M"], "presets are 202M"),
        (["plan", "--model", "5M", "run.seed=1"], "model.KEY=VALUE"),
        (["plan", "--model", "5M", "model.depth=1"], "unknown key depth; did you mean depths"),
        (["checkpoint", "export", "a", "b", "--step", "x"], "invalid int value"),
        (["store", "build", "a.nii", "b.nii", "c.nii"], "a glob needs quotes"),
        (["store", "build", "*.nii", "s"], "--cohort NAME"),
        (["store", "build", "/", "s"], "--cohort NAME"),
        (["store", "build", "a", "s", "voxel_mm=4"], "grid.KEY=VALUE"),
        (["store", "build", "a", "s", "grid.voxel=4"], "unknown key voxel"),
        (["store", "build", "a", "s", "grid.voxel_mm=[1"], "not valid YAML"),
        (["store", "build", "no/such", "s"], "no/such is no folder"),
        (["store", "build", ".", "s", "--tr", "soon"], "invalid float value"),
    ],
)
def test_wrong_words_are_one_line_and_status_2(
    words: list[str], says: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in call.fails(*words, status=2)
    assert not list(tmp_path.iterdir())


def test_a_bad_salt_is_refused_and_not_repeated(call: Call, tmp_path: Path) -> None:
    for salt in ("correct horse battery staple", "abc"):
        line = call.fails("store", "build", tmp_path, tmp_path / "s", "--salt", salt, status=2)
        assert "hex" in line
        assert salt not in line


# Plan


@pytest.mark.parametrize("name", MODELS)
def test_every_preset_is_planned(name: str, call: Call) -> None:
    plan = call.json("plan", "--model", name)
    assert plan["model"] == name
    stages = [part for part in plan["forward_flops_per_clip"] if part.startswith("stage_")]
    assert len(stages) == len(load_model(name).depths)
    text = call("plan", "--model", name)
    assert f"{plan['encoder_parameters']:,}" in text
    assert all(stage in text for stage in stages)


def test_the_plan_of_806M_has_the_published_size(call: Call) -> None:  # noqa: N802 (the model's name)
    plan = call.json("plan", "--model", "806M")
    assert {"model", "encoder_parameters", "decoder_parameters", "forward_flops_per_clip"} <= plan.keys()
    assert plan["encoder_parameters"] == 806_171_520
    assert isinstance(plan["forward_flops_per_clip"], dict)
    longer = call.json("plan", "--model", "806M", "model.frames=40")["forward_flops_per_clip"]
    assert longer["patch_embed"] == 2 * plan["forward_flops_per_clip"]["patch_embed"]


def test_a_configuration_is_planned_as_its_model(call: Call) -> None:
    path = presets_root() / "pretrain" / "5M.yaml"
    assert call.json("plan", path) == call.json("plan", "--model", "5M")


# Configurations


@pytest.mark.parametrize("path", PRETRAININGS, ids=lambda path: path.stem)
def test_dry_runs_print_what_loads_again(path: Path, call: Call, tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(call("pretrain", path, "--dry-run"))
    assert load(PretrainConfig, resolved) == load(PretrainConfig, path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("run: [", "not valid YAML at line"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("run: {dir: r, sed: 1}\n", "unknown key run.sed; did you mean run.seed?"),
        ("run: {dir: r}\nmodel: demo\ntrain: {max_steps: 5, global_batch: 2}\n", "data is required"),
    ],
)
def test_configurations_that_cannot_be_read(text: str | None, says: str, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    line = call.fails("pretrain", path, status=2)
    assert says in line
    assert str(path) in line


def test_a_binary_file_is_no_configuration(call: Call) -> None:
    assert "not a text file" in call.fails("pretrain", REAL / "fmri1.nii.gz", status=2)
    assert "Is a directory" in call.fails("pretrain", REAL, status=2)


# Stores


def test_build_info_verify(call: Call, files: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    built = build(call, files, store, "--salt", SALT, "--tr", "1.35")
    assert (built["taken"], built["refused"], built["frames"], built["nothing_to_do"]) == (2, [], 80, False)
    assert call.err == "", "no progress of what takes no time"
    before = contents(store)
    assert build(call, files, store, "--salt", SALT.upper(), "--tr", "1.35")["nothing_to_do"]
    build(call, files, tmp_path / "again.zarr", "--salt", SALT, "--tr", "1.35")
    assert contents(tmp_path / "again.zarr") == before
    text = call("store", "build", f"{files}/*.nii.gz", store, *SOURCE_GRID, "--cohort", "nitime", "--tr", "1.35")
    assert "nothing to do: 2 runs, 80 frames" in text

    facts = call.json("store", "info", store)
    assert (facts["runs"], facts["subjects"], facts["frames"], list(facts["cohorts"])) == (2, 2, 80, ["nitime"])
    text = call("store", "info", store)
    assert "10 x 18 x 10 voxels" in text
    for fact in (
        r"cohort +nitime",
        r"subjects +2",
        r"frames +80",
        r"TR \(s\) +1\.35",
        r"space +native-nitime",
        r"numbers +int16",
    ):
        assert re.search(fact, text), fact
    checked = call.json("store", "verify", store)
    assert checked == {"ok": True, "runs": 2, "bytes": built["bytes"], "bad": [], "notes": []}
    assert "2 runs" in call("store", "verify", store)
    assert contents(store) == before


def test_a_flipped_bit_is_named_by_run_key(call: Call, real_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(real_store, tmp_path / "s.zarr"))
    run = Store.open(store).runs[1]
    (shard,) = (store / "bold" / run.dtype).glob(f"c.{run.row}.*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    checked = call.json("store", "verify", store, status=1)
    assert not checked["ok"]
    assert [key for key, _ in checked["bad"]] == [run.key]
    assert run.key in call("store", "verify", store, status=1)


def bad_file(kind: str, path: Path) -> None:
    data = np.random.default_rng(0).normal(500, 20, (8, 8, 8, 12)).astype(np.float32)
    if kind == "NaN":
        data[3, 3, 3, 3] = np.nan
    if kind == "constant":
        data[:] = 7
    image: Any = nib.Nifti1Image(data[..., 0] if kind == "3-D" else data, np.diag([3.0, 3.0, 3.0, 1.0]))  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm", "sec")
    content = bytearray(image.to_bytes())
    if kind == "no orientation":
        content[252:256] = bytes(4)  # qform_code and sform_code
    path.write_bytes(gzip.compress(content))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-4000])
    if kind == "text":
        path.write_text("not a picture")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "truncated"),
        ("3-D", "not 4-D"),
        ("NaN", "NaN"),
        ("constant", "constant"),
        ("no orientation", "orientation"),
        ("text", "damaged"),
        ("native", "native space (T1w)"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_line_and_leaves_nothing(kind: str, says: str, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    space = "_space-T1w" if kind == "native" else ""
    bad_file(kind, folder / f"sub-secret{space}_bold.nii.gz")
    words = ["store", "build", f"{folder}/*.nii.gz", str(tmp_path / "s.zarr"), "--cohort", "c"]
    grid = ["grid.kind=source", "grid.mask=box", *([] if kind == "native" else ["grid.space=ours"])]
    line = call.fails(*words, *grid, status=1)
    assert "no run can be taken" in line
    assert says in line
    assert "secret" not in line, "no subject id in a message"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_good_are_taken_and_the_bad_are_listed_by_key(call: Call, files: Path, tmp_path: Path) -> None:
    bad_file("truncated", files / "sub-9_bold.nii.gz")
    strict = build_fails(call, files, tmp_path / "strict.zarr", "--strict", status=1)
    assert "1 of 3 runs are refused" in strict
    store = tmp_path / "s.zarr"
    built = build(call, files, store)
    assert built["taken"] == 2
    (refused,) = built["refused"]
    assert re.fullmatch(r"r[0-9a-f]{16}", refused["run"])
    entries = [json.loads(line) for line in Path(built["report"]).read_text().splitlines()]
    assert {e["run"]: e["file"] for e in entries}[refused["run"]] == "sub-9_bold.nii.gz"
    text = call("store", "build", f"{files}/*.nii.gz", store, "--cohort", "nitime", *SOURCE_GRID)
    assert f"refused {refused['run']}: {refused['reason']}" in text


def build_fails(call: Call, files: Path, store: Path, *words: str, status: int) -> str:
    glob = f"{files}/*.nii.gz"
    return call.fails("store", "build", glob, store, "--cohort", "nitime", *SOURCE_GRID, *words, status=status)


def test_places_that_hold_something_else_are_left_alone(call: Call, files: Path, real_store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "is no store" in build_fails(call, files, tmp_path / "mine", status=2)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert "is no store" in build_fails(call, files, tmp_path / "mine" / "thesis.txt", status=2)
    assert "cannot be made" in build_fails(call, files, tmp_path / "mine" / "thesis.txt" / "s.zarr", status=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    before = contents(real_store)
    assert "other files or options" in build_fails(call, files, real_store, status=2)
    assert contents(real_store) == before
    for verb in ("info", "verify"):
        assert "is no store" in call.fails("store", verb, tmp_path / "mine", status=1)
        assert "is no store" in call.fails("store", verb, tmp_path / "mine" / "thesis.txt", status=1)


@pytest.mark.slow
def test_a_generated_cohort_is_built(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "bids"
    words = ["store", "synth", str(folder), "subjects=8", "voxel_mm=6", "frames=20", "--workers", "1"]
    made = call.json(*words)
    assert (made["subjects"], made["bad_files"], made["nothing_to_do"]) == (8, 0, False)
    assert "is there already" in call(*words)
    assert "seed" in call.fails(*words, "sed=1", status=2)
    assert "--workers" in call.fails(*words[:-1], "0", status=2)
    built = call.json("store", "build", folder, tmp_path / "s.zarr", "grid.voxel_mm=6")
    assert (built["taken"], built["refused"]) == (made["runs"], [])
    facts = call.json("store", "info", tmp_path / "s.zarr")
    assert facts["generated"]
    assert (facts["subjects"], list(facts["cohorts"]), facts["tr"]) == (8, ["bids"], {"2": made["runs"]})


# Launchers


def test_ranks_are_looked_for_where_a_launcher_says_so(
    call: Call, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch script of Slurm carries the job's variables, but is no task of it.
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert build(call, files, tmp_path / "s.zarr")["taken"] == 2
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert "not of torchrun" in build_fails(call, files, tmp_path / "t.zarr", status=2)
    assert not (tmp_path / "t.zarr").exists()


@pytest.mark.slow
def test_a_task_of_srun_that_mpi_does_not_know_builds_nothing(files: Path, tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1"}
    words = ["store", "build", f"{files}/*.nii.gz", str(tmp_path / "s.zarr"), "--cohort", "nitime", *SOURCE_GRID]
    command = [sys.executable, "-m", "swiftv2", *words]
    done = subprocess.run(command, env=environment() | slurm, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("swiftv2: srun started 2 ranks, but mpi4py sees 1")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.slow
def test_two_ranks_of_mpi_build_the_same_store(call: Call, files: Path, tmp_path: Path) -> None:
    build(call, files, tmp_path / "one.zarr", "--salt", SALT)
    words = ["store", "build", f"{files}/*.nii.gz", str(tmp_path / "two.zarr"), "--cohort", "nitime", *SOURCE_GRID]
    done = swiftv2_run([*words, "--salt", SALT, "--json"], ranks=2, launcher="mpiexec")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["taken"] == 2
    assert contents(tmp_path / "two.zarr") == contents(tmp_path / "one.zarr")


# Standard output


@pytest.fixture
def full() -> Iterator[int]:
    try:
        descriptor = os.open("/dev/full", os.O_WRONLY)
    except OSError:
        pytest.skip("no /dev/full here")
    yield descriptor
    os.close(descriptor)


def test_an_answer_that_cannot_be_written_is_a_failure(full: int) -> None:
    words = [sys.executable, "-m", "swiftv2", "pretrain", str(PRETRAININGS[0]), "--dry-run"]
    done = subprocess.run(words, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "swiftv2: standard output: No space left on device\n")


def test_a_reader_that_went_away_is_none() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "swiftv2", "pretrain", str(PRETRAININGS[0]), "--dry-run"]
    done = subprocess.run(words, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_moving_line_or_a_few_of_a_log(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with Shown("runs") as shown:
        for done in range(1, 11):
            shown.update(done, 10, done * 2_000_000, 20_000_000, "1 refused" if done > 4 else "")
        shown.update(10, 10, 20_000_000, 20_000_000, "1 refused")
    text = stream.getvalue()
    if terminal:
        assert "10/10" in text
        assert text.count("\n") <= 1
        return
    lines = [line.split(" ", 2)[2] for line in text.splitlines()]
    assert "\r" not in text
    assert lines[0] == "runs 3/10  1.0 MB/s  left 0:00:14"
    assert lines[1] == "runs 6/10  1.0 MB/s  1 refused  left 0:00:08"
    assert lines[-1] == "runs 10/10  1 refused"
    assert len(lines) == 4
