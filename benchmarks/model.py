"""Steps of the encoder against the published formulation: time in turn, peak memory, where the time goes, what it scales with.

    python benchmarks/model.py --sweep --out benchmarks/results/2026-11-22-model.md

One process times all formulations in turn with the same weights and clips, float32 on the CPU; memory is weighed in a fresh
process for each. With a GPU, real bf16 optimizer steps under ZeRO-2 and the formulations under autocast follow.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import model_gpu
import model_sweep
import numpy as np
import torch
from machine import page, prose, table, write_page
from model_cases import (
    FORMULATIONS,
    Case,
    Peak,
    Times,
    kept_shares,
    paired,
    peak,
    step,
    time_in_turn,
    weigh,
)
from model_profile import OperatorTimes, kinds_table, operators_table, self_times

from swiftv2.config.load import load_model
from swiftv2.config.model import ModelConfig

PACKAGES = ("numpy", "torch", "deepspeed", "nilearn")
TIME_TARGETS = {("5M", "dense"): 3.0, ("5M", "packed"): 5.0, ("51M", "dense"): 2.0, ("51M", "packed"): 3.0}
"""Times the clips a second of the published formulation."""
MEMORY_TARGETS = {("5M", "dense"): 0.45, ("5M", "packed"): 0.2}
"""Share of the published formulation's peak."""
CHECKS = (("forward, s", 2.1, 2.5), ("backward, s", 2.3, 2.9), ("peak of the process, GB", 2.8, 2.8))
"""What the published code itself takes at E = 36 on this kind of machine."""
OPERATORS = 14

Measured = dict[str, tuple[Times, Peak]]
"""By formulation."""


def measure(config: ModelConfig, options: argparse.Namespace) -> tuple[Measured, float]:
    """Time and memory of every formulation of a model, and how far the dense outputs lie apart at most."""
    cases = {case.name: case for case in (Case(name, config) for name in FORMULATIONS)}
    if options.compile:
        compiled = (Case(name, config, compiled=True) for name in FORMULATIONS if name != "published")
        cases |= {case.name: case for case in compiled}
    times = time_in_turn(cases, options.rounds)
    apart = difference(cases["published"], cases["dense"])
    return {name: (times[name], peak(case, options.threads)) for name, case in cases.items()}, apart


def difference(one: Case, other: Case) -> float:
    """The largest difference between the outputs of two cases for the same clips."""
    with torch.no_grad():
        return float((one.build()(one.clips()) - other.build()(other.clips())).abs().max())


def targets_table(found: Mapping[str, Measured]) -> list[str]:
    """Lines: every target with what was measured."""
    rows = []
    for (model, name), wanted in TIME_TARGETS.items():
        if model in found:
            times = found[model][name][0].times(found[model]["published"][0])
            verdict = "met" if times[0] >= wanted else "MISSED"
            rows.append([model, name, "clips/s, times the published formulation's", f"{wanted:g}x", paired(times), verdict])
    for (model, name), wanted in MEMORY_TARGETS.items():
        if model in found:
            share = found[model][name][1].growth / found[model]["published"][1].growth
            verdict = "met" if share <= wanted else "MISSED"
            rows.append([model, name, "peak memory, of the published formulation's", f"{wanted:g}x", f"{share:.3f}", verdict])
    return table(["model", "formulation", "what", "target", "measured", "verdict"], rows)


def results_table(measured: Measured) -> list[str]:
    """Lines: seconds, clips a second, memory."""
    times_before, peak_before = measured["published"]
    rows = []
    for name, (times, memory) in measured.items():
        forward, backward = (f"{np.median(values):.2f}" for values in (times.forward, times.backward))
        mib = [f"{memory.growth / 2**20:.0f}", f"{memory.growth / peak_before.growth:.3f}", f"{memory.absolute / 2**20:.0f}"]
        share = f"{memory.absolute / peak_before.absolute:.3f}"
        rows.append([name, forward, backward, f"{times.rate:.3f}", paired(times.times(times_before)), *mib, share])
    heads = ["formulation", "forward, s", "backward, s", "clips/s", "times published", "peak growth, MiB", "of published"]
    return table([*heads, "peak absolute, MiB", "of published"], rows)


def check_table(measured: Measured) -> list[str]:
    """Lines: the published formulation here beside the published code on this kind of machine."""
    times, memory = measured["published"]
    values = (float(np.median(times.forward)), float(np.median(times.backward)), memory.absolute / 1e9)
    rows = []
    for (what, low, high), value in zip(CHECKS, values, strict=True):
        wanted = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        rows.append([what, wanted, f"{value:.2f}", f"{value / ((low + high) / 2):.2f}"])
    return table(["", "published code, as reported", "published formulation here", "ratio to the middle"], rows)


def shares_table(config: ModelConfig) -> list[str]:
    """Lines: what the template keeps at each stage."""
    shares = kept_shares(config)
    heads = ["", "voxels", *(f"stage {stage + 1}" for stage in range(len(config.depths)))]
    return table(heads, [["kept", *(f"{100 * share:.1f} %" for share in shares)]])


def profile_section(config: ModelConfig) -> Iterator[str]:
    """Lines: where the time of a step goes."""
    yield from ["", f"## Where the time goes, {config.name}"]
    yield from prose("One step after one that is not counted, under PyTorch's profiler, which costs some time itself.")
    found: dict[str, OperatorTimes] = {}
    for name in FORMULATIONS:
        case = Case(name, config)
        once = partial(step, case.build(), case.clips())
        once()
        found[name] = self_times(once, torch.device("cpu"))
    yield from kinds_table(found)
    for name in ("dense", "packed"):
        yield from ["", f"{name}:", "", *operators_table(found[name], OPERATORS)]


def body(options: argparse.Namespace) -> Iterator[str]:
    """Lines of the page."""
    configs = {name: load_model(name) for name in options.models}
    found, apart = {}, {}
    for name, config in configs.items():
        found[name], apart[name] = measure(config, options)
    yield from prose(
        f"CPU, float32, {options.threads} threads; forward and backward of the encoder, one clip of the model's size, "
        "loss = mean square of the output. All formulations take turns in one process with the same weights and clip, "
        f"{options.rounds} rounds after one that is not counted; medians, ratios paired within a round (lowest to highest). "
        "Published: the published formulation, written out in `benchmarks/published.py`, the same function as dense. Packed: "
        "brain tokens only, by the template mask (nilearn's MNI152 brain on the grid of stores). Peak memory: each in a fresh "
        "process with the allocator's default settings, three steps; growth is the highest resident memory over that with "
        "libraries, model and clip in place (after a step of a tiny model), and is what targets are held against: the "
        "libraries alone take about as much as a fifth of the published formulation's process. Absolute counts everything."
    )
    yield from ["## Targets", "", *targets_table(found)]
    for name, measured in found.items():
        yield from ["", f"## {name}", "", *results_table(measured), ""]
        yield from prose(f"Outputs of published and dense differ by {apart[name]:.1e} at most. What the template keeps:")
        yield from shares_table(configs[name])
        if name == "5M":
            yield from ["", "Check of the yardstick:", "", *check_table(measured)]
    for config in configs.values():
        yield from profile_section(config)
    if options.sweep:
        points = model_sweep.points(
            configs[options.models[0]], ("dense", "packed"), max(options.rounds // 2, 1), options.threads
        )
        figure = options.out.with_name(f"{options.out.stem}-sweep.png") if options.out else None
        yield from model_sweep.section(points, figure)
    yield from model_gpu.section(options.rounds)


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.peak:
        found = weigh(Case.from_json(options.peak), options.rounds)
        sys.stdout.write(json.dumps({"absolute": found.absolute, "growth": found.growth}))
        return
    if options.steps:
        sys.stdout.write(f"{model_gpu.steps_here(options.steps)}\n")
        return
    write_page(page("The encoder against the published formulation", PACKAGES, body(options)), options.out)


def _options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", default=["5M", "51M"], help="presets that are measured")
    made.add_argument("--rounds", type=int, default=7, help="rounds over all formulations")
    made.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    made.add_argument("--sweep", action="store_true", help="also vary clip length, batch and width of the first model")
    made.add_argument("--compile", action="store_true", help="also measure blocks compiled by torch.compile")
    made.add_argument("--out", type=Path, help="file to be written instead of the screen")
    made.add_argument("--peak", help=argparse.SUPPRESS)
    made.add_argument("--steps", help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    main()
