"""What a tracker is to the process that serves it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from swiftv2.config.tracking import Mode, Public
from swiftv2.errors import UsageError

EXTRAS = {"neptune": "neptune", "wandb": "wandb"}
"""Extra of this package that brings a tracker's library, where it does not come with the package."""
TOKENS = {"neptune": "NEPTUNE_API_TOKEN", "wandb": "WANDB_API_KEY"}
"""Variable that holds the secret of a tracker's service."""


@dataclass(frozen=True)
class Order:
    """What a tracker is opened with.

    Attributes:
        name: tensorboard, neptune or wandb.
        mode: offline or online.
        folder: where it writes.
        identity: of the run, the same in every attempt.
        project: on the service.
        settings: of the run, as far as they may leave.
        attempt: of the run.
    """

    name: str
    mode: Mode
    folder: str
    identity: str
    project: str | None
    settings: dict[str, Public]
    attempt: int


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step; a step may come again, after a kill or a rewind."""

    def close(self) -> None:
        """Write what was taken."""


def open_tracker(order: Order) -> Tracker:
    """Import the library and open the tracker; whatever goes wrong there is raised."""
    Path(order.folder).mkdir(parents=True, exist_ok=True)
    begin: Callable[[Order], Tracker] = import_module(f"swiftv2.engine.trackers.{order.name}").begin
    return begin(order)


def check(wanted: Mapping[str, Mode], environment: Mapping[str, str]) -> None:
    """Refuse what cannot work, before any device is taken.

    Args:
        wanted: trackers and how.
        environment: variables of this process.

    Raises:
        UsageError: a library is not installed, or a token is missing.
    """
    for name, mode in wanted.items():
        if find_spec(name) is None:
            extra = EXTRAS.get(name)
            how = f"pip install 'swiftv2[{extra}]'" if extra else f"pip install {name}"
            setting = f"tracking.{name}={mode}" if extra else f"tracking.{name}=true"
            raise UsageError(
                f"{setting} needs {name}, which is not installed: {how}, or set it to {'off' if extra else 'false'}"
            )
        token = TOKENS.get(name)
        if mode == "online" and token and not environment.get(token):
            raise UsageError(f"tracking.{name}=online needs {token} in the environment; or take tracking.{name}=offline")


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among values; a switch counts as 0 or 1."""
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, bool | int | float)}
    return {key: value for key, value in numbers.items() if value - value == 0.0}
