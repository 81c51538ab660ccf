"""What the downstream benchmarks share: stages that are timed and done once, runs in processes of their own, and tables."""

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, environment, table

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.files import read_json, write_file
from swiftv2.recipes.finetune import RESULT, finetune

WORKERS = 2
Tree = dict[str, Any]


class Stages:
    """Seconds that each stage took, kept beside what the stage left; a stage that was broken off adds to what it took.

    Args:
        folder: in which everything lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "seconds.json"
        self.seconds: dict[str, float] = read_json(self.path) if self.path.exists() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count what is done inside to a stage, also where it fails."""
        begun = time.monotonic()
        sys.stderr.write(f"{name}\n")
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            write_file(self.path, json.dumps(self.seconds, indent=1) + "\n")

    def lines(self) -> list[str]:
        """Table of what each stage took."""
        rows = [(name, f"{seconds:.0f} s") for name, seconds in self.seconds.items()]
        return table(("stage", "time"), [*rows, ("all", f"{sum(self.seconds.values()) / 60:.1f} min")])


def swiftv2(*words: str, threads: int = WORKERS) -> None:
    """Run a command of swiftv2 to its end in a process of its own, its output on stderr.

    Raises:
        SystemExit: it failed.
    """
    here = environment() | {"OMP_NUM_THREADS": str(threads), "SWIFTV2_ROOT": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "swiftv2", *words], env=here, check=False, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"swiftv2 {' '.join(words)} ended with status {done.returncode}")


def side_by_side(jobs: Sequence[Callable[[], object]]) -> None:
    """Do jobs, `WORKERS` at a time, in processes of one thread."""
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        for done, _ in enumerate(pool.map(_call, jobs), start=1):
            sys.stderr.write(f"{done} of {len(jobs)} done\n")


def _one_thread() -> None:
    torch.set_num_threads(1)


def _call(job: Callable[[], object]) -> None:
    job()


def finetune_all(configs: Sequence[FinetuneConfig]) -> None:
    """Fine-tune by each of these configurations; finished ones are left alone."""
    side_by_side([partial(finetune, config) for config in configs if not (config.run.dir / RESULT).exists()])


def shown(found: Mapping[str, Any], digits: int = 3) -> str:
    """A method's mean over splits."""
    return "-" if found["mean"] is None else f"{found['mean']:.{digits}f}"


def difference(found: Mapping[str, Any] | None, digits: int = 3, *, turned: bool = False) -> str:
    """A paired difference with its corrected resampled t interval over splits; in bold where that leaves 0 out.

    Args:
        found: of a method less the reference.
        digits: after the point.
        turned: whether the reference less the method is wanted.
    """
    if found is None or found["mean"] is None or found["corrected_t"] is None:
        return "-"
    mean, low, high = found["mean"], found["corrected_t"]["low"], found["corrected_t"]["high"]
    mean, low, high = (-mean, -high, -low) if turned else (mean, low, high)
    text = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text
