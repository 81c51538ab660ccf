"""Tables of known laws, for tests."""

from pathlib import Path

import numpy as np

from swiftv2.scaling.law import Floats
from swiftv2.scaling.table import Columns, Table

LAW = (1.8172, 477.8, 0.3473, 2143.4, 0.3672)
COLUMNS = Columns(parameters="N", loss="L", tokens="D")


def losses(parameters: Floats, tokens: Floats, law: tuple[float, ...] = LAW) -> Floats:
    e, a, alpha, b, beta = law
    return np.asarray(e + a * parameters**-alpha + b * tokens**-beta)


def grid(sizes: int = 4, budgets: int = 3) -> tuple[Floats, Floats]:
    """Sizes crossed with tokens, sizes changing slowest."""
    n, d = np.geomspace(1e7, 1e9, num=sizes), np.geomspace(1e9, 1e11, num=budgets)
    return np.repeat(n, budgets), np.tile(d, sizes)


def noisy(loss: Floats, size: float, seed: int = 0) -> Floats:
    made: Floats = loss * np.exp(size * np.random.default_rng(seed).standard_normal(loss.size))
    return made


def make_table(parameters: Floats, tokens: Floats, loss: Floats, unique: Floats | None = None) -> Table:
    return Table(
        path=Path("table.csv"),
        columns=COLUMNS,
        rows=tuple(range(1, loss.size + 1)),
        names=None,
        parameters=parameters,
        tokens=tokens,
        flops=6.0 * parameters * tokens,
        loss=loss,
        unique=unique,
    )


def write_csv(path: Path, parameters: Floats, tokens: Floats, loss: Floats) -> Path:
    lines = [f"{n!r},{d!r},{x!r}" for n, d, x in zip(parameters.tolist(), tokens.tolist(), loss.tolist(), strict=True)]
    path.write_text("\n".join(["N,D,L", *lines, ""]), encoding="utf-8")
    return path
