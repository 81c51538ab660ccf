"""`swiftv2 status` as a person and a program meet it: blocks, tables, JSON, a watch that ends, refusals, and how fast it is."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import environment, started, swiftv2_run

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from crew import PLAIN, complete, job, options

from swiftv2 import cli
from swiftv2.commands.ranks import LAUNCHER_VARIABLES
from swiftv2.records import append_line, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

STEPS = 8
SUBJECT = "sub-1"
KEYS = [
    *("run", "state", "why", "step", "max_steps", "loss", "heldout_loss", "heldout_best", "heldout_best_step"),
    *("clips_per_second", "mfu", "data_wait", "step_seconds", "seconds_left", "time", "attempts", "requeues", "world_size"),
    *("holder", "heartbeat_seconds", "job", "checkpoint", "alarms"),
]
CONFIG = """
data: {normalisation: {kind: per_voxel}, split: {fractions: [0.5, 0.5, 0.0]}}
clip: {frames: 8, stride_between: 0.5}
model:
  {name: tiny, image_size: [10, 18, 10], frames: 8, embed_dim: 8, depths: [1, 1], num_heads: [1, 2], patch_size: [2, 3, 2, 2]}
mask: {patch_size: [2, 3, 2, 2]}
optimizer: {lr: 2e-3}
schedule: {warmup_steps: 2}
engine: {precision: fp32, device: cpu, backend: plain}
train: {max_steps: 4, global_batch: 2, evaluate_every: 2}
"""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run that finished, one that was stopped as job 117, and one that was killed."""
    folder = tmp_path_factory.mktemp("several") / "runs"
    asked = options(PLAIN, 1000, seconds=0.05, train={"save_every": 3})
    complete(folder / "run_2", options(PLAIN, STEPS, evaluate={"parts": 1, "seconds": 0.0}, train={"evaluate_every": 4}), 1)
    for name, number, variables in (
        ("run_10", signal.SIGUSR1, {"SLURM_JOB_ID": "117"}),
        ("run_9", signal.SIGKILL, dict[str, str]()),
    ):
        with job(folder / name, asked, 1, variables=variables) as one:
            one.until_step(5)
            one.send(number)
            one.wait()
    for said in folder.glob("*.said-*"):
        shutil.rmtree(said)
    (folder / "notes").mkdir()
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str | Path, status: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["status", *map(str, words)]) == status
    out, err = capsys.readouterr()
    assert not err if status == 0 else not out
    return out or err


def test_pretraining_on_real_bold(real_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    run = tmp_path / "run"
    done = swiftv2_run(["pretrain", str(tmp_path / "tiny.yaml"), f"data.store={real_store}", f"run.dir={run}"])
    assert done.returncode == 0, done.stderr
    text = call(capsys, run)
    rows = read_metrics(run / "metrics.jsonl")
    best = min((row["heldout/loss"], row["step"]) for row in rows if "heldout/loss" in row)
    assert re.search(r"state +finished\n", text)
    assert re.search(r"queue +no Slurm job\n", text)
    assert re.search(r"step +4/4 \(100%\)\n", text)
    assert f"{rows[-1]['loss']:.4f}; held-out {rows[-1]['heldout/loss']:.4f}, best {best[0]:.4f} at step {best[1]}" in text
    assert re.search(r"checkpoint +step 4, 0:00:\d\d ago, permanent, 0\.\d\d GB, whole, 0 steps since\n", text)
    assert "!" not in text
    (told,) = json.loads(call(capsys, run, "--json"))["runs"]
    assert (told["state"], told["step"], told["mfu"], told["alarms"]) == ("finished", 4, rows[-1].get("mfu"), [])
    assert SUBJECT not in json.dumps(told) + text


def test_several_runs_are_a_line_each(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = call(capsys, runs)
    lines = [line for line in text.splitlines() if line.startswith(" run_")]
    names = [line.split()[0] for line in lines]
    assert text.startswith(f"{runs}:\n")
    assert names == ["run_2", "run_9", "run_10"], "in the order of their numbers, and folders that are none are passed over"
    assert [line.split()[1] for line in lines] == ["finished", "dead", "stopped"]
    assert "8/8 (100%)" in lines[0]
    assert "117 ?" in lines[2]
    one_by_one = call(capsys, *(runs / name for name in names), runs)
    assert [line.split()[:2] for line in one_by_one.splitlines()] == [line.split()[:2] for line in text.splitlines()]


def test_programs_get_one_object_with_the_same_keys_always(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(call(capsys, runs, "--json"))
    assert list(told) == ["runs"]
    assert [list(one) for one in told["runs"]] == [KEYS] * 3
    docs = (Path(cli.__file__).parents[1] / "docs" / "status.md").read_text(encoding="utf-8")
    assert [key for key in KEYS if f"`{key}`" not in docs] == []
    finished, dead, stopped = told["runs"]
    assert [one["state"] for one in told["runs"]] == ["finished", "dead", "stopped"]
    assert set(stopped["job"]) == {"number", "name", "state", "reason", "nodes", "node_count", "seconds_left", "start"}
    assert (stopped["job"]["number"], dead["job"]) == ("117", None)
    assert set(finished["checkpoint"]) == {"step", "age_seconds", "kind", "bytes", "whole", "problem", "steps_since"}
    for key in (*finished["checkpoint"], *stopped["job"]):
        assert f"`{key}`" in docs


def test_without_slurm_one_alarm_says_so_and_the_rest_is_told(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    alarm = "slurm: job 117 cannot be looked at: squeue is not found"
    text = call(capsys, runs)
    assert text.count("squeue") == 1
    assert alarm in text
    assert "stopped" in text
    assert "squeue" not in call(capsys, runs / "run_2"), "without a job nobody asks"
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    text = call(capsys, runs / "run_10")
    assert "job 117 cannot be looked at: squeue: slurm_load_jobs error: Unable to contact slurm controller" in text
    assert re.search(r"queue +job 117: not known", text)


def test_what_is_no_run_is_refused_before_anything_is_printed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        ((runs, tmp_path / "gone"), f"{tmp_path / 'gone'} does not exist"),
        ((runs / "run_2", tmp_path), f"{tmp_path} is no run directory"),
        ((runs, "--watch", "0"), "--watch 0: give seconds"),
        (("--watch", runs), f"--watch {runs}: give seconds"),
        ((), "required"),
    ):
        line = call(capsys, *words, status=2)
        assert says in line
        assert line.count("\n") == 1


def test_the_same_alarms_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(runs / "run_2", tmp_path / "run"))
    now = time.time()
    for step in range(1, 31):
        told = {"reason": f"its loss {step} is above mean + 6 sigma", "samples": 8}
        append_line(run / "events.jsonl", {"step": step, "attempt": 1, "time": now - 100 + step, "event": "skipped", **told})
    for number in range(12):
        (run / "checkpoints" / "step_8" / "manifest.json").touch()
        name = {"folder": f"step_{number}", "problem": "[red]Permission denied[/red]"}
        append_line(run / "events.jsonl", {"step": None, "attempt": 1, "time": now - 60, "event": "not_removed", **name})
    lines = [line for line in call(capsys, run).splitlines() if line.startswith("!")]
    assert len(lines) == 2
    assert lines[0].endswith("not_removed: step_11 could not be deleted: [red]Permission denied[/red] (12 times in attempt 1)")
    assert lines[1].endswith("skipped: step 30 was refused: its loss 30 is above mean + 6 sigma (30 times in attempt 1)")
    (told,) = json.loads(call(capsys, run, "--json"))["runs"]
    assert len(told["alarms"]) == 42


def status(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "swiftv2", "status", *map(str, words)]


def test_a_watch_of_a_log_ends_with_the_last_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, options(PLAIN, 100, seconds=0.05), 1) as one:
        one.until_step(1)
        done = subprocess.run(status(run, "--watch", "0.5"), env=environment(), capture_output=True, text=True, check=True)
        assert one.wait() == [0]
    lines = done.stdout.splitlines()
    assert len(lines) > 1
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+/run: .*", line) for line in lines), done.stdout
    assert ": running; step " in lines[0]
    assert ": finished; step 100/100 (100%); loss " in lines[-1]
    assert sum(": finished" in line for line in lines) == 1
    done = subprocess.run(status(run, "--watch", "--json"), env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["runs"][0]["state"] == "finished"


def test_ctrl_c_ends_a_watch(tmp_path: Path) -> None:
    for name in ("checkpoints", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with started(status(tmp_path / "run", "--watch")) as process:
        assert process.stdout is not None
        assert "not begun" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""


def on_a_terminal(words: list[str], columns: int = 180) -> tuple[int, str]:
    """Exit status of a command, and what it has shown on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(words[0], words, environment() | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "50"})  # noqa: S606
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # The other side is closed.
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_a_watch_on_a_terminal_refreshes_in_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with job(run, options(PLAIN, 80, seconds=0.05), 1) as one:
        one.until_step(1)
        ended, shown = on_a_terminal(status(run, "--watch", "0.5"))
        assert one.wait() == [0]
    assert ended == 0
    assert "\x1b[1A" in shown, "lines are written over"
    assert "running" in shown
    assert "80/80 (100%)" in shown.rpartition("finished")[2]


def test_a_narrow_terminal_has_fewer_columns_but_whole_ones(runs: Path) -> None:
    ended, shown = on_a_terminal(status(runs), columns=80)
    assert ended == 0
    assert "…" not in shown
    titles, cells = (re.sub(r"\x1b\[\d*m", "", shown.splitlines()[line]).split() for line in (1, 3))
    assert {"run", "state", "step", "alarms"} <= set(titles)
    assert "wait" not in titles
    assert cells[:2] == ["run_2", "finished"]


def test_nothing_heavy_is_imported(runs: Path) -> None:
    heavy = "{'torch', 'deepspeed', 'numpy', 'zarr', 'mpi4py', 'matplotlib'}"
    text = (
        f"import sys; from swiftv2.cli import main; assert main(['status', {str(runs)!r}]) == 0; "
        f"found = {heavy} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", text], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_long_runs_are_told_at_once(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 runs of 100,000 lines of metrics and 7,200 saves, as of ten days; the long files are one on the disk."""
    metrics, long = (runs / "run_2" / "metrics.jsonl").read_text().splitlines(), tmp_path / "long"
    row = json.loads(metrics[0])
    long.mkdir()
    with (long / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row | {"step": step}) + "\n" for step in range(100_000))
    saved = {
        "step": 1,
        "attempt": 1,
        "time": row["time"],
        "event": "saved",
        "folder": "step_1",
        "kind": "ephemeral",
        "bytes": 1,
    }
    events = (runs / "run_2" / "events.jsonl").read_text().splitlines(keepends=True)
    (long / "events.jsonl").write_text(events[0] + 7200 * (json.dumps(saved) + "\n") + "".join(events[1:]))
    folder = tmp_path / "folder"
    for number in range(20):
        run = Path(shutil.copytree(runs / "run_2", folder / f"run_{number}"))
        for name in ("metrics.jsonl", "events.jsonl"):
            (run / name).unlink()
            (run / name).hardlink_to(long / name)
    call(capsys, folder, "--json")
    began = time.process_time()  # Other tests may keep this one waiting.
    told = json.loads(call(capsys, folder, "--json"))["runs"]
    seconds = time.process_time() - began
    assert [one["state"] for one in told] == ["finished"] * 20
    assert seconds < 1, f"{seconds:.2f} s"
