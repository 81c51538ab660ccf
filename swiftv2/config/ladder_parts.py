"""What a ladder's file is made of: budgets, sizes, learning rates, schedules, and what else may differ between runs."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from swiftv2.config.base import Config
from swiftv2.config.model import Size4
from swiftv2.config.sweep import check_words

BudgetKind = Literal["tokens", "tokens_per_parameter", "flops"]
_MARKS: dict[BudgetKind, str] = {"tokens": "t", "tokens_per_parameter": "r", "flops": "f"}
"""What stands before a budget's number in the names of elements."""
OWNED = (
    "train.max_steps",
    "train.keep_steps",
    "optimizer.lr",
    "schedule.kind",
    "schedule.warmup_steps",
    "schedule.cooldown_steps",
    "run.branch_from",
    "run.branch_step",
)
"""Settings that a ladder makes: what it is told otherwise would be another ladder."""


class _Part(Config):
    """A mapping inside a list of the file: an unknown key is named with those that there are."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, tree: Any) -> Any:
        for key in tree if isinstance(tree, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key}; keys here are {', '.join(cls.model_fields)}")
        return tree


class LadderBudgets(_Part):
    """How long runs are trained; all of the lists together are the budgets."""

    count: Literal["all", "brain"] = "all"
    """Which tokens count: patches of the whole box, or those that hold brain by the store's masks."""
    tokens: tuple[PositiveFloat, ...] = ()
    """Tokens to train on, repeated ones counted."""
    tokens_per_parameter: tuple[PositiveFloat, ...] = ()
    """The same as multiples of a size's encoder parameters."""
    flops: tuple[PositiveFloat, ...] = ()
    """Floating-point operations to spend, forward and backward, stage by stage: equal ones at all sizes are isoFLOP lines."""
    least_steps: PositiveInt = 50
    """A budget that comes to fewer optimizer steps is refused: its loss would tell of the warm-up."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.named():
            raise ValueError("budgets: give tokens, tokens_per_parameter or flops")
        return self

    def named(self) -> tuple[tuple[str, BudgetKind, float], ...]:
        """(name, kind, value) of each budget."""
        lists: tuple[tuple[BudgetKind, tuple[float, ...]], ...] = (
            ("tokens", self.tokens),
            ("tokens_per_parameter", self.tokens_per_parameter),
            ("flops", self.flops),
        )
        return tuple((f"{_MARKS[kind]}_{short(value)}", kind, value) for kind, values in lists for value in values)


class LadderSize(_Part):
    """One model; in a file also the bare name of a preset of configs/model."""

    name: str
    """Names the size in elements and tables: letters, digits and ._+- only."""
    set: tuple[str, ...] = ()
    """Settings that make it, as section.key=value words, such as model=51M or model.embed_dim=24."""
    budgets: LadderBudgets | None = None
    """Budgets of this size, in the place of the ladder's."""
    nodes: PositiveInt | None = None
    """Nodes of each of its runs; the ladder's when unset."""
    tasks_per_node: PositiveInt | None = None
    """Ranks on each node; the ladder's when unset."""
    time: str | None = None
    """Time limit of each of its runs, such as '12:00:00'; the ladder's when unset."""
    at_most: PositiveInt | None = None
    """Runs of this size that go at a time; the ladder's when unset."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        return {"name": tree, "set": [f"model={tree}"]} if isinstance(tree, str) else tree

    @field_validator("set")
    @classmethod
    def _are_settings(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return free_words(words, OWNED)


class LadderRate(_Part):
    """How the peak learning rate follows from the size."""

    rule: Literal["fixed", "mup", "power", "grid"]
    """fixed: one for all; mup: one for all under muP; power: rate x (N / parameters)^-exponent; grid: each of `rates`."""
    rate: PositiveFloat | None = None
    """The rate (of the size with `parameters`, where the rule is power)."""
    rates: tuple[PositiveFloat, ...] = ()
    """Rates that are tried at every size (rule=grid)."""
    parameters: PositiveFloat | None = None
    """Encoder parameters of the size that `rate` was found for (rule=power)."""
    exponent: NonNegativeFloat | None = None
    """How fast the rate falls with parameters (rule=power)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        wanted = {"power": {"rate", "parameters", "exponent"}, "grid": {"rates"}}.get(self.rule, {"rate"})
        for key in ("rate", "rates", "parameters", "exponent"):
            given = getattr(self, key) not in (None, ())
            if given != (key in wanted):
                raise ValueError(f"learning_rate: rule={self.rule} takes {', '.join(sorted(wanted))}")
        return self

    def of(self, parameters: float) -> float:
        """The rate of a size of so many encoder parameters (not for a grid, which has several)."""
        rate = float(self.rate or 0.0)
        if self.parameters is None or self.exponent is None:
            return rate
        return float(f"{rate * (parameters / self.parameters) ** -self.exponent:.4g}")


class LadderSchedule(_Part):
    """How the rate goes over a run."""

    kind: Literal["cosine", "trunk"] = "cosine"
    """cosine: every budget is a run of its own, whose cosine ends with it; trunk: one run at a constant rate for each size,
    from which a branch with a cooldown is taken for every budget."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Steps of the warm-up as a share of those of the size's shortest budget."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of the warm-up, instead of a share."""
    cooldown: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Share of a budget's steps over which a branch's rate falls (kind=trunk)."""


class LadderMask(_Part):
    """A way of masking; what is unset stays as the configuration has it."""

    ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the cells that is hidden."""
    patch: Size4 | None = None
    """Voxels and frames of a mask cell."""
    kind: Literal["random", "tube", "temporal"] | None = None
    """Which cells go together."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ratio is None and self.patch is None and self.kind is None:
            raise ValueError("mask: give ratio, patch or kind")
        return self

    def named(self) -> tuple[str, tuple[str, ...]]:
        """(name, words)."""
        values = {"kind": self.kind, "ratio": self.ratio, "patch_size": None if self.patch is None else list(self.patch)}
        names = [
            self.kind,
            None if self.ratio is None else short(self.ratio),
            None if self.patch is None else cells(self.patch),
        ]
        words = tuple(f"mask.{key}={json.dumps(value)}" for key, value in values.items() if value is not None)
        return "mask_" + "-".join(name for name in names if name), words


class LadderSubjects(_Part):
    """So many subjects with scans of such a length."""

    share: float = Field(gt=0.0, le=1.0)
    """Share of the training subjects."""
    frames_per_run: PositiveInt
    """First frames of each of their runs that are used."""


def short(value: float) -> str:
    """A number as it stands in names: 1e9, 0.25, 3e-4."""
    text = f"{value:g}"
    mantissa, mark, power = text.partition("e")
    return f"{mantissa}e{int(power)}" if mark else text


def cells(sizes: Sequence[int]) -> str:
    """Sizes as they stand in names: 6x6x6x2."""
    return "x".join(map(str, sizes))


def free_words(words: Iterable[str], owned: Iterable[str]) -> tuple[str, ...]:
    """Words that set nothing which the ladder makes itself, nor a section around it.

    Raises:
        ValueError: one does, or is no setting.
    """
    checked, taken = check_words(words), tuple(owned)
    for word in checked:
        key = word.partition("=")[0]
        for own in taken:
            if f"{own}.".startswith(f"{key}.") or f"{key}.".startswith(f"{own}."):
                raise ValueError(f"{word}: {own} is made by the ladder, by its sizes, budgets, learning_rate, schedule or axes")
    return checked
