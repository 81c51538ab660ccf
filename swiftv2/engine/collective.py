"""Small exchanges between ranks: one decision, one list, one error that all raise together."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError

T = TypeVar("T")


class Agreed(NamedTuple):
    """What all ranks know at a boundary."""

    stop: int
    """Highest code of any rank that was asked to stop; 0 where none was."""
    news: bool
    """Whether any has something to tell."""
    save: bool
    """Whether any finds it time for a checkpoint."""
    flushed: bool
    """Whether all have their part of the last one on the disk."""


def agree(world: World, *, stop: int = 0, news: bool = False, save: bool = False, flushed: bool = True) -> Agreed:
    """Exchange what each rank knows; one small message on the host (collective)."""
    told = torch.tensor([stop, news, save, not flushed])
    if world.size > 1:
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=world.control)
    highest, any_news, any_save, not_flushed = told.tolist()
    return Agreed(highest, bool(any_news), bool(any_save), not not_flushed)


def broadcast(value: T, world: World) -> T:
    """Rank 0's value, on every rank (collective; the value is pickled between processes of one run)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.control)
    return box[0]


def gather(value: T, world: World) -> list[T]:
    """Every rank's value in rank order, on every rank (collective)."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def on_first(action: Callable[[], T], world: World) -> T:
    """Run `action` on rank 0 and hand its result to all (collective).

    Raises:
        SwiftError: on every rank, where the action failed on rank 0.
        Exception: on rank 0, where the action failed by a mistake in the program; the other ranks raise a SwiftError.
    """
    value, error = attempt(action) if world.rank == 0 else (None, None)
    value, told = broadcast((value, for_others(error, 0)), world)
    failure = error or told
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]  # without an error there is a value


def on_all(action: Callable[[], T], world: World) -> list[T]:
    """Run `action` on every rank and hand all results to all, in rank order (collective); raises as `on_each` does."""
    return gather(on_each(action, world), world)


def on_each(action: Callable[[], T], world: World) -> T:
    """Run `action` on every rank; each keeps its own result (collective).

    Raises:
        SwiftError: on every rank, where the action failed on any; the lowest failing rank is named.
        Exception: on the rank itself, where the action failed by a mistake in the program.
    """
    value, own = attempt(action)
    outcomes = gather(for_others(own, world.rank), world)
    if own is not None and not isinstance(own, SwiftError):
        raise own
    for rank, error in enumerate(outcomes):
        if error is not None:
            raise type(error)(f"{error} (rank {rank})" if world.size > 1 else str(error))
    return value  # type: ignore[return-value]  # without an error there is a value


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What an action gives, or its error, those of the system as one line that names the file."""
    try:
        return action(), None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return None, SwiftError(f"{where}{error.strerror or error}")
    except Exception as error:  # noqa: BLE001 (raised again; until then the other ranks must not wait for this one)
        return None, error


def for_others(error: Exception | None, rank: int) -> SwiftError | None:
    """What the other ranks are told of a failure; only our own errors are sure to survive the way there."""
    if error is None or isinstance(error, SwiftError):
        return error
    return SwiftError(f"rank {rank} failed: {type(error).__name__}: {error}")
