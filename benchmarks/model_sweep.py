"""Time and memory of a step against clip length, batch and width, beside what the FLOP count foretells."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from machine import prose, table
from model_cases import Case, Formulation, Peak, changed, kept_shares, peak, template_brain, time_in_turn
from torch.utils.flop_counter import FlopCounterMode

from swiftv2.config.model import ModelConfig
from swiftv2.models import Swin4D
from swiftv2.models.flops import computed_flops
from swiftv2.models.geometry import stage_grids

FRAMES = (10, 20, 40)
BATCHES = (1, 2, 4)
WIDTHS = (36, 48, 72, 96)
COLOURS = {"dense": "#4c72b0", "packed": "#c1440e"}


@dataclass(frozen=True)
class Point:
    """One measured case."""

    axis: str
    """What is varied: frames, batch or width."""
    value: int
    case: Case
    seconds: float
    memory: Peak
    flops: float
    """Of a forward pass of the batch, the work really done."""

    @property
    def held(self) -> float:
        """Numbers in one residual stream of every block: what activations grow with."""
        config, shares = self.case.config, _shares(self.case)
        tokens = [math.prod(grid) * share for grid, share in zip(stage_grids(config), shares, strict=True)]
        widths = [config.embed_dim * 2**stage for stage in range(len(tokens))]
        return float(self.case.batch * sum(d * n * w for d, n, w in zip(config.depths, tokens, widths, strict=True)))


def points(config: ModelConfig, formulations: Sequence[Formulation], rounds: int, threads: int) -> list[Point]:
    """Measure every point; those of one place in turn, memory in processes of their own."""
    wanted = [("frames", n, changed(config, frames=n), 1) for n in FRAMES]
    wanted += [("batch", n, config, n) for n in BATCHES]
    wanted += [("width", n, changed(config, embed_dim=n), 1) for n in WIDTHS]
    found: list[Point] = []
    known: dict[str, Point] = {}
    for axis, value, model, batch in wanted:
        cases: dict[str, Case] = {name: Case(name, model, batch) for name in formulations}
        new = {name: case for name, case in cases.items() if case.to_json() not in known}
        times = time_in_turn(new, rounds)
        for name, case in new.items():
            seconds = float(np.median(times[name].steps))
            known[case.to_json()] = Point(axis, value, case, seconds, peak(case, threads), batch * work(case))
        for case in cases.values():
            one = known[case.to_json()]
            found.append(Point(axis, value, case, one.seconds, one.memory, one.flops))
    return found


def work(case: Case) -> float:
    """FLOPs of the encoder's forward pass of one clip that are really computed."""
    brain = template_brain(case.config.image_size) if case.formulation == "packed" else None
    return float(computed_flops(case.config, brain)["encoder"])


def counted(config: ModelConfig) -> int:
    """FLOPs of a dense forward pass of one clip by PyTorch's own counter, on the meta device."""
    with torch.device("meta"):
        model = Swin4D(config)
        clips = torch.zeros(1, config.in_channels, *config.image_size, config.frames)
    with FlopCounterMode(display=False) as counter:
        model(clips)
    return int(counter.get_total_flops())


def section(measured: Sequence[Point], figure: Path | None) -> Iterator[str]:
    """Lines of the page, and the figure beside it."""
    base = {point.case.formulation: point for point in measured if (point.axis, point.value) == ("batch", 1)}
    yield from ["", "## Clip length, batch and width"]
    name = next(iter(base.values())).case.config.name
    yield from prose(
        f"Steps of {name}, one thing changed at a time; forward and backward of the encoder. Foretold from the point that is "
        "not changed: time by the FLOPs of the work really done (`swiftv2.models.flops`), memory by tokens x width x blocks. "
        "Counter: what PyTorch's FLOP counter finds in the dense model, over our count."
    )
    if figure is not None:
        draw(measured, base, figure)
        yield from [f"![time and memory]({figure.name})", ""]
    rows = []
    for point in measured:
        start = base[point.case.formulation]
        faster, held = point.flops / start.flops, point.held / start.held
        ratio = ""
        if point.case.formulation == "dense":
            ratio = f"{point.case.batch * counted(point.case.config) / point.flops:.3f}"
        seconds, memory = point.seconds / start.seconds, point.memory.growth / start.memory.growth
        row = [point.axis, str(point.value), point.case.formulation, f"{point.flops / 1e9:.1f}", ratio]
        row += [f"{point.seconds:.2f}", f"{seconds:.2f}", f"{faster:.2f}", f"{point.flops * 3 / point.seconds / 1e9:.0f}"]
        rows.append([*row, f"{point.memory.growth / 2**20:.0f}", f"{memory:.2f}", f"{held:.2f}"])
    heads = ["varied", "value", "formulation", "GFLOP forward", "counter", "seconds", "times the base", "foretold"]
    yield from table([*heads, "GFLOP/s", "peak growth, MiB", "times the base", "foretold"], rows)


def draw(measured: Sequence[Point], base: dict[Formulation, Point], path: Path) -> None:
    """Save time and memory against each axis; points are measured, lines foretold."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes = list(dict.fromkeys(point.axis for point in measured))
    figure, panels = plt.subplots(2, len(axes), figsize=(9, 5), squeeze=False, constrained_layout=True)
    for column, axis in enumerate(axes):
        for formulation, start in base.items():
            line = [p for p in measured if p.axis == axis and p.case.formulation == formulation]
            x, colour = [p.value for p in line], COLOURS[formulation]
            panels[0][column].plot(x, [p.seconds for p in line], "o", color=colour, label=formulation)
            panels[0][column].plot(x, [start.seconds * p.flops / start.flops for p in line], "-", color=colour, lw=1)
            growth = start.memory.growth / 2**30
            panels[1][column].plot(x, [p.memory.growth / 2**30 for p in line], "o", color=colour)
            panels[1][column].plot(x, [growth * p.held / start.held for p in line], "-", color=colour, lw=1)
        for row, unit in enumerate(("seconds a step", "peak growth, GiB")):
            panels[row][column].set(xlabel=axis, ylim=(0, None), ylabel=unit if column == 0 else "")
            panels[row][column].set_xticks([p.value for p in measured if p.axis == axis])
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _shares(case: Case) -> list[float]:
    if case.formulation != "packed":
        return [1.0] * len(case.config.depths)
    return kept_shares(template_brain(case.config.image_size), case.config)[1:]
