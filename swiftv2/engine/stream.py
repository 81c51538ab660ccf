"""What the loop asks of whatever hands it batches."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

Cause = Literal["unusable", "rewound", "asked"]


class Exclusion(NamedTuple):
    """A sample that is left out, by agreement of all ranks."""

    clip: int
    """Its id."""
    position: int
    """First position of the global order from which on it is."""
    cause: Cause = "unusable"
    """unusable: its bytes are of no use; rewound: a refused step held it; asked: by configuration."""


class Stream(Protocol):
    """One rank's micro-batches, on its device, without end."""

    @property
    def exclusions(self) -> list[Exclusion]:
        """All that is left out, as checkpoints keep it."""
        ...

    def __next__(self) -> Any:
        """The next micro-batch; timed as waiting for data, less what the stream itself tells the clock to be copying."""
        ...

    def recent(self, micro_batches: int) -> list[dict[str, Any]]:
        """Samples of the last so many micro-batches of this rank, one entry each.

        Each names `micro_batch` (0 is the oldest of those asked for), `clip`, `position`, and whatever helps to find it.
        """
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
            SwiftError: too many are unusable by now.
        """
        ...

    def close(self) -> None:
        """End what reads ahead."""
        ...
