"""The best rate of each width, told from losses that are known."""

import math
from typing import Any

import pytest

from swiftv2.errors import UsageError
from swiftv2.scaling.transfer import transfer

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def rows(form: str, width: int, best: float, **more: Any) -> list[dict[str, Any]]:
    """Losses on a parabola in log rate."""
    own = {"parametrisation": form, "embed_dim": width, **more}
    return [{**own, "lr": rate, "loss": 1 + math.log(rate / best) ** 2} for rate in RATES]


def test_the_best_rate_is_that_of_the_parabola() -> None:
    told = transfer(
        [*rows("mup", 12, 3e-3), *rows("mup", 48, 3e-3), *rows("standard", 12, 6e-3), *rows("standard", 48, 1.8e-3)]
    )
    assert [one["best_lr"] for one in told["widths"]] == pytest.approx([3e-3, 3e-3, 6e-3, 1.8e-3])
    assert told["widths"][0]["best_lr_interval"] == [2e-3, 8e-3]
    assert told["moved"] == pytest.approx({"mup": 1.0, "standard": 0.3})
    assert told["step"] == pytest.approx(2.0)


def test_a_rate_that_diverged_bounds_the_best_one_and_the_end_of_the_grid_does_not() -> None:
    wide = rows("mup", 48, 8e-3)
    wide[-1]["loss"] = None
    narrow = rows("mup", 12, 1.0)
    first, second = transfer([*narrow, *wide])["widths"]
    assert (first["best_lr"], first["best_lr_interval"]) == (1.6e-2, None)
    assert (second["best_lr"], second["best_lr_interval"]) == (8e-3, [4e-3, 1.6e-2])
    assert second["diverged"] == [False] * 4 + [True]


def test_runs_of_other_tasks_are_no_seeds_of_one_rate() -> None:
    with pytest.raises(UsageError, match=r"runs differ in tokens \(76800, 9600\).* --where tokens=76800"):
        transfer([*rows("mup", 12, 3e-3, tokens=9600), *rows("mup", 48, 3e-3, tokens=76800)])
    with pytest.raises(UsageError, match="two widths or more"):
        transfer([*rows("mup", 12, 3e-3), *rows("standard", 48, 3e-3)])
    few = [row for row in rows("mup", 12, 3e-3) if row["lr"] < 3e-3]
    with pytest.raises(UsageError, match="mup, width 12: 2 rates with a finite loss"):
        transfer([*few, *rows("mup", 48, 3e-3)])
