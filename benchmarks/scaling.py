"""How well the network model reproduces v2's published throughput on Aurora and Frontier, then what it says of others.

Nothing is run: everything is computed from published figures, so that the page comes out the same everywhere.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from machine import page, prose, table, write_page
from scipy import optimize

from swiftv2.config.load import build, load_model
from swiftv2.config.model import ModelConfig
from swiftv2.models.flops import forward_flops
from swiftv2.plan.calibration import (
    MICRO_BATCHES,
    RUNS,
    Forecast,
    Reading,
    Run,
    bounds,
    fit,
    forecast_interval,
    predict,
    run_traffic,
)
from swiftv2.plan.machines import Machine, machine
from swiftv2.plan.model import plan_model
from swiftv2.plan.network import Job, Slowdown, splits, step_communication, zero_traffic

Floats = npt.NDArray[np.float64]
Shape = Callable[[Floats], Floats]

NODES = (1, 4, 16, 64, 256)
FEW = 64
"""Fits that are to predict see rates up to this many nodes."""
REACHED = 0.40
"""Share of the bf16 peak that the computation is taken to reach: others report 0.33 to 0.43 (torchtitan, Llama 3)."""
CASES = (("806M", 4, 4096), ("3.2B", 1, 1024))
"""(preset, clips of a rank at a time, clips of a strong-scaling step)."""
BOTH = "contention and another bandwidth"
"""The form with both numbers."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to be written instead of the screen")
    body = [*reproduction(), *explanations(), *forecasts()]
    write_page(
        page("Scaling: the published table and forecasts", ["numpy", "scipy", "pydantic"], body), parser.parse_args().out
    )


def reproduction() -> list[str]:
    """The published table beside what the model says."""
    lines = ["## The published table", ""]
    rows, errors, blind = [], [], []
    for run in RUNS:
        fitted, few = fit(run), fit(run, most_nodes=FEW)
        for nodes, rate in run.reported:
            bare, full, seen = (predict(run, nodes, slowdown) for slowdown in (Slowdown(), fitted, few))
            explained = (1 / bare - 1 / (run.alone * nodes)) / (1 / rate - 1 / (run.alone * nodes))
            errors.append(full / rate - 1)
            blind += [seen / rate - 1] if nodes > FEW else []
            row = [
                run.machine,
                str(nodes),
                f"{rate:,.1f}",
                f"{rate / run.alone / nodes:.1%}",
                f"{bare:,.0f}",
                f"{explained:.0%}",
            ]
            shown = [f"{seen:,.0f}", f"{seen / rate - 1:+.0%}"] if nodes > FEW else ["fitted", ""]
            rows.append([*row, f"{full:,.0f}", f"{full / rate - 1:+.1%}", *shown])
    heads = ("machine", "nodes", "reported clips/s", "efficiency", "published figures alone", "share of the loss they explain")
    lines += table((*heads, "fitted", "error", f"fitted to {FEW} nodes", "error"), rows)
    exponents = ", ".join(f"{run.machine} {fit(run).contention:.3f}" for run in RUNS)
    lines += prose(
        f"Fitted: one exponent a machine ({exponents}). Error over all {len(errors)} points: median {_median(errors):.1%}, "
        f"worst {_worst(errors):.1%}. Fitted only to points of at most {FEW} nodes and predicting those of 256 and more: "
        f"median {_median(blind):.1%}, worst {_worst(blind):.1%}."
    )
    return lines + prose(
        "What the machines' published figures do not explain is carried as that exponent: the bandwidth that a node reaches "
        "falls as nodes to the power of minus it. Its cause is not known from the table. On Frontier nearly all of the loss is "
        "of this kind."
    )


def explanations() -> list[str]:
    """Other ways to put the loss into one number, and the micro-batch, which is not reported."""
    rows = []
    for name, count in _shapes(RUNS[0]).items():
        cells = [name, str(count[1])]
        for run in RUNS:
            errors, blind = _errors(run, name, None), _errors(run, name, FEW)
            late = [error for (nodes, _), error in zip(run.reported, blind, strict=True) if nodes > FEW]
            enough = sum(nodes <= FEW for nodes, _ in run.reported) >= count[1]
            cells += [f"{_median(errors):.0%}", f"{_worst(errors):.0%}", f"{_worst(late):.0%}" if enough else "too few points"]
        rows.append(cells)
    heads = [
        f"{run.machine} {what}" for run in RUNS for what in ("median", "worst", f"worst beyond {FEW} nodes, fitted up to there")
    ]
    lines = ["", "## What else could be fitted", "", *table(("the loss is", "numbers fitted", *heads), rows)]
    lines += prose(
        "Clips a second at a constant batch of a rank is the reading that fits; a fixed global batch, whose cost beside "
        "computation grows in proportion to nodes, does not. Waiting for the slowest rank and a lower bandwidth fit worse than "
        "contention on both machines. Seven forms were tried on eight points: the choice itself is part of the fit."
    )
    shares = ", ".join(f"{run.machine} {_fitted(run, BOTH, None)[1]:.2f}" for run in RUNS)
    lines += prose(
        "Where contention and bandwidth are both fitted, the time between nodes comes out at this share of what the sheets' "
        f"bandwidth gives: {shares}. So the sheets' bandwidth and one clip a rank stand, within a fifth."
    )
    rows = []
    for micro_batch in (1, 2, 4, 8):
        cells = [f"{micro_batch}{'' if micro_batch in MICRO_BATCHES else ' (not counted)'}"]
        for run in RUNS:
            found = fit(run, micro_batch=micro_batch)
            errors = [predict(run, nodes, found, micro_batch) / rate - 1 for nodes, rate in run.reported]
            cells += [f"{found.contention:.3f}", f"{_median(errors):.1%}", f"{_worst(errors):.1%}"]
        rows.append(cells)
    heads = [f"{run.machine} {what}" for run in RUNS for what in ("exponent", "median", "worst")]
    return [*lines, *table(("clips of a rank", *heads), rows)]


def forecasts() -> list[str]:
    """Forecasts on Perlmutter, and what changes them."""
    where, allowed = machine("perlmutter-a100-80"), bounds()
    lines = ["", "## Forecasts for Perlmutter (4 x A100-80GB a node)"]
    exponents = [slowdown.contention for slowdown in (allowed.likely, allowed.least, allowed.most)]
    lines += prose(
        f"Computation is taken to reach {REACHED:.0%} of the bf16 peak, at three times the forward FLOPs of the dense model; "
        "nothing is measured yet. Gradients travel in fp32 under ZeRO-2, as is the default here, and nothing overlaps. Likely "
        "is Aurora's exponent ({:.3f}); the interval goes from {:.3f}, the least of any published rate, to {:.3f}, Frontier's "
        "if its runs had two clips a rank. It is the interval of the network alone.".format(*exponents)
    )
    for name, micro_batch, global_batch in CASES:
        job = _job(name, micro_batch, where)
        weak = forecast_interval(job, where, NODES)
        lines += ["", f"### {name}, weak scaling: {micro_batch} clips a rank", "", *_forecast_table(weak)]
        strong = forecast_interval(job, where, splits(where, NODES, global_batch), global_batch=global_batch)
        lines += ["", f"### {name}, strong scaling: {global_batch} clips a step", "", *_forecast_table(strong)]
    return lines + levers(where)


def levers(where: Machine) -> list[str]:
    """What of our own choices changes a forecast."""
    rows = []
    for name, micro_batch, _ in CASES:
        job = _job(name, micro_batch, where)
        cheap, once = _job(name, micro_batch, where, itemsize=2), _job(name, micro_batch, where, stage=1, itemsize=2)
        choices: list[tuple[str, Job, int, Reading]] = [
            ("as above", job, 1, "contention"),
            ("gradients hide behind the backward pass where they can", replace(job, overlap=1.0), 1, "contention"),
            ("gradients travel in bf16", cheap, 1, "contention"),
            ("ZeRO-2 in bf16, 8 micro-batches a step", cheap, 8, "contention"),
            ("ZeRO-1 in bf16, 8 micro-batches a step", once, 8, "contention"),
            ("as above, if the published losses were waiting and not the network", job, 1, "straggler"),
        ]
        for words, chosen, accumulation, reading in choices:
            (found,) = forecast_interval(chosen, where, [64], accumulation=accumulation, reading=reading)
            rows.append([name, words, *_cells(found)])
    heads = ("model", "64 nodes", "clips/s", "interval", "efficiency", "interval")
    lines = ["", "### What changes it, at 64 nodes", "", *table(heads, rows)]
    network = machine("h200-ndr")
    points = []
    for name, micro_batch, _ in CASES:
        several = forecast_interval(_job(name, micro_batch, network), network, (1, 4, 16, 64))
        points += [[name, str(each.likely.nodes), *_cells(each)] for each in several]
    lines += ["", "## Nodes of 8 x H200 with 400 Gb/s a GPU, weak scaling", ""]
    lines += table(("model", "nodes", "clips/s", "interval", "efficiency", "interval"), points)
    return lines + prose(
        "Another network than the one that the exponents come from: read these as less certain than the interval says."
    )


def _job(name: str, micro_batch: int, where: Machine, *, stage: int = 2, itemsize: int = 4) -> Job:
    config = build(ModelConfig, load_model(name).model_dump(mode="json"), where=name)
    sizes = plan_model(config)
    traffic = zero_traffic(
        sizes.encoder_parameters + sizes.decoder_parameters,
        2 if stage == 2 else 1,
        gradient_itemsize=itemsize,
        weight_itemsize=2,
        bucket_elements=50_000_000,
    )
    return Job(3 * forward_flops(config)["total"] / (REACHED * where.gpu.peak_bf16_flops), micro_batch, traffic)


def _forecast_table(found: Sequence[Forecast]) -> list[str]:
    heads = (
        "nodes",
        "GPUs",
        "clips a step",
        "micro-batches",
        "seconds a step",
        "clips/s",
        "interval",
        "efficiency",
        "interval",
    )
    rows = []
    for each in found:
        point = each.likely
        steps = [
            str(point.nodes),
            str(point.ranks),
            f"{point.global_batch:,}",
            str(point.accumulation),
            f"{point.step_seconds:.2f}",
        ]
        rows.append([*steps, *_cells(each)])
    return table(heads, rows)


def _cells(found: Forecast) -> list[str]:
    rates = f"{found.slow.clips_per_second:,.0f} to {found.fast.clips_per_second:,.0f}"
    shares = f"{found.slow.efficiency:.0%} to {found.fast.efficiency:.0%}"
    return [f"{found.likely.clips_per_second:,.0f}", rates, f"{found.likely.efficiency:.0%}", shares]


def _shapes(run: Run) -> dict[str, tuple[Shape, int, float]]:
    """Seconds of a step for each form of the loss: the form, how many numbers it has, where a fit starts."""
    where, traffic = machine(run.machine), run_traffic()
    nodes = np.array([float(nodes) for nodes, _ in run.reported])
    single = MICRO_BATCHES[0] * where.gpus_per_node / run.alone
    inside = step_communication(where, 1, traffic)
    added = np.array([step_communication(where, int(count), traffic) - inside for count in nodes])
    size = 2 * traffic.gradient_bytes + traffic.weight_bytes
    passing = size * (nodes - 1) / nodes / where.injection_bandwidth
    hops = added - passing
    return {
        "nothing: published figures alone": (lambda _: single + added, 0, 0.0),
        "a lower bandwidth, equal on all numbers of nodes": (lambda x: single + x[0] * passing + hops, 1, 1.0),
        "slower hops": (lambda x: single + passing + x[0] * hops, 1, 1.0),
        "waiting for the slowest rank, with the logarithm of nodes": (
            lambda x: single * (1 + x[0] * np.log(nodes)) + added,
            1,
            0.1,
        ),
        "contention: bandwidth falls as a power of nodes (used)": (lambda x: single + passing * nodes ** x[0] + hops, 1, 0.3),
        BOTH: (lambda x: single + x[1] * passing * nodes ** x[0] + hops, 2, 0.5),
        "a fixed global batch: in proportion to nodes": (lambda x: single * (1 + x[0] * (nodes - 1)), 1, 0.01),
    }


def _fitted(run: Run, name: str, most_nodes: int | None) -> Floats:
    """The numbers of a form, fitted to rates on at most so many nodes; where they are too few, what a fit starts from."""
    shape, count, start = _shapes(run)[name]
    times, used = _times(run), np.array([most_nodes is None or nodes <= most_nodes for nodes, _ in run.reported])
    values = np.full(count, start)
    if 0 < count <= used.sum():
        values = optimize.least_squares(lambda x: np.log(shape(x) / times)[used], values, bounds=(0, np.inf)).x
    return values


def _errors(run: Run, name: str, most_nodes: int | None) -> list[float]:
    """Relative errors of throughput of a form that is fitted to rates on at most so many nodes."""
    errors: list[float] = (_times(run) / _shapes(run)[name][0](_fitted(run, name, most_nodes)) - 1).tolist()
    return errors


def _times(run: Run) -> Floats:
    """Seconds of a step on each number of nodes, as reported."""
    nodes, rates = np.array(run.reported).T
    times: Floats = MICRO_BATCHES[0] * machine(run.machine).gpus_per_node * nodes / rates
    return times


def _median(errors: Sequence[float]) -> float:
    return statistics.median(map(abs, errors))


def _worst(errors: Sequence[float]) -> float:
    return max(map(abs, errors))


if __name__ == "__main__":
    main()
