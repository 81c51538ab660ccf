"""Full disks, kills and damage, met through the command line: one line, and what is left on the disk is whole."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nitime
import pytest
import torch
from ranks import command, environment, started

from swiftv2 import cli
from swiftv2.commands.ranks import LAUNCHER_VARIABLES
from swiftv2.engine.checkpoint import read_weights
from swiftv2.engine.shards import shard_name
from swiftv2.records import read_lines, read_metrics

pytestmark = pytest.mark.slow

SALT = "0123456789abcdef0123456789abcdef"
GRID = ("grid.kind=source", "grid.mask=box", "grid.space=native-nitime")
CONFIG = """
data: {normalisation: {kind: per_voxel}, split: {fractions: [0.5, 0.5, 0.0]}}
clip: {frames: 8}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 8
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
mask: {patch_size: [2, 3, 2, 2]}
schedule: {warmup_steps: 2}
engine: {backend: plain, precision: fp32, device: cpu}
train: {max_steps: 6, global_batch: 2, save_every: 2, keep_last: 9, evaluate_every: 100}
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER_VARIABLES, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(config: Path, real_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main(pretrain_words(config, real_store, run)) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def pretrain_words(config: Path, store: Path, run: Path, *words: str) -> list[str]:
    return ["pretrain", str(config), f"data.store={store}", f"run.dir={run}", *words]


def fails(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a command that must fail: the only one but for the log of a run that had begun."""
    capsys.readouterr()
    assert cli.main(words) == status
    said = capsys.readouterr().err.splitlines()
    complaints = [line for line in said if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    assert len(complaints) == 1, said
    assert complaints[0].startswith("swiftv2: ")
    return complaints[0]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does, without one: writing beyond so many bytes of any file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_lines(run / "events.jsonl") if row["event"] == kind]


# Stores


def build_words(files: Path, store: Path) -> list[str]:
    return ["store", "build", f"{files}/*.nii.gz", str(store), "--cohort", "many", "--salt", SALT, *GRID]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty runs, so that a build takes a while."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(40):
        source = Path(nitime.__file__).parent / "data" / f"fmri{1 + index % 2}.nii.gz"
        (folder / f"sub-{index:02}_bold.nii.gz").symlink_to(source)
    return folder


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    assert cli.main(build_words(many, store)) == 0
    return contents(store)


@pytest.mark.parametrize("size", [100, 1_000, 50_000])
def test_a_build_on_a_full_disk_says_so_and_goes_on_later(
    size: int, many: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    with files_of_at_most(size):
        line = fails(build_words(many, store), 1, capsys)
    assert "File too large" in line
    assert str(store) in line
    assert not (store / "zarr.json").exists(), "no half store can be taken for a whole one"
    assert cli.main(["store", "info", str(store)]) == 1
    assert cli.main(build_words(many, store)) == 0
    assert contents(store) == undisturbed


def wait_for_a_run(store: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and not list((store / ".build" / "rows").glob("*.json")):
        time.sleep(0.001)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_build_that_is_stopped_goes_on(
    number: signal.Signals, status: int, many: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "s.zarr"
    rows = store / ".build" / "rows"
    with started(command(build_words(many, store), launcher="alone")) as process:
        wait_for_a_run(store, process)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert said.count("\n") == (number != signal.SIGKILL)
    assert 1 <= len(list(rows.glob("*.json"))) < 40
    assert not (store / "zarr.json").exists()
    assert cli.main(build_words(many, store)) == 0
    assert contents(store) == undisturbed


def test_one_build_at_a_time(
    many: Path, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    with started(command(build_words(many, store), launcher="alone")) as process:
        wait_for_a_run(store, process)
        process.send_signal(signal.SIGSTOP)
        assert "is being changed by another process" in fails(build_words(many, store), 1, capsys)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0
    assert contents(store) == undisturbed


# Runs


def test_checkpoints_that_cannot_be_written_leave_the_former_ones_whole(
    config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(pretrain_words(config, real_store, run, "train.max_steps=2", "schedule.warmup_steps=2")) == 0
    words = pretrain_words(config, real_store, run)
    with files_of_at_most(20_000):
        assert cli.main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert any("the checkpoint of step 4 could not be saved" in line for line in said), "and training went on"
    assert "step 6 could not be saved" in said[-1]
    assert "rank_0_of_1.safetensors: File too large" in said[-1]
    assert steps_of(run) == ["step_0", "step_2"]
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert cli.main(words) == 0
    assert steps_of(run) == ["step_2", "step_4", "step_6"]
    assert len(read_metrics(run / "metrics.jsonl")) == 6


LIMITED = """
import os, resource, sys
from swiftv2.cli import main
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_end_together_where_one_cannot_write_deepspeeds_files(
    config: Path, real_store: Path, run: Path, tmp_path: Path
) -> None:
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)
    words = pretrain_words(config, real_store, run, "train.max_steps=8", "engine.backend=deepspeed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), *words], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("swiftv2")]
    assert len(said) == 1, done.stderr
    assert "DeepSpeed's files cannot be written" in said[0]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))
    assert steps_of(run) == ["step_2", "step_4", "step_6"]
    assert cli.main(["checkpoint", "verify", str(run)]) == 0


def test_damaged_checkpoints_are_passed_over_and_not_exported(
    config: Path, real_store: Path, finished: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "checkpoints" / "step_6" / shard_name(0, 1)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = fails(["checkpoint", "export", str(run), str(tmp_path / "w")], 1, capsys)
    assert str(weights) in line
    assert not (tmp_path / "w").exists()
    assert cli.main(["checkpoint", "export", str(run), str(tmp_path / "w"), "--step", "4"]) == 0
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["MODEL_CARD.md", "weights.json", "weights.safetensors"]

    assert cli.main(["checkpoint", "verify", str(run), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"]
    assert [row["step"] for row in rows if row["problem"]] == [6]

    # The same run again repeats steps 5 and 6 from step 4, and ends where it ended before.
    assert cli.main(pretrain_words(config, real_store, run)) == 0
    assert events_of(run, "resumed")[-1]["step"] == 4
    ends = [read_weights(folder / "checkpoints" / "step_6") for folder in (finished, run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_torn_lines_of_a_kill_do_no_harm(config: Path, real_store: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 7, "att')
    assert cli.main(pretrain_words(config, real_store, run, "train.max_steps=7")) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][:20], *lines[3:], ""]))
    line = fails(pretrain_words(config, real_store, run, "train.max_steps=8"), 1, capsys)
    assert "metrics.jsonl: line 3 is damaged" in line


def test_places_where_no_run_can_be(config: Path, real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    for place in ("mine", "mine/thesis.txt", "mine/thesis.txt/run"):
        line = fails(pretrain_words(config, real_store, tmp_path / place), 1, capsys)
        assert str(tmp_path / "mine") in line
    assert contents(tmp_path) == before
    for verb in ("list", "verify"):
        assert "give a run directory" in fails(["checkpoint", verb, str(tmp_path / "mine")], 1, capsys)
    export = ["checkpoint", "export", str(tmp_path / "mine"), str(tmp_path / "w")]
    assert "no whole checkpoint" in fails(export, 1, capsys)
    assert contents(tmp_path) == before


def test_weights_of_another_model_do_not_begin_a_run(
    config: Path, real_store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["checkpoint", "export", str(run), str(tmp_path / "w")]) == 0
    again = tmp_path / "again"
    words = pretrain_words(config, real_store, again, f"run.init_from={tmp_path / 'w'}", "model.embed_dim=16")
    assert "embed_dim" in fails(words, 1, capsys)
    assert not again.exists()


def test_a_damaged_store_ends_a_run_and_keeps_its_checkpoints(
    config: Path, real_store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(real_store, tmp_path / "s.zarr"))
    for shard in (store / "bold" / "int16").glob("c.*.0.0"):
        shard.write_bytes(shard.read_bytes()[:-50_000])
    line = fails(pretrain_words(config, store, run, "train.max_steps=8"), 1, capsys)
    assert re.search(r"run r[0-9a-f]{16}, frames \d+ to \d+ cannot be read", line)
    assert steps_of(run) == ["step_2", "step_4", "step_6"]
    assert str(events_of(run, "failed")[-1]["problem"]) in line
    assert cli.main(pretrain_words(config, real_store, run, "train.max_steps=8")) == 0, "with the sound store it goes on"


def test_another_store_does_not_continue_a_run(
    config: Path, run: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(build_words(many, tmp_path / "other.zarr")) == 0
    before = contents(run / "checkpoints")
    words = pretrain_words(config, tmp_path / "other.zarr", run, "train.max_steps=8")
    assert "another store" in fails(words, 1, capsys)
    assert contents(run / "checkpoints") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written_to(
    config: Path, real_store: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in fails(pretrain_words(config, real_store, tmp_path / "run"), 1, capsys)
        assert "Permission denied" in fails(build_words(many, tmp_path / "s.zarr"), 1, capsys)
    finally:
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())
