"""Small exchanges between ranks: one decision, one list, one error that all raise together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError

T = TypeVar("T")


def broadcast(value: T, world: World) -> T:
    """Rank 0's value, on every rank (collective; the value is pickled between processes of one run)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def gather(value: T, world: World) -> list[T]:
    """Every rank's value in rank order, on every rank (collective)."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def on_first(action: Callable[[], T], world: World) -> T:
    """Run `action` on rank 0 and hand its result to all (collective).

    Raises:
        SwiftError: on every rank, where the action failed on rank 0.
    """
    value, error = _attempt(action) if world.rank == 0 else (None, None)
    value, error = broadcast((value, error), world)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # without an error there is a value


def on_all(action: Callable[[], T], world: World) -> list[T]:
    """Run `action` on every rank and hand all results to all, in rank order (collective).

    Raises:
        SwiftError: on every rank, where the action failed on any; the lowest failing rank is named.
    """
    outcomes = gather(_attempt(action), world)
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            raise type(error)(f"{error} (rank {rank})" if world.size > 1 else str(error))
    return [value for value, _ in outcomes]  # type: ignore[misc]  # without errors there are values


def _attempt(action: Callable[[], T]) -> tuple[T | None, SwiftError | None]:
    try:
        return action(), None
    except SwiftError as error:
        return None, error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return None, SwiftError(f"{where}{error.strerror or error}")
