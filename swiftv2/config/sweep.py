"""Configuration of a sweep: runs that differ in a few settings, listed or as the product of a grid."""

import graphlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import yaml
from pydantic import BeforeValidator, PositiveInt, field_validator, model_validator

from swiftv2.config.base import Config
from swiftv2.config.load import load, override
from swiftv2.errors import UsageError

MOST_ELEMENTS = 1000
"""What Slurm takes in an array where a centre has not changed it (MaxArraySize 1001)."""
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")
_LONGEST_NAME = 120
_TAKEN = ("run", "run.dir")
"""Settings that make the folder of a run: an element's is made of its name."""


def _time(value: Any) -> Any:
    if value is not None and not (isinstance(value, str) and _TIME.fullmatch(value)):
        # YAML reads 12:00:00 without quotes as the number 43200.
        raise ValueError(f"{value!r} is no time limit: write it in quotes, such as '12:00:00' or '2-00:00:00'")
    return value


TimeLimit = Annotated[str | None, BeforeValidator(_time)]


class Resources(NamedTuple):
    """What a run is given by Slurm; as slurm/sweep.sh says where None."""

    nodes: int | None
    tasks_per_node: int | None
    time: str | None
    at_most: int | None
    """Elements with these resources that run at a time."""


class SweepElement(Config):
    """One run of a sweep."""

    name: str
    """Names its run directory below the sweep's folder: letters, digits and ._+- only."""
    set: tuple[str, ...] = ()
    """Settings of this run alone, as section.key=value words."""
    after: tuple[str, ...] = ()
    """Names of elements that must have finished before this one starts."""
    nodes: PositiveInt | None = None
    """Nodes of this run; the sweep's when unset, as with the following."""
    tasks_per_node: PositiveInt | None = None
    """Ranks on each of its nodes."""
    time: TimeLimit = None
    """Its time limit."""
    at_most: PositiveInt | None = None
    """Elements with the same resources as this one that run at a time."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tree: Any) -> Any:
        for key in tree if isinstance(tree, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key}; keys of an element are {', '.join(cls.model_fields)}")
        return tree

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        # A sweep's own files lie beside its elements.
        if not _NAME.fullmatch(value) or len(value) > _LONGEST_NAME or value.endswith((".json", ".yaml", ".out")):
            raise ValueError(f"{value!r} cannot name a folder: take letters, digits and ._+-, at most {_LONGEST_NAME}")
        return value

    @field_validator("set")
    @classmethod
    def _are_settings(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return check_words(words)


class SweepConfig(Config):
    """Runs of one pretraining configuration that differ in a few settings."""

    config: str
    """Pretraining configuration that all elements start from: a preset of configs/pretrain, such as 5M, or a YAML file."""
    folder: Path
    """Where the elements' run directories are made, as folder/NAME."""
    common: tuple[str, ...] = ()
    """Settings of all elements, as section.key=value words; an element's own come after them."""
    elements: tuple[SweepElement, ...] = ()
    """The runs one by one; an element's place in this list, from 0 on, is its index in the Slurm array."""
    grid: dict[str, tuple[Any, ...]] | None = None
    """Instead of `elements`: values of each setting, of which all combinations are run, the last setting changing fastest."""
    nodes: PositiveInt | None = None
    """Nodes of each element; as slurm/sweep.sh says when unset."""
    tasks_per_node: PositiveInt | None = None
    """Ranks on each node; as slurm/sweep.sh says when unset."""
    time: TimeLimit = None
    """Time limit of each element as Slurm writes it, in quotes, such as '12:00:00'; as slurm/sweep.sh says when unset."""
    at_most: PositiveInt | None = None
    """Elements that run at a time; as many as Slurm starts when unset."""

    @field_validator("common")
    @classmethod
    def _are_settings(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return check_words(words)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.elements) == bool(self.grid):
            raise ValueError("a sweep has elements or a grid: give one of the two")
        _check_grid(self.grid or {})
        runs = self.runs()
        if len(runs) > MOST_ELEMENTS:
            raise ValueError(f"{len(runs)} elements are more than the {MOST_ELEMENTS} of a Slurm array: make several sweeps")
        names = [run.name for run in runs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name {twice[0]} is there more than once: each element needs its own")
        for run in runs:
            for parent in run.after:
                if parent not in names:
                    raise ValueError(f"element {run.name} comes after {parent}, which is no element of this sweep")
        try:
            tuple(graphlib.TopologicalSorter({run.name: run.after for run in runs}).static_order())
        except graphlib.CycleError as error:
            raise ValueError(f"elements wait for one another in a circle: {' -> '.join(error.args[1])}") from error
        return self

    def runs(self) -> tuple[SweepElement, ...]:
        """The elements in order of their indices, whether listed or of the grid."""
        return self.elements or expand(self.grid or {})

    def names(self) -> tuple[str, ...]:
        """Their names, in the same order."""
        return tuple(run.name for run in self.runs())

    def resources(self, name: str) -> Resources:
        """What an element is given by Slurm: its own, else the sweep's."""
        own = next(run for run in self.runs() if run.name == name)
        values = (getattr(own, key) or getattr(self, key) for key in Resources._fields)
        return Resources(*values)

    def run_dir(self, name: str) -> Path:
        """Run directory of an element."""
        return self.folder / name

    def words(self, index: int, words: Iterable[str] = ()) -> tuple[str, ...]:
        """What an element sets: what is common, its own, what was given to all, and its run directory, in this order.

        Args:
            index: of the element.
            words: `section.key=value` words that were given to all elements.

        Raises:
            UsageError: there is no such element, or a word is none or sets the run directory.
        """
        runs = self.runs()
        if not 0 <= index < len(runs):
            raise UsageError(f"the sweep has no element {index}: its elements are 0 to {len(runs) - 1}")
        try:
            given = check_words(words)
        except ValueError as error:
            raise UsageError(str(error)) from error
        run = runs[index]
        return (*self.common, *run.set, *given, f"run.dir={_text(str(self.run_dir(run.name)))}")


def load_sweep(path: Path) -> SweepConfig:
    """Read a sweep's file.

    Raises:
        UsageError: anything in it is unknown, missing or wrong; one line that names file and key.
    """
    return load(SweepConfig, path)


def expand(grid: Mapping[str, Sequence[Any]]) -> tuple[SweepElement, ...]:
    """All combinations of a grid's values as elements, the last key changing fastest.

    A name is made of the last part of each key (the whole key where two keys end alike) and the value: lr_3e-4-ratio_0.75.
    """
    ends = [key.rpartition(".")[2] for key in grid]
    titles = [end if ends.count(end) == 1 else key for key, end in zip(grid, ends, strict=True)]
    elements = []
    for values in itertools.product(*grid.values()):
        texts = [_text(value) for value in values]
        name = "-".join(
            f"{title}_{_UNSAFE.sub('-', text).strip('-.') or 'empty'}" for title, text in zip(titles, texts, strict=True)
        )
        words = tuple(f"{key}={text}" for key, text in zip(grid, texts, strict=True))
        elements.append(SweepElement(name=name, set=words))
    return tuple(elements)


def check_words(words: Iterable[str]) -> tuple[str, ...]:
    """Words that set something other than the run directory, which the sweep makes itself.

    Raises:
        ValueError: one is not written as section.key=value, or sets the run directory.
    """
    checked = tuple(words)
    for word in checked:
        try:
            override({}, word)
        except UsageError as error:
            raise ValueError(str(error)) from error
        if word.partition("=")[0] in _TAKEN:
            raise ValueError(f"{word}: the run directory of an element is the sweep's folder and its name")
    return checked


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        if not values:
            raise ValueError(f"grid.{key} has no values")
        check_words(f"{key}={_text(value)}" for value in values)
    size = math.prod(len(values) for values in grid.values())
    if size > MOST_ELEMENTS:
        raise ValueError(f"the grid has {size} combinations, more than the {MOST_ELEMENTS} of a Slurm array")


def _text(value: Any) -> str:
    """A value as YAML writes it, in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()
