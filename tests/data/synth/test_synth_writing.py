"""A generated cohort appears whole or not at all: full disks, kills, and what they leave."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiftv2.config.synth import SynthConfig
from swiftv2.data.synth import generate
from swiftv2.errors import SwiftError

CONFIG = SynthConfig(subjects=8, voxel_mm=6, frames=20)


def _workers_of(process: int) -> list[int]:
    """Processes that this one started (Linux)."""
    return [int(pid) for task in Path(f"/proc/{process}/task").iterdir() for pid in (task / "children").read_text().split()]


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_file_that_cannot_be_written_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """As on a full disk: the limit on the size of a file makes writing fail in the middle of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SwiftError, match="cannot be written") as caught:
            generate(CONFIG, tmp_path / "cohort")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert "nothing was left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_no_folder_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SwiftError, match="cannot be written"):
        generate(CONFIG, tmp_path / "file" / "cohort")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
def test_a_kill_leaves_no_cohort_and_no_worker_and_the_next_call_clears_up(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "swiftv2", "store", "synth", str(tmp_path / "cohort"), "--workers", "2"]
    process = subprocess.Popen([*command, "voxel_mm=6", "frames=20", "subjects=8"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*_bold.nii.gz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = _workers_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [f".cohort.{process.pid}.partial"]
    assert len(workers) >= 2
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_runs, workers))
    mine = tmp_path / f".other.{process.pid}.partial"
    mine.mkdir()
    report = generate(CONFIG, tmp_path / "cohort")
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "cohort"]
    assert len(list((tmp_path / "cohort").rglob("*_desc-preproc_bold.nii.gz"))) == report.runs
