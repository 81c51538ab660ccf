"""Measured peaks of memory against the plan, setting by setting, each in processes of its own.

A step of the real objective under the real backend runs twice; the peak of the second is taken. On a CPU that is the
peak of resident memory (VmHWM, set back by /proc/self/clear_refs) less what was resident after the imports; blocks of
64 KiB and more go back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that it counts what is held. On a
GPU it is torch.cuda.max_memory_allocated.

    python benchmarks/memory.py --out benchmarks/results/YYYY-MM-DD-memory.md
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine
import torch

from swiftv2.config.engine import split_batch
from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.engine import launch
from swiftv2.engine.build import build_backend
from swiftv2.errors import SwiftError
from swiftv2.models import decay_names
from swiftv2.plan.accounts import KINDS
from swiftv2.plan.memory import RankMemory, rank_memory
from swiftv2.recipes.planning import find_window, layout, make_batch, make_objective, passes

RATE = 1e-6
TARGET = 0.10
PR_SET_THP_DISABLE = 41
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "1000000"}


@dataclass(frozen=True)
class Case:
    """One setting: a pretraining preset, what is changed in it, and ranks."""

    preset: str
    words: str
    ranks: int = 1

    def config(self) -> PretrainConfig:
        """The whole configuration; no store is there."""
        words = ["data.store=none.zarr", *self.words.split()]
        return load(PretrainConfig, find_preset("pretrain", self.preset), words)


PLAIN, ZERO = "engine.backend=plain engine.precision={}", "engine.zero_stage={} engine.precision={}"
ONE, TWO = "train.global_batch=1 train.micro_batch=1", "train.global_batch=2 train.micro_batch=1"
FOUR = "train.global_batch=4 train.micro_batch=4"
CASES = (
    Case("5M", f"{PLAIN.format('fp32')} {ONE}"),
    Case("5M", f"{PLAIN.format('fp32')} train.global_batch=2 train.micro_batch=2"),
    Case("5M", f"{PLAIN.format('bf16')} {TWO}"),
    Case("5M", f"{ZERO.format(2, 'fp32')} {TWO}", ranks=2),
    Case("51M", f"{PLAIN.format('fp32')} {ONE}"),
    Case("51M", f"{PLAIN.format('fp32')} {ONE} model.checkpoint_stages=[0,1]"),
    Case("51M", f"{PLAIN.format('fp32')} {ONE} model.packing=template"),
    Case("51M", f"{ZERO.format(2, 'fp32')} {TWO}", ranks=2),
    Case("51M", f"{ZERO.format(1, 'bf16')} {TWO}", ranks=2),
    Case("51M", f"{ZERO.format(2, 'bf16')} train.global_batch=4 train.micro_batch=1", ranks=2),
    Case("202M", f"{PLAIN.format('fp32')} {ONE}"),
    Case("202M", f"{PLAIN.format('fp32')} {ONE} model.checkpoint_stages=[0,1,2] model.checkpoint_keep=attention"),
    Case("202M", f"{ZERO.format(2, 'bf16')} {TWO}", ranks=2),
    # Few parameters and several clips: the peak lies in the passes, not in AdamW's step.
    Case("7M", f"{PLAIN.format('fp32')} {FOUR}"),
    Case("7M", f"{PLAIN.format('fp32')} {FOUR} model.packing=template"),
    Case("7M", f"{PLAIN.format('fp32')} {FOUR} model.checkpoint_stages=[0,1,2]"),
    Case("7M", f"{PLAIN.format('fp32')} {FOUR} model.checkpoint_stages=[0,1,2] model.checkpoint_keep=attention"),
)


def main() -> None:
    """Measure all settings and write the page, or, called by itself, measure one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to be written instead of the screen")
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the settings to measure, from 0; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setting:
        _measure_here(Case(**json.loads(arguments.setting)), arguments.answer, arguments.device)
        return
    chosen = [case for index, case in enumerate(CASES) if arguments.cases is None or index in arguments.cases]
    rows = []
    for case in chosen:
        plan, found = _planned(case, arguments.device), _measured(case, arguments.device)
        rows.append((case, plan, found))
        print(f"{case.preset} {case.words} x{case.ranks}: plan {plan.tensors / 1e6:,.0f} MB {found}", file=sys.stderr)
    machine.write_page(_page(rows, arguments.device), arguments.out)


def _planned(case: Case, device: str) -> RankMemory:
    config = case.config()
    micro_batch, accumulation = split_batch(config.train.global_batch, case.ranks, config.train.micro_batch)
    held = passes(config, find_window(config))
    # Here no other batch is on its way to the GPU beside the one that is computed.
    cuda = device == "cuda"
    plan = rank_memory(held, layout(config), config.engine, case.ranks, micro_batch, accumulation, cuda=cuda)
    return dataclasses.replace(plan, other=plan.other - int(held.input_bytes(micro_batch)) * cuda)


def _measured(case: Case, device: str) -> int:
    """Bytes of the fullest rank."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "peak"
        words = [str(Path(__file__).resolve()), "--setting", json.dumps(dataclasses.asdict(case)), "--answer", str(answer)]
        program = [sys.executable, *words, "--device", device]
        if case.ranks > 1:
            several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
            program = [sys.executable, *several, *words, "--device", device]
        environment = {**machine.environment(), **ALLOCATOR}
        done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SwiftError(f"{case}: {' '.join(done.stderr.strip().splitlines()[-3:])}")
        return max(int(path.read_text(encoding="utf-8")) for path in Path(folder).iterdir())


def _measure_here(case: Case, answer: Path, device: str) -> None:
    """Run two steps and write the peak of the second."""
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    config = case.config()
    engine = config.engine.model_copy(update={"device": device})
    micro_batch, accumulation = split_batch(config.train.global_batch, case.ranks, config.train.micro_batch)
    if engine.backend == "deepspeed":
        os.environ["DS_ACCELERATOR"] = device
        importlib.import_module("swiftv2.engine.zero")
    world = launch.start(engine)
    window = find_window(config)
    _warm_libraries(world.device)
    base = machine.memory("VmRSS")
    objective = make_objective(config, window)
    parts = (engine, config.optimizer, objective, decay_names(objective), world, micro_batch, accumulation)
    backend = build_backend(*parts)
    batch = make_batch(config, window, micro_batch).to(world.device)
    peak = 0
    for _ in range(2):
        gc.collect()
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        else:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(accumulation):
            backend.forward_backward(batch)
        backend.step(RATE)
        peak = machine.memory("VmHWM") - base if device == "cpu" else torch.cuda.max_memory_allocated()
    answer.with_name(f"peak-{world.rank}").write_text(str(peak), encoding="utf-8")
    backend.close()
    launch.stop()


def _warm_libraries(device: torch.device) -> None:
    """Let libraries that load lazily do so before memory is counted."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, 1, 64, 64, device=device, dtype=dtype, requires_grad=True)
        mixed = torch.nn.functional.scaled_dot_product_attention(x @ x, x, x)
        torch.autograd.backward(torch.nn.functional.layer_norm(torch.nn.functional.gelu(mixed), (64,)).sum())


def _page(rows: list[tuple[Case, RankMemory, int]], device: str) -> str:
    heads = ("model", "setting", "ranks", *KINDS, "planned", "measured", "error")
    lines = []
    for case, plan, found in rows:
        words = [word for word in case.words.split() if not word.startswith("train.global_batch")]
        setting = " ".join(word.partition(".")[2] for word in words)
        sizes = [f"{size / 1e6:,.0f}" for size in (*(getattr(plan, kind) for kind in KINDS), plan.tensors, found)]
        lines.append((case.preset, setting, str(case.ranks), *sizes, f"{plan.tensors / found - 1:+.1%}"))
    worst = max(abs(plan.tensors / found - 1) for _, plan, found in rows)
    on_cpu = "VmHWM of the second step less what was resident after the imports"
    how = "torch.cuda.max_memory_allocated" if device == "cuda" else on_cpu
    text = (
        f"MB (1e6 bytes) of the fullest rank; clips of 96^3 x 20 of the MNI152 brain at 2 mm, generated. Measured: {how}. "
        "Planned: what `swiftv2 plan` says of tensors, without its reserve, and its bytes by kind at the planned peak. "
        f"The largest error is {worst:.1%}; the target is {TARGET:.0%}."
    )
    body = [*machine.prose(text), *machine.table(heads, lines)]
    return machine.page("Memory of a rank: planned and measured", ("torch", "deepspeed"), body)


if __name__ == "__main__":
    main()
