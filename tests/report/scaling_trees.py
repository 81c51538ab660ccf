"""Trees for the tests of scaling figures: real fits of generated tables, and small ladders of rates and widths."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from swiftv2.scaling.fit import Options, fit_table
from swiftv2.scaling.table import Columns, read_table
from swiftv2.scaling.transfer import transfer

TRUTH = (1.8, 480.0, 0.35, 2100.0, 0.37)
SIZES = (7.33e6, 50.9e6, 202.3e6, 806.2e6)
TOKENS = (3e8, 1e9, 3e9, 1e10, 3e10)
FLOPS = (1e18, 1e19, 1e20)
NOISE = 0.004
OFF = "<b>51M & 3B</b>"
"""Name of the run that is off: names come from tables, which may hold anything."""

Places = tuple[tuple[float, float], ...]
GRID: Places = tuple((n, d) for n in SIZES for d in TOKENS)
BUDGETS: Places = tuple((n, c / (6 * n)) for c in FLOPS for n in np.geomspace(0.15, 6.0, 6) * 0.085 * c**0.5)


@functools.cache
def _fitted(places: Places, off: int | None, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    floor, size, alpha, data, beta = TRUTH
    lines = ["name,parameters,tokens,loss"]
    for index, (n, d) in enumerate(places):
        noise = NOISE * generator.standard_normal() + (0.06 if index == off else 0.0)
        loss = (floor + size * n**-alpha + data * d**-beta) * np.exp(noise)
        name = OFF if index == off else f"run {index}"
        lines.append(f"{name},{float(n)!r},{float(d)!r},{float(loss)!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_text("\n".join(lines) + "\n")
        columns = Columns(parameters="parameters", loss="loss", tokens="tokens", flops=None, unique=None)
        return fit_table(read_table(path, columns), Options(bootstraps=100)) | {"table": "table.csv"}


def fit_tree(places: Places = GRID, *, off: int | None = 7, seed: int = 7) -> dict[str, Any]:
    """The fit of a law of known constants at some sizes and tokens; one run may be off by 6 %."""
    return dict(_fitted(places, off, seed))


def transfer_tree() -> dict[str, Any]:
    """A sweep of rates at three widths: the best rate falls with the width in the standard form and stays under muP."""
    rows = []
    for form, power in (("standard", -1.0), ("mup", 0.0)):
        for width in (36, 72, 144):
            best = 3e-3 * (width / 36) ** power
            for lr in np.geomspace(1e-4, 3e-2, 6):
                loss = 0.4 - 0.02 * np.log2(width / 36) + 0.01 * np.log(lr / best) ** 2
                diverged = form == "standard" and width == 144 and lr > 2e-2
                rows.append({"parametrisation": form, "embed_dim": width, "lr": lr, "loss": None if diverged else loss})
    return transfer(rows)


def coordinates_tree(quantities: int = 3) -> dict[str, Any]:
    """Sizes of activations at three widths over four steps, growing with the width in the standard form alone."""
    widths = np.array([36, 72, 144])
    names = ("patch embedding", "stage 1 attention logits", "stage 1", "stage 2", "stage 3", "stage 4", "reconstruction")
    told = {}
    for place, name in enumerate(names[:quantities]):
        size = 0.1 * (place + 1)
        told[name] = {
            "standard": [(size * (1 + step * (widths / 36) ** 0.8)).tolist() for step in range(5)],
            "mup": [(size * (1 + 0.3 * step) * np.ones(3)).tolist() for step in range(5)],
        }
    slopes = {name: {"standard": 0.7, "mup": 0.0} for name in told}
    return {"widths": widths.tolist(), "steps": 4, "quantities": told, "slopes": slopes}


def prediction_tree() -> dict[str, Any]:
    """What `swiftv2 sweep predict` tells, as far as a page shows it."""
    return {
        "budget": {"flops": 1e21, "node_hours": 120.0},
        "parameters": 2.1e9,
        "parameters_interval": [1.5e9, 2.9e9],
        "tokens": 8e10,
        "tokens_interval": [6e10, 1.1e11],
        "loss": 2.31,
        "loss_interval": [2.29, 2.33],
        "level": 0.9,
        "lr": 1e-3,
        "lr_rule": "muP: the base's",
        "nodes": 16,
        "hours": 7.5,
        "hours_interval": None,
        "machine": "h200",
        "size": "2B",
        "embed_dim": 624,
        "extrapolation": {"factor": 6.9, "verdict": "near"},
        "config": "next/<2B>.yaml",
        "warnings": ["7 times beyond the runs & more"],
    }
