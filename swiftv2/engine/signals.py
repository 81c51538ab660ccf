"""A request to stop, by signal, on which all ranks agree at a step's boundary."""

import signal
from types import FrameType, TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from swiftv2.engine.launch import World

STOPPED_EARLY = 75  # EX_TEMPFAIL: state is saved, run me again

_INTERRUPTS_BEFORE_GIVING_UP = 3


class Agreed(NamedTuple):
    """What all ranks know at a step's boundary."""

    stop: bool
    """Whether any of them was asked to stop."""
    news: bool
    """Whether any of them has something to tell."""


class StopRequest:
    """Notes SIGTERM, SIGUSR1, SIGUSR2 and SIGINT while it is entered; every rank hears of it in `agreed`.

    A launcher passes an interrupt from the keyboard on to ranks that have got it already, so only a third one
    breaks off at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._interrupts = 0
        self._former: dict[signal.Signals, signal.Handlers | None] = {}
        self._number = 0

    @property
    def name(self) -> str | None:
        """The signal that asked, on this rank or, once agreed, on any; None while nobody has."""
        return signal.Signals(self._number).name if self._number else None

    def agreed(self, *, news: bool = False) -> Agreed:
        """Whether any rank was asked to stop, and whether any has news for the others (collective).

        Args:
            news: whether this rank has any.
        """
        told = int(news)
        if self._world.size > 1:
            numbers = torch.tensor([self._number, told], device=self._world.device)
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
            self._number, told = numbers.tolist()
        return Agreed(self._number > 0, bool(told))

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            self._former[number] = signal.signal(number, self._note)  # type: ignore[assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._number = number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= _INTERRUPTS_BEFORE_GIVING_UP:
                raise KeyboardInterrupt
