"""Every benchmark runs on a small cohort and writes a whole page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--voxel", "6", "--subjects", "8", "--run-frames", "40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def page(script: str, folder: Path, *words: str) -> str:
    out = folder / f"{script}.md"
    program = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--folder", str(folder), "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert "Hardware: " in text
    assert f"python benchmarks/{script}.py" in text
    assert str(folder) not in text
    return text


@pytest.mark.slow
def test_the_formats_side_by_side(folder: Path) -> None:
    pytest.importorskip("h5py")
    text = page("store", folder, *SMALL, "--rounds", "1", "--clips", "2", "--no-strace")
    assert "| this store |" in text
    assert "## Targets" in text
    assert "at least 30 %" in text
    assert "| 806M |" in text


@pytest.mark.slow
def test_the_start_of_a_rank(folder: Path) -> None:
    text = page("cohort", folder, "--runs", "300")
    assert "300 runs of 490 frames" in text
    assert "| open the store |" in text


@pytest.mark.slow
def test_the_build(folder: Path) -> None:
    if not (Path(sys.executable).parent / "mpiexec").is_file() and shutil.which("mpiexec") is None:
        pytest.skip("mpiexec is not installed")
    text = page("build", folder, *SMALL)
    assert "equal byte for byte" in text
    assert "Fitted: peak = " in text
    assert "| hours |" in text
