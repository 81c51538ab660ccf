"""What is left of a run, against what is left of another that nothing disturbed: bit for bit."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftv2.engine.checkpoint import list_checkpoints, verify_checkpoint
from swiftv2.engine.shards import SavedState
from swiftv2.records import read_lines, read_metrics

NUMBERS = ("step", "loss", "gradient_norm", "learning_rate", "skipped", "heldout/loss")
"""Values of `metrics.jsonl` that do not depend on the clock."""


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer state of a checkpoint, whole."""
    with SavedState(run / "checkpoints" / f"step_{step}") as saved:
        found = {key: saved.whole(key) for key in saved.shapes}
        return found | {"adam_steps": torch.tensor(saved.adam_steps)}


def rows(run: Path, step: int) -> list[dict[str, Any]]:
    """Numbers of every step up to this one, each once."""
    found = read_metrics(run / "metrics.jsonl")
    return [{name: row[name] for name in NUMBERS if name in row} for row in found if row["step"] <= step]


def assert_readable(run: Path) -> None:
    """Events and metrics can be read to their ends, attempts only grow, and all checkpoints are whole."""
    for name in ("events.jsonl", "metrics.jsonl"):
        attempts = [row["attempt"] for row in read_lines(run / name)]
        assert attempts == sorted(attempts), name
    for checkpoint in list_checkpoints(run):
        verify_checkpoint(checkpoint.path)


def assert_same_end(run: Path, reference: Path, step: int, refused: Collection[int] = ()) -> None:
    """The run ended as the reference was at the step: its state, and what it did on the way there.

    Args:
        run: what was disturbed.
        reference: what was not.
        step: the last of the run.
        refused: steps whose numbers are not compared, as the reference has never computed them.
    """
    assert_readable(run)
    found, wanted = state(run, step), state(reference, step)
    assert found.keys() == wanted.keys()
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different, different
    numbers, expected = rows(run, step), rows(reference, step)
    assert [row["step"] for row in numbers] == list(range(1, step + 1))
    assert [row for row in numbers if row["step"] not in refused] == [row for row in expected if row["step"] not in refused]
