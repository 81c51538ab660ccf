"""How tests start real ranks, of the command line or of a worker script: alone, by torchrun, by mpiexec."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import swiftv2

Launcher = Literal["alone", "torchrun", "mpiexec"]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI_", "MPI_", "SLURM_", "TORCHELASTIC_")
WORKERS = Path(__file__).parent / "engine" / "workers"


def command(words: Sequence[str], ranks: int = 1, launcher: Launcher = "torchrun") -> list[str]:
    """`swiftv2 WORDS` on so many ranks of this host."""
    return _launch(["-m", "swiftv2", *words], ranks, launcher)


def worker(ranks: int, script: str, *words: str) -> list[str]:
    """A worker script of the engine's tests on so many ranks of this host."""
    return _launch([str(WORKERS / script), *words], ranks, "torchrun")


def _launch(program: Sequence[str], ranks: int, launcher: Launcher) -> list[str]:
    if launcher == "mpiexec":
        return [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks), sys.executable, *program]
    if launcher == "alone" or ranks == 1:
        return [sys.executable, *program]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]


def environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, one thread a rank, no GPU."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    root = str(Path(swiftv2.__file__).parents[1])
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}


def swiftv2_run(
    words: Sequence[str], ranks: int = 1, launcher: Launcher = "torchrun", timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(words, ranks, launcher), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@contextlib.contextmanager
def started(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; what is left of it at the end is killed."""
    process = subprocess.Popen(
        words,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell's background job, such as a test run may be, ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (no thread takes a lock here)
    )
    try:
        yield process
    finally:
        kill(process.pid)
        process.communicate()


def kill(pid: int) -> None:
    """SIGKILL to a process and all that it started: torchrun's ranks are in sessions of their own."""
    for one in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """A process and all that it started, itself first; empty when it is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in family(int(child)))]


@contextlib.contextmanager
def swiftv2_started(words: Sequence[str], ranks: int) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile."""
    with started(command(words, ranks)) as process:
        yield process
