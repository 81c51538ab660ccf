"""How tests of the engine start real ranks."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import swiftv2

WORKERS = Path(__file__).parent / "workers"


def command(ranks: int, script: str, *words: str) -> list[str]:
    """The command that starts a worker script: alone, or by torchrun on the ranks of this host."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(WORKERS / script), *words]


def environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, one thread a rank, no GPU."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMPI_", "PMI_", "MPI_", "SLURM_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    root = str(Path(swiftv2.__file__).parents[1])
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}


@contextlib.contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own; what is left of it at the end is killed."""
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.communicate()
