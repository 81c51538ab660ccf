"""How often intervals of a scaling law hold the truth, and how wide they are: tables of known laws, drawn many times.

For each design (which sizes and tokens were run) and noise, tables are drawn from a known law and fitted as `sweep fit` fits
them. Told are the share of tables whose 90 % interval holds the truth, of every constant, and the median width over that of
the delta method's interval at the truth, which knows the noise: 2 x 1.645 sd. The same is told of a prediction: the loss of a
run of twice the largest size and tokens, without and with the noise of such a run.

    python benchmarks/scaling_coverage.py --out benchmarks/results/YYYY-MM-DD-scaling-coverage.md
"""

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np

from swiftv2.scaling.fit import NAMES, Estimate, Options, estimate
from swiftv2.scaling.law import Floats, Runs, jacobian

LEVEL, QUANTILE = 0.9, 1.6448536269514722
CHINCHILLA = (1.8172, 477.8, 0.3473, 2143.4, 0.3672)
FMRI = (0.15, 40.0, 0.35, 300.0, 0.4)
NEAR_ZERO = (0.02, 4.0, 0.2, 30.0, 0.25)
"""Laws as (E, A, alpha, B, beta): the published one; losses of masked volumes; hardly anything irreducible."""


@dataclass(frozen=True)
class Design:
    """Which runs a table holds.

    Attributes:
        name: of the design.
        law: E, A, alpha, B, beta of the truth.
        parameters, tokens: (n,) of the runs.
    """

    name: str
    law: tuple[float, ...]
    parameters: Floats
    tokens: Floats

    def losses(self) -> Floats:
        """Without noise (n,)."""
        return self.loss(self.parameters, self.tokens)

    def loss(self, parameters: Floats | float, tokens: Floats | float) -> Floats:
        """Of any run."""
        e, a, alpha, b, beta = self.law
        return np.asarray(e + a * parameters**-alpha + b * tokens**-beta)


def grid(sizes: int, budgets: int, parameters: tuple[float, float], tokens: tuple[float, float]) -> tuple[Floats, Floats]:
    """Every size with every budget, both spaced evenly in their logarithm."""
    n, d = np.geomspace(*parameters, num=sizes), np.geomspace(*tokens, num=budgets)
    return np.repeat(n, budgets), np.tile(d, sizes)


def scattered(count: int, budgets: int) -> tuple[Floats, Floats]:
    """Runs of any size along budgets of FLOPs, as in isoFLOP studies."""
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), count // budgets)
    parameters = np.sqrt(flops / 120.0) * np.exp(np.random.default_rng(5).uniform(-1.4, 1.4, flops.size))
    return parameters, flops / (6.0 * parameters)


DESIGNS = (
    Design("4 x 3", CHINCHILLA, *grid(4, 3, (7e6, 8e8), (1e9, 1e11))),
    Design("3 x 3", CHINCHILLA, *grid(3, 3, (1e7, 1e9), (1e9, 1e11))),
    Design("4 x 4, one decade", CHINCHILLA, *grid(4, 4, (5e7, 5e8), (1e9, 1e10))),
    Design("5 x 4", CHINCHILLA, *grid(5, 4, (1e7, 1e9), (1e9, 1e11))),
    Design("5 x 4, fMRI", FMRI, *grid(5, 4, (5e6, 8e8), (1e8, 1e10))),
    Design("5 x 4, E near 0", NEAR_ZERO, *grid(5, 4, (5e6, 8e8), (1e8, 1e10))),
    Design("6 x 6", CHINCHILLA, *grid(6, 6, (1e7, 1e9), (1e9, 3e10))),
    Design("8 x 8", CHINCHILLA, *grid(8, 8, (1e7, 1e10), (1e8, 1e11))),
    Design("30 scattered", CHINCHILLA, *scattered(30, 5)),
    Design("60 scattered", CHINCHILLA, *scattered(60, 6)),
)


def normal(generator: np.random.Generator, count: int) -> Floats:
    """Normal noise."""
    return generator.standard_normal(count)


def outliers(generator: np.random.Generator, count: int) -> Floats:
    """One run in twenty 5 to 30 standard deviations too high, as runs that diverged or ended early are."""
    high = generator.random(count) < 0.05
    return generator.standard_normal(count) + high * generator.uniform(5.0, 30.0, count)


def heavy(generator: np.random.Generator, count: int) -> Floats:
    """Student's t of three degrees of freedom, of variance 1."""
    made: Floats = generator.standard_t(3, count) / np.sqrt(3.0)
    return made


Noise = Callable[[np.random.Generator, int], Floats]
NOISES: dict[str, Noise] = {"normal": normal, "outliers": outliers, "heavy tails": heavy}
CASES = (
    *((design.name, "normal", 0.005) for design in DESIGNS),
    *((name, "normal", 0.02) for name in ("4 x 3", "5 x 4, E near 0", "8 x 8")),
    *((name, "outliers", 0.005) for name in ("4 x 3", "5 x 4", "8 x 8")),
    *((name, "heavy tails", 0.005) for name in ("4 x 3", "6 x 6")),
)


@dataclass(frozen=True)
class Coverage:
    """What many tables of one design showed.

    Attributes:
        case: design, noise, its size in log L.
        inside: share of intervals that hold the truth: E, A, alpha, B, beta, a.
        width: median width over the delta method's: E, alpha, beta.
        open_ends: share of tables of which some constant is unbounded.
        known: the delta method's standard deviations of E, alpha and beta, relative to them.
        loss, run: share of intervals that hold the loss of the larger run, without and with its noise.
        error: median half width of the latter, relative.
        seconds: of a table.
    """

    case: tuple[str, str, float]
    inside: Floats
    width: Floats
    open_ends: float
    known: Floats
    loss: float
    run: float
    error: float
    seconds: float


def study(case: tuple[str, str, float], draws: int, bootstraps: int = 200) -> Coverage:
    """Draw tables of a design and fit them, each with so many draws of its own for predictions."""
    name, kind, size = case
    design = next(one for one in DESIGNS if one.name == name)
    clean, truth = design.losses(), np.array(design.law)
    delta = delta_method(design, size)
    target = np.append(truth, truth[4] / (truth[2] + truth[4]))
    inside, widths, open_ends, loss, run, errors = [], [], [], [], [], []
    began = time.perf_counter()
    for index in range(draws):
        generator = np.random.default_rng([20261122, index])
        table = clean * np.exp(size * NOISES[kind](generator, clean.size))
        found = estimate(Runs.make(table, design.parameters, design.tokens), Options(bootstraps=bootstraps, seed=index))
        ends = np.array([[one.low, one.high] for one in found.intervals])
        inside.append((ends[:, 0] <= target) & (target <= ends[:, 1]))
        widths.append((ends[[0, 2, 4], 1] - ends[[0, 2, 4], 0]) / (2.0 * QUANTILE * delta))
        open_ends.append(any(one.open_low or one.open_high for one in found.intervals))
        held = design.loss(2.0 * design.parameters.max(), 2.0 * design.tokens.max())
        measured = held * np.exp(size * generator.standard_normal())
        plain, noisy = predictions(design, found, generator)
        loss.append(plain[0] <= held <= plain[1])
        run.append(noisy[0] <= measured <= noisy[1])
        errors.append((noisy[1] - noisy[0]) / (2.0 * held))
    return Coverage(
        case=case,
        inside=np.mean(inside, axis=0),
        width=np.median(widths, axis=0),
        open_ends=float(np.mean(open_ends)),
        known=delta / truth[[0, 2, 4]],
        loss=float(np.mean(loss)),
        run=float(np.mean(run)),
        error=float(np.median(errors)),
        seconds=(time.perf_counter() - began) / draws,
    )


def predictions(design: Design, found: Estimate, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Intervals of the loss of a run of twice the largest size and tokens, without and with its noise."""
    e, a, alpha, b, beta = found.laws.T
    losses = e + a * (2.0 * design.parameters.max()) ** -alpha + b * (2.0 * design.tokens.max()) ** -beta
    noise = found.robust.noise * generator.standard_t(found.robust.freedom, size=losses.size)
    levels = [0.5 - LEVEL / 2.0, 0.5 + LEVEL / 2.0]
    return np.quantile(losses, levels), np.quantile(losses * np.exp(noise), levels)


def delta_method(design: Design, size: float) -> Floats:
    """Standard deviations of E, alpha and beta at the truth, for noise of a known size."""
    runs = Runs.make(design.losses(), design.parameters, design.tokens)
    slopes = jacobian(runs.to_coordinates(np.array(design.law))[None], runs.logs)[0]
    spread = size * np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)))
    return np.array([spread[0] * design.law[0], spread[2], spread[4]])


def rows(found: Sequence[Coverage]) -> list[str]:
    """The table of the page."""
    heads = ["design", "noise", *(f"{name} held" for name in (*NAMES, "a")), "width of E", "of alpha", "of beta"]
    heads += ["open", "loss held", "run held", "half width", "s"]
    lines = []
    for one in found:
        name, kind, size = one.case
        cells = [
            name,
            f"{size:.1%} {kind}",
            *(f"{share:.1%}" for share in one.inside),
            *(f"{width:.2f}" for width in one.width),
        ]
        cells += [f"{one.open_ends:.0%}", f"{one.loss:.1%}", f"{one.run:.1%}", f"{one.error:.2%}", f"{one.seconds:.2f}"]
        lines.append(cells)
    return machine.table(heads, lines)


def body(found: Sequence[Coverage], draws: int) -> list[str]:
    """What stands under the head of the page."""
    shares = np.concatenate([one.inside[[0, 2, 4]] for one in found])
    widths = np.concatenate([one.width for one in found])
    text = (
        f"{draws} tables a row. Held: share of 90 % intervals that hold the truth; 400 tables tell it to 1.5 points (one "
        "standard deviation). Width: median, over the delta method's at the truth with the noise known (outliers not counted "
        "as noise). Open: some constant is unbounded, as is said. Loss held, run held: of a run of twice the largest size and "
        "tokens, without and with its own noise; half width is that of the latter, relative to the loss. s: of a table, with "
        "200 draws."
    )
    told = (
        f"Over all {len(found)} rows E, alpha and beta are held in {shares.min():.1%} to {shares.max():.1%}, "
        f"{np.mean((shares >= 0.86) & (shares <= 0.95)):.0%} of them within 86 to 95 %; widths are {widths.min():.2f} to "
        f"{widths.max():.2f} times the delta method's, {np.mean(widths <= 1.5):.0%} of them at most 1.5."
    )
    return [*machine.prose(text), *rows(found), *machine.prose(told)]


def main() -> None:
    """Study all cases and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=400, help="tables of each case")
    parser.add_argument("--designs", nargs="+", help="names of designs; all unless given")
    parser.add_argument("--processes", type=int, default=1, help="cases at a time")
    parser.add_argument("--out", type=Path, help="file for the page; else it is printed")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.designs is None or case[0] in arguments.designs]
    found = []
    with multiprocessing.Pool(arguments.processes) as pool:
        for one in pool.imap(functools.partial(study, draws=arguments.draws), cases):
            print(rows([one])[-1], file=sys.stderr, flush=True)
            found.append(one)
    page = machine.page("Intervals of scaling laws", ["numpy", "scipy"], body(found, arguments.draws))
    machine.write_page(page, arguments.out)


if __name__ == "__main__":
    main()
