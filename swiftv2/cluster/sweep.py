"""Sweeps of pretraining runs as Slurm arrays: what an element runs, which are to be queued, how they stand."""

from collections.abc import Iterable
from pathlib import Path

from swiftv2.config.load import find_preset
from swiftv2.config.sweep import SweepConfig


def element(sweep: SweepConfig, index: int, words: Iterable[str] = ()) -> tuple[Path, tuple[str, ...]]:
    """What `swiftv2 pretrain` is given for an element.

    Args:
        sweep: the sweep.
        index: of the element, the job's SLURM_ARRAY_TASK_ID.
        words: `section.key=value` words that all elements are given.

    Returns:
        (configuration file, words): the words set `run.dir`, too.

    Raises:
        UsageError: there is no such element, no such configuration, or a word is none.
    """
    return find_preset("pretrain", sweep.config), sweep.words(index, words)
