"""What the loop asks of whatever hands it batches."""

from collections.abc import Sequence
from typing import Any, Protocol

Exclusion = tuple[int, int]
"""Id of a sample that is left out, and the first position of the global order from which on it is."""


class Stream(Protocol):
    """One rank's micro-batches, on its device, without end."""

    @property
    def exclusions(self) -> list[Exclusion]:
        """All that is left out, as checkpoints keep it."""
        ...

    def __next__(self) -> Any:
        """The next micro-batch; only this is timed as waiting for data."""
        ...

    def faulty(self) -> bool:
        """Whether there is anything that `faults` would tell."""
        ...

    def faults(self) -> list[dict[str, Any]]:
        """What was found of no use since this was last asked; each names at least `clip` and `position`."""
        ...

    def exclude(self, exclusions: Sequence[Exclusion]) -> None:
        """Leave samples out from now on, as all ranks have agreed.

        Raises:
            SwiftError: too many are left out by now.
        """
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...
