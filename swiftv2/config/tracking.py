"""Configuration of trackers: who is told a run's numbers beside `metrics.jsonl`, and how much patience they get."""

from collections.abc import Iterator
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from swiftv2.config.base import Config

Mode = Literal["off", "offline", "online"]
Public = bool | int | float | str


class TrackingConfig(Config):
    """Trackers beside `metrics.jsonl`, which is always written. None of them can stop or slow a run."""

    tensorboard: bool = True
    """Whether numbers go to RUN_DIR/tensorboard: `tensorboard --logdir RUN_DIR`."""
    neptune: Mode = "off"
    """offline: RUN_DIR/neptune, read by `swiftv2 report`; online: a Neptune server; the hosted service closed in
    March 2026."""
    wandb: Mode = "off"
    """offline: RUN_DIR/wandb, uploaded later by `wandb sync`; online: Weights & Biases."""
    neptune_project: str | None = None
    """Project on a Neptune server: workspace/name."""
    wandb_project: str | None = None
    """Project of Weights & Biases."""
    connect_seconds: PositiveFloat = 30.0
    """Seconds that a tracker may take to begin, beside training; then the run goes on without it."""
    queue: PositiveInt = 1000
    """Lines of metrics that may wait for a tracker; where more do, the oldest are dropped and counted."""
    close_seconds: NonNegativeFloat = 5.0
    """Seconds that all trackers together get at the end of a run to take what waits; a time limit leaves ten for the end."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("neptune", "wandb"):
            if getattr(self, name) == "online" and self.project_of(name) is None:
                raise ValueError(f"{name}=online needs a project to write to: give tracking.{name}_project, or {name}=offline")
        return self

    def project_of(self, name: str) -> str | None:
        """The project of a tracker; None where it has none."""
        return {"neptune": self.neptune_project, "wandb": self.wandb_project}.get(name)

    @property
    def wanted(self) -> dict[str, Mode]:
        """Trackers that are asked for, and how."""
        modes: dict[str, Mode] = {"tensorboard": "offline" if self.tensorboard else "off"}
        modes |= {"neptune": self.neptune, "wandb": self.wandb}
        return {name: mode for name, mode in modes.items() if mode != "off"}


def public(config: BaseModel) -> dict[str, Public]:
    """The settings that a tracker may see, by dotted key.

    Numbers, switches and words of a closed choice leave; free text, paths and names do not, since a folder or a file may be
    named after a person.
    """
    return dict(_public(config, ""))


def _public(config: BaseModel, prefix: str) -> Iterator[tuple[str, Public]]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _public(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float) or (isinstance(value, str) and value in _choices(field.annotation)):
            yield f"{prefix}{name}", value
        elif isinstance(value, tuple | list) and value and all(isinstance(one, int | float) for one in value):
            yield f"{prefix}{name}", ",".join(map(str, value))


def _choices(annotation: Any) -> set[Any]:
    """All words that an annotation's literals allow."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(_choices(one) for one in get_args(annotation)))
