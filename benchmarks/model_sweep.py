"""Time and memory of a step against clip length, batch and width, beside what the FLOP count foretells."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from machine import prose, table
from model_cases import Case, Formulation, Peak, changed, kept_shares, peak, template_tokens, time_in_turn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from swiftv2.config.model import ModelConfig
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
    """Measure every point: times of all in turn, memory in processes of their own."""
    wanted = [("frames", n, changed(config, frames=n), 1) for n in FRAMES]
    wanted += [("batch", n, config, n) for n in BATCHES]
    wanted += [("width", n, changed(config, embed_dim=n), 1) for n in WIDTHS]
    places = [(axis, n, Case(name, model, batch)) for axis, n, model, batch in wanted for name in formulations]
    # Points where axes cross are one case, measured once.
    cases = {case.to_json(): case for _, _, case in places}
    times = time_in_turn(cases, rounds)
    peaks = {word: peak(case, threads) for word, case in cases.items()}
    found = []
    for axis, n, case in places:
        word = case.to_json()
        seconds = float(np.median(times[word].steps))
        found.append(Point(axis, n, case, seconds, peaks[word], case.batch * work(case)))
    return found


def work(case: Case) -> float:
    """FLOPs of the encoder's forward pass of one clip that are really computed."""
    template = template_tokens(case.config) if case.formulation == "packed" else None
    return float(computed_flops(case.config, template)["encoder"])


def counted(case: Case) -> int:
    """FLOPs of a forward pass of the batch, by PyTorch's own counter as it runs on the CPU."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 (the name of an operator)
    model, clips = case.build(), case.clips()
    with FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops}) as counter, torch.no_grad():
        model(clips)
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """PyTorch's count for its other kernels, by the shapes of the three."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def section(measured: Sequence[Point], figure: Path | None) -> Iterator[str]:
    """Lines of the page, and the figure beside it."""
    base = {point.case.formulation: point for point in measured if (point.axis, point.value) == ("batch", 1)}
    yield from ["", "## Clip length, batch and width"]
    name = next(iter(base.values())).case.config.name
    yield from prose(
        f"Steps of {name}, one thing changed at a time; forward and backward of the encoder. Foretold from the point that is "
        "not changed: time by the FLOPs of the work really done (`swiftv2.models.flops`), memory by tokens x width x blocks. "
        "Counter: what PyTorch's FLOP counter finds in a forward pass, over our count."
    )
    if figure is not None:
        draw(measured, base, figure)
        yield from [f"![time and memory]({figure.name})", ""]
    rows = []
    for point in measured:
        start = base[point.case.formulation]
        faster, held = point.flops / start.flops, point.held / start.held
        seconds, memory = point.seconds / start.seconds, point.memory.growth / start.memory.growth
        row = [point.axis, str(point.value), point.case.formulation, f"{point.flops / 1e9:.1f}"]
        row.append(f"{counted(point.case) / point.flops:.3f}")
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
    return kept_shares(case.config)[1:]
