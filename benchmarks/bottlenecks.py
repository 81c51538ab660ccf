"""Runs that are slow for a known reason, and what their own figures say of it; and what taking these figures costs.

Each run is a real `swiftv2 pretrain` on a generated cohort, slowed down by one thing: a store whose every read takes longer
(strace delays the system call), a micro-batch that is too small, a checkpoint after every step, a rank that stands
still half of the time. The cost of measuring is paired: one process, the same steps in turns with and
without clock, meter, counts and the line of metrics.

    python benchmarks/bottlenecks.py --store cohort.zarr --out benchmarks/results/YYYY-MM-DD-bottlenecks.md
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch

from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine import launch
from swiftv2.engine.backend import Backend
from swiftv2.engine.build import build_backend
from swiftv2.engine.clock import PARTS, Clock
from swiftv2.engine.energy import DeviceReadings
from swiftv2.engine.meter import Meter
from swiftv2.models import decay_names
from swiftv2.recipes.planning import find_window, make_batch, make_objective
from swiftv2.records import append_line, read_lines, read_metrics

TARGET = 0.01
STEPS, BATCH = 52, 4
LEFT_OUT = 10
"""First steps, which are slower."""
SHOWN = [part for part in PARTS if part != "evaluation"]
WORDS = (
    "model.depths=[1,1]",
    "model.frames=10",
    "clip.frames=10",
    f"train.global_batch={BATCH}",
    f"train.max_steps={STEPS}",
    "train.evaluate_every=1000",
    "train.save_every=1000",
    "train.save_minutes=0",
    "evaluate.max_clips=2",
    "engine.device=cpu",
)
DELAYED = ("strace", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=preadv,preadv2")
DELAY = "inject=preadv,preadv2:delay_exit={}"


class Case(NamedTuple):
    """A run that is slow for one reason."""

    name: str
    words: tuple[str, ...] = ()
    ranks: int = 1
    read_seconds: float = 0.0
    """That each read of the store takes longer."""
    held_up: int | None = None
    """Rank that is stopped for half of the time."""


CASES = (
    Case("healthy", ("engine.backend=plain",)),
    Case("every read of the store takes 0.05 s longer", ("engine.backend=plain",), read_seconds=0.05),
    Case("the same, with 8 threads that read ahead", ("engine.backend=plain", "data.threads=8"), read_seconds=0.05),
    Case("micro-batches of 1 clip", ("engine.backend=plain", "train.micro_batch=1")),
    Case(
        "a checkpoint after every step, which training waits for",
        ("engine.backend=plain", "train.save_every=1", "train.save_in_background=false"),
    ),
    Case("two ranks", ranks=2),
    Case("two ranks, rank 1 stands still half of the time", ranks=2, held_up=1),
)


def main() -> None:
    """Run, measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="a generated cohort, such as that of `make demo-cohort`")
    parser.add_argument("--out", type=Path, help="file to be written instead of the screen")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of ten steps each way, for the cost of measuring")
    parser.add_argument("--keep", type=Path, help="folder in which the run directories stay")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the runs, from 0, where not all are wanted")
    arguments = parser.parse_args()
    words = [f"data.store={arguments.store}", *WORDS]
    with tempfile.TemporaryDirectory() as folder:
        kept = arguments.keep or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        found = [
            (case, *_run(case, words, kept / f"run{number}"))
            for number, case in enumerate(CASES)
            if number in (arguments.only or range(len(CASES)))
        ]
    measured = _measure(load(PretrainConfig, find_preset("pretrain", "demo"), words), arguments.rounds)
    machine.write_page(_page(found, *measured), arguments.out)


def _run(case: Case, words: Sequence[str], folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of metrics and events of a run."""
    program = ["-m", "swiftv2", "pretrain", str(find_preset("pretrain", "demo")), *words, f"run.dir={folder}", *case.words]
    if case.ranks > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}", *program]
    delay = [*DELAYED, "-e", DELAY.format(round(case.read_seconds * 1e6))] if case.read_seconds else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        process = subprocess.Popen([*delay, sys.executable, *program], env=environment, stderr=log, stdout=log)
        burners = _hold_up(folder, process.pid, case.held_up) if case.held_up is not None else []
        status = process.wait()
        for one in burners:
            one.kill()
            one.wait()
    if status:
        raise SystemExit(f"{case.name}: exit status {status}, see {folder}.log")
    rows = read_metrics(folder / "metrics.jsonl")
    print(case.name, json.dumps(_middle(rows)), file=sys.stderr)
    return rows, read_lines(folder / "events.jsonl")


def _hold_up(folder: Path, launcher: int, rank: int) -> list["subprocess.Popen[bytes]"]:
    """A program that stops a rank for a twentieth of a second, ten times a second."""
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in _children(launcher)}
    (held,) = (pid for pid, variables in ranks.items() if f"RANK={rank}".encode() in variables)
    stop = "import os, signal, sys, time\nwhile True:\n for s in ('STOP', 'CONT'):\n  "
    act = "os.kill(int(sys.argv[1]), signal.Signals[f'SIG{s}'])\n  time.sleep(0.05)"
    return [subprocess.Popen([sys.executable, "-c", stop + act, str(held)], stderr=subprocess.DEVNULL)]


def _children(pid: int) -> list[int]:
    below = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return below + [lower for one in below for lower in _children(one)]


def _middle(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the steps that count, by key; those of parts are means, as few steps save."""
    steps = [row for row in rows if row["step"] > LEFT_OUT]
    keys = [f"seconds/{part}" for part in (*SHOWN, "step")]
    means = {key: statistics.fmean(row[key] for row in steps) for key in keys}
    wait = sum(row["data_wait_seconds"] for row in steps) / sum(row["seconds/step"] for row in steps)
    return {**means, "clips": BATCH / means["seconds/step"], "tflops": rows[-1]["tflops"], "wait": wait}


def _measure(config: PretrainConfig, rounds: int) -> tuple[list[float], list[float], float]:
    """Ratio of steps that are measured to steps that are not, of the same twice without, and seconds of a step without."""
    torch.set_num_threads(1)
    world = launch.start(config.engine)
    window = find_window(config)
    batch = make_batch(config, window, BATCH)
    plain = config.engine.model_copy(update={"backend": "plain"})

    def made(*, counted: bool) -> Backend:
        objective = make_objective(config, window)
        if counted:
            objective.count()
        backend = build_backend(plain, config.optimizer, objective, decay_names(objective), world, BATCH, 1)
        backend.clock = backend.clock if counted else _Still(world.device)
        return backend

    backends = {"measured": made(counted=True), "bare": made(counted=False), "bare again": made(counted=False)}
    readings = DeviceReadings(world)
    meter = Meter(BATCH, 10**6, backends["measured"].clock, readings, world.device)
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    with tempfile.TemporaryDirectory() as folder, readings:
        for number in range(rounds + 1):
            for name in sorted(backends, key=lambda one: (number + list(backends).index(one)) % 3):
                began = time.perf_counter()
                for step in range(1, 11):
                    if name == "measured":
                        _measured_step(backends[name], batch, meter, 10 * number + step, Path(folder) / "metrics.jsonl")
                    else:
                        backends[name].forward_backward(batch)
                        backends[name].step(1e-6)
                seconds[name].append(time.perf_counter() - began)
    launch.stop()
    bare, more, again = (seconds[name][1:] for name in ("bare", "measured", "bare again"))
    pairs = [[b / a for a, b in zip(bare, other, strict=True)] for other in (more, again)]
    return pairs[0], pairs[1], statistics.median(seconds["bare"][1:]) / 10


class _Still(Clock):
    """A clock that does not look."""

    def lap(self) -> None:
        """Nothing."""


def _measured_step(backend: Backend, batch: Any, meter: Meter, step: int, lines: Path) -> None:
    """What the loop does around a step; the copies are looked at in one step of ten."""
    meter.begin()
    backend.begin(step)
    with backend.clock.part("data"):
        pass
    backend.forward_backward(batch)
    result = backend.step(1e-6, also={"joules": 0.0})
    meter.end(result.counts)
    append_line(lines, {"step": step, "loss": result.loss, **meter.values(step)})
    meter.told()


def _page(
    found: list[tuple[Case, list[dict[str, Any]], list[dict[str, Any]]]], measured: list[float], again: list[float], step: float
) -> str:
    heads = ("run", "clips/s", "step", *SHOWN)
    rows = []
    for case, lines, _ in found:
        middle = _middle(lines)
        parts = [f"{1e3 * middle[f'seconds/{part}']:.0f}" for part in SHOWN]
        rows.append((case.name, f"{middle['clips']:.1f}", f"{1e3 * middle['seconds/step']:.0f}", *parts))
    text = (
        f"The demo preset with depths [1, 1] and clips of 10 frames on a generated cohort, {BATCH} clips a step, fp32; one "
        "rank on one thread, or two under ZeRO-2. Milliseconds of a step and of its parts on rank 0, means over steps "
        f"{LEFT_OUT + 1} to {STEPS}, by each run's own metrics.jsonl."
    )
    body = [*machine.prose(text), *machine.table(heads, rows)]
    for case, lines, events in found:
        spread = {key: round(value, 2) for key, value in lines[-1].items() if key.startswith("spread/")}
        slow = [one for event in events if event["event"] == "slow" for one in event["slow"]]
        if case.ranks > 1:
            named = "; ".join(f"rank {one['rank']} is slow at {one['what']}, {one['share']:.0%} of a step" for one in slow)
            body += machine.prose(f"{case.name}: {spread}; events.jsonl names {named or 'nobody'}.")
    share, noise = statistics.median(measured) - 1, max(again) - min(again)
    found_out = "not to be told in this noise" if noise > 2 * TARGET else "met" if share < TARGET else "MISSED"
    verdict = (
        f"Cost of measuring: a step of {1e3 * step:.0f} ms with clock, meter, counts, copies in one step of ten and a line of "
        f"metrics takes {statistics.median(measured):.4f} times one without ({min(measured):.3f} to {max(measured):.3f}, "
        f"{len(measured)} rounds of ten steps each way); the same without, twice: {statistics.median(again):.4f} "
        f"({min(again):.3f} to {max(again):.3f}). The target is {TARGET:.0%}: {found_out}."
    )
    return machine.page("Slow runs, and what their figures say", ("torch", "deepspeed"), [*body, *machine.prose(verdict)])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
