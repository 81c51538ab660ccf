"""Configuration of a search for the best settings of a fine-tuning run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from swiftv2.config.base import Config
from swiftv2.config.load import find_preset, load, override
from swiftv2.errors import UsageError

ParameterKind = Literal["float", "int", "categorical"]
SamplerKind = Literal["tpe", "random", "grid"]
PrunerKind = Literal["median", "percentile", "halving", "hyperband", "none"]
_TAKEN = ("run.dir", "evaluate.test")
"""Settings that the search makes itself."""
_FIXED = ("task.name", "task.targets", "task.split", "task.select", "task.events", "run.seed")
"""Settings that trials share, or their values on validation subjects could not be compared."""


class ParameterConfig(Config):
    """What one setting may be."""

    kind: ParameterKind
    """float, int: a range; categorical: one of `choices`."""
    low: float | None = None
    """Smallest value (float, int)."""
    high: float | None = None
    """Largest value (float, int)."""
    log: bool = False
    """Whether values are drawn evenly on a logarithmic scale (float, int)."""
    step: PositiveFloat | None = None
    """Values are `low` and multiples of this above it (float, int); every value when unset, every whole one for int."""
    choices: tuple[Any, ...] | None = None
    """The values (categorical), any that the setting takes."""
    when: dict[str, Any] | None = None
    """Settings above this one in the space, each with the value (or the list of values) that it must have; else this one
    keeps the value of the fine-tuning configuration."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "categorical":
            if not self.choices or len(self.choices) != len({plain(value) for value in self.choices}):
                raise ValueError("kind=categorical takes choices, each once")
            if self.low is not None or self.high is not None or self.step is not None or self.log:
                raise ValueError("kind=categorical takes choices alone, no range")
            return self
        if self.choices is not None:
            raise ValueError(f"kind={self.kind} takes low and high; choices are for kind=categorical")
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"kind={self.kind} takes low and high, and low must be below high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log=true takes a low above 0 and no step")
        if self.kind == "int" and any(
            value is not None and value != round(value) for value in (self.low, self.high, self.step)
        ):
            raise ValueError("kind=int takes whole numbers")
        return self

    def values(self) -> tuple[Any, ...] | None:
        """All values in order, None where they cannot be counted."""
        if self.choices is not None:
            return self.choices
        if self.low is None or self.high is None or self.log or (self.kind == "float" and self.step is None):
            return None
        step = self.step or 1.0
        found = [self.low + step * index for index in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        return tuple(round(value) for value in found) if self.kind == "int" else tuple(found)


class SamplerConfig(Config):
    """How the next trial's settings are drawn."""

    kind: SamplerKind = "tpe"
    """tpe: tree-structured Parzen estimators over all settings together (Bergstra et al. 2011; trials that still run count as
    bad ones, so that workers spread); random; grid: every combination once."""
    startup_trials: PositiveInt = 10
    """Trials drawn by chance before tpe learns from them."""


class PrunerConfig(Config):
    """Which trials are ended early, by their values on validation subjects so far."""

    kind: PrunerKind = "median"
    """median: worse than the median of the others at the same step; percentile: than the best `percentile` of 100; halving:
    successive halving (Li et al. 2018, ASHA); hyperband: several of those; none."""
    startup_trials: NonNegativeInt = 5
    """Trials that must have ended before one is ended early (median, percentile)."""
    warmup_steps: NonNegativeInt = 0
    """Steps that every trial is given (median, percentile)."""
    percentile: float = Field(default=25.0, gt=0.0, lt=100.0)
    """Share of the trials, in percent, that goes on (percentile)."""
    min_steps: PositiveInt = 100
    """Steps before the first decision (halving, hyperband)."""
    reduction: int = Field(default=3, ge=2)
    """One of so many goes on at each decision (halving, hyperband)."""


class TuneConfig(Config):
    """A search: the fine-tuning run that it starts from, what it may change, and how many trials it makes."""

    name: str
    """Name for people and reports."""
    folder: Path
    """Folder of the study, on a file system that all workers see."""
    finetune: str
    """Fine-tuning configuration of all trials: a YAML file or a preset of configs/finetune."""
    set: tuple[str, ...] = ()
    """Settings of all trials, as section.key=value words."""
    space: dict[str, ParameterConfig] = Field(min_length=1)
    """What each setting, by its dotted key, may be."""
    trials: PositiveInt = 50
    """Trials in all, those that were ended early or failed among them; a greater number lets a study grow."""
    sampler: SamplerConfig = SamplerConfig()
    """How settings are drawn."""
    pruner: PrunerConfig = PrunerConfig()
    """Which trials are ended early."""
    seed: NonNegativeInt = 0
    """Seed of the draws; a trial trains with the fine-tuning configuration's run.seed."""
    storage: str | None = None
    """Database server of the study, such as postgresql://user:$PASSWORD@host/name, with variables of the environment. When
    unset, one of the workers keeps the study in a file that it alone opens, and the others ask it."""
    retries: NonNegativeInt = 3
    """How often a trial whose worker was lost is gone on with, before it counts as failed."""
    stale_seconds: float = Field(default=120.0, gt=0.0)
    """Silence of a worker on another host after which its trial is given to the next."""
    ranks: PositiveInt = 1
    """Processes of a trial, on the worker's node: one a GPU."""
    seeds: PositiveInt = 5
    """Runs of the best configuration, of seeds of their own, that end the search and predict the test subjects."""
    keep_checkpoints: bool = False
    """Whether trials that have ended keep checkpoints and weights; the best configuration is trained anew at the end."""

    @field_validator("set")
    @classmethod
    def _are_settings(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            try:
                override({}, word)
            except UsageError as error:
                raise ValueError(str(error)) from error
            _refuse_taken(word.partition("=")[0])
        return words

    @field_validator("storage")
    @classmethod
    def _is_safe(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("sqlite"):
            raise ValueError(
                "a SQLite file that several workers open is damaged on parallel file systems: leave storage out, and one "
                "worker alone opens the study's own, or give the URL of a database server"
            )
        if value is not None and "://" not in value:
            raise ValueError(f"{value!r} is no URL: give that of a database server, such as postgresql://host/name")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        above: dict[str, ParameterConfig] = {}
        for key, parameter in self.space.items():
            _refuse_taken(key)
            if any(_touch(key, fixed) for fixed in _FIXED):
                raise ValueError(f"space.{key}: trials that differ in it cannot be compared: say it in `set`, for all of them")
            if not key or not all(key.split(".")):
                raise ValueError(f"space: {key!r} is no key: write it as section.key")
            for other, wanted in (parameter.when or {}).items():
                _check_condition(key, other, wanted, above)
            above[key] = parameter
        if self.sampler.kind == "grid":
            self._check_grid()
        return self

    def _check_grid(self) -> None:
        for key, parameter in self.space.items():
            if parameter.values() is None:
                raise ValueError(f"space.{key}: sampler.kind=grid takes choices, or a range with a step")
            if parameter.when:
                raise ValueError(f"space.{key}: sampler.kind=grid tries every combination: leave out when")
        size = math.prod(len(parameter.values() or ()) for parameter in self.space.values())
        if self.trials > size:
            raise ValueError(f"trials={self.trials} are more than the {size} combinations of the grid")

    def applies(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether a setting is drawn, by the values of those above it."""
        conditions = (self.space[key].when or {}).items()
        return all(other in values and plain(values[other]) in _wanted(wanted) for other, wanted in conditions)


def load_study(path: str, words: tuple[str, ...] = ()) -> TuneConfig:
    """Read a study's file or preset of configs/tune.

    Raises:
        UsageError: anything in it is unknown, missing or wrong; one line that names file and key.
    """
    return load(TuneConfig, find_preset("tune", path), words)


def plain(value: Any) -> str:
    """A value as YAML writes it, in one line: as `key=value` words take it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _wanted(value: Any) -> tuple[str, ...]:
    return tuple(plain(one) for one in value) if isinstance(value, list | tuple) else (plain(value),)


def _check_condition(key: str, other: str, wanted: Any, above: Mapping[str, ParameterConfig]) -> None:
    if other not in above:
        raise ValueError(f"space.{key}.when: {other} must stand in the space, above {key}")
    choices = above[other].choices
    unknown = set(_wanted(wanted)) - {plain(value) for value in choices or ()}
    if choices is not None and unknown:
        raise ValueError(f"space.{key}.when: {other} is never {min(unknown)}")


def _touch(key: str, other: str) -> bool:
    """Whether one is the other, or a section that holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _refuse_taken(key: str) -> None:
    if any(_touch(key, taken) for taken in _TAKEN):
        raise ValueError(f"{key}: a trial's folder, and that it leaves the test subjects alone, is the search's to say")
