"""Runs that tests start by the project's own launchers, on a cluster: their words, what they have left, their ranks."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import ENDED, Cluster

import swiftv2
from swiftv2.records import EVENTS, METRICS, newest_step, read_lines

ROOT = Path(swiftv2.__file__).parents[1]
GEOMETRY = (
    "data.normalisation={kind: per_voxel, scope: run}",
    "data.split.fractions=[0.5, 0.5, 0.0]",
    "clip.frames=8",
    "model.image_size=[10, 18, 10]",
    "model.frames=8",
    "model.patch_size=[2, 3, 2, 2]",
    "mask.patch_size=[2, 3, 2, 2]",
    "engine.precision=fp32",
    "train.global_batch=2",
    "train.micro_batch=1",
    "train.evaluate_every=100000",
    "evaluate.max_clips=2",
)
"""The presets on nitime's two real runs of BOLD: 10 x 18 x 10 voxels."""


class Launched:
    """A run of `slurm/pretrain_5M.sh` on a cluster."""

    def __init__(self, cluster: Cluster, run: Path) -> None:
        self.cluster, self.run, self.job = cluster, run, ""

    def submit(
        self, store: Path, *words: str, options: tuple[str, ...] = (), env: Mapping[str, str] | None = None, size: str = "5M"
    ) -> str:
        """Queue it from an empty folder, as a user with a checkout elsewhere does."""
        folder = self.run.parent / "submitted"
        folder.mkdir(exist_ok=True)
        given = (*GEOMETRY, f"data.store={store}", f"run.dir={self.run}", *words)
        self.job = self.cluster.submit(
            ROOT / "slurm" / f"pretrain_{size}.sh", *given, env=environment() | dict(env or {}), options=options, folder=folder
        )
        return self.job

    def step(self) -> int:
        """The last step that it has logged."""
        return max((row["step"] for row in read_lines(self.run / METRICS)), default=0)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Its events of one kind, in order."""
        return [row for row in read_lines(self.run / EVENTS) if row["event"] == kind]

    def goes_on(self, steps: int, seconds: float = 90.0) -> int:
        """Wait for so many more steps, and for a checkpoint newer than the one that is there now; the step."""
        first, saved = self.step(), newest_step(self.run) or 0
        self.until(lambda: self.step() >= first + steps and (newest_step(self.run) or 0) > saved, seconds)
        return self.step()

    def until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Wait until something holds.

        Raises:
            AssertionError: it did not in time, or the job came to an end before.
        """
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"after {seconds:g} s: {self.cluster.report(self.job)}"
            assert self.cluster.state(self.job) not in ENDED or holds(), self.cluster.report(self.job)
            time.sleep(0.2)

    def ranks(self, node: str | None = None) -> list[int]:
        """Processes that train, of all attempts, on all nodes or one."""
        found = []
        for pid in self.cluster.processes(self.job, node):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"pretrain" in words and words[0].decode() == sys.executable and b"job" not in words:
                found.append(pid)
        return found


def environment() -> dict[str, str]:
    """Variables of a user who submits: the local site and this interpreter."""
    return {
        "SWIFTV2_ROOT": str(ROOT),
        "SWIFTV2_SITE": "local",
        "SWIFTV2_PYTHON": sys.executable,
        "SWIFTV2_DOCTOR": "off",
        "OMP_NUM_THREADS": "1",
        "SBATCH_CONSTRAINT": "",
    }
