"""Configuration of a ladder: sizes, budgets and what else differs between the runs that a scaling law is fitted to."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from swiftv2.config.base import Config
from swiftv2.config.ladder_parts import (
    OWNED,
    BudgetKind,
    LadderBudgets,
    LadderMask,
    LadderRate,
    LadderSchedule,
    LadderSize,
    LadderSubjects,
    cells,
    free_words,
    short,
)
from swiftv2.config.load import build, load, read_yaml
from swiftv2.config.model import Size4
from swiftv2.config.sweep import SweepConfig
from swiftv2.errors import UsageError

Parametrisation = Literal["standard", "mup"]
Role = Literal["run", "trunk", "branch"]
TRUNK: Role = "trunk"
_Axis = list[tuple[str, tuple[str, ...]]]
"""(name, words) of each of its values."""
_EQUAL_TOKENS = 0.05
"""How far share x frames_per_run of `subjects` may differ, since a scan holds whole clips only."""


class Variant(NamedTuple):
    """What runs of a ladder share that differ in their budget alone."""

    stem: str
    """Begins the names of their elements."""
    size: LadderSize
    parametrisation: Parametrisation | None
    rate: float | None
    """Of a grid; None where the rule gives it."""
    words: tuple[str, ...]
    """All that they set but steps, schedule and rate."""


class Facts(NamedTuple):
    """What a variant's budgets are made into steps by."""

    parameters: int
    """Of the encoder."""
    tokens_per_clip: int
    """Of all patches."""
    brain_tokens_per_clip: float | None
    """Of patches that hold brain; None where the store's masks are not known."""
    flops_per_clip: float
    """Forward and backward, encoder and decoder."""
    global_batch: int


@dataclass(frozen=True)
class Rung:
    """An element of a ladder."""

    name: str
    variant: Variant
    role: Role
    """trunk: only there for its branches; its own loss, without a cooldown, is no point of a law."""
    after: tuple[str, ...]
    start: int
    """Step at which it begins: 0, or where it branches off."""
    steps: int
    """Step at which it ends."""
    rate: float
    words: tuple[str, ...]
    """What it sets besides what is common."""


class LadderConfig(Config):
    """Runs over sizes and budgets, from which scaling laws are fitted."""

    config: str
    """Pretraining configuration that all start from: a preset of configs/pretrain, such as 7M, or a YAML file."""
    folder: Path
    """Where run directories are made, as folder/NAME."""
    common: tuple[str, ...] = ()
    """Settings of all runs, as section.key=value words; a size's own come after them."""
    sizes: tuple[LadderSize, ...] = Field(min_length=1)
    """The models: names of presets of configs/model, or mappings of name and set."""
    budgets: LadderBudgets
    """How long they are trained."""
    learning_rate: LadderRate
    """Peak learning rate."""
    parametrisations: tuple[Parametrisation, ...] = ()
    """standard, mup or both; as the configuration says when empty (rule=mup: mup)."""
    base_embed_dim: PositiveInt | None = None
    """Width at which muP equals the standard form; as the configuration says when unset."""
    schedule: LadderSchedule = LadderSchedule()
    """The rate over a run."""
    seeds: tuple[NonNegativeInt, ...] = ()
    """Seeds that everything is run with; as the configuration says when empty."""
    data_fraction: tuple[float, ...] = ()
    """Shares of the training subjects; validation stays the same."""
    subjects: tuple[LadderSubjects, ...] = ()
    """Fewer subjects with longer scans against more with shorter ones: share x frames_per_run is to be the same."""
    mask: tuple[LadderMask, ...] = ()
    """Ways of masking; losses of different ones are of different tasks."""
    patch: tuple[Size4, ...] = ()
    """Patches of the model (voxels and frames); mask.patch_size, a multiple of each, is to be set in `common`."""
    nodes: PositiveInt | None = None
    """Nodes of each run; as slurm/sweep.sh says when unset."""
    tasks_per_node: PositiveInt | None = None
    """Ranks on each node; as slurm/sweep.sh says when unset."""
    time: str | None = None
    """Time limit of each run as Slurm writes it, in quotes; as slurm/sweep.sh says when unset."""
    at_most: PositiveInt | None = None
    """Elements that run at a time, in each array; as many as Slurm starts when unset."""
    gpu: str | None = None
    """GPU by which costs are planned, such as a100-80, where nothing was measured."""
    most_node_hours: PositiveFloat | None = None
    """A submission that is planned to take more is refused."""

    @field_validator("common")
    @classmethod
    def _are_settings(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        return free_words(words, OWNED)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.learning_rate.rule == "mup" and "standard" in self.parametrisations:
            raise ValueError("learning_rate: rule=mup is of muP alone: take rule=fixed or grid, or parametrisations=[mup]")
        if self.base_embed_dim is not None and "mup" not in self._parametrisations():
            raise ValueError("base_embed_dim is muP's: say parametrisations=[mup], or leave it out")
        if any(not 0 < share <= 1 for share in self.data_fraction):
            raise ValueError(f"data_fraction={list(self.data_fraction)}: take shares above 0 and up to 1")
        if self.data_fraction and self.subjects:
            raise ValueError("data_fraction and subjects both choose the training subjects: give one of the two")
        amounts = [one.share * one.frames_per_run for one in self.subjects]
        if amounts and max(amounts) > (1 + _EQUAL_TOKENS) * min(amounts):
            raise ValueError(
                f"subjects: share x frames_per_run goes from {min(amounts):g} to {max(amounts):g}; make it equal, so that "
                "subjects and scan length are compared at equal tokens"
            )
        self._check_sizes()
        try:
            self.outline()
        except UsageError as error:
            raise ValueError(str(error).removeprefix("elements: ")) from error
        return self

    def _check_sizes(self) -> None:
        names = [size.name for size in self.sizes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"sizes: the name {twice} is there more than once: each size needs its own")
        for word, size in itertools.product(self.common, self.sizes):
            whole = next((own for own in size.set if word.startswith(f"{own.partition('=')[0]}.")), None)
            if whole is not None:
                raise ValueError(f"common: {word} is lost where size {size.name} sets {whole}: put it behind that in its `set`")

    def variants(self) -> tuple[Variant, ...]:
        """All combinations of sizes and what else differs, budgets left out; the last axis changes fastest."""
        both = len(self._parametrisations()) > 1
        forms: tuple[Parametrisation | None, ...] = self._parametrisations() or (None,)
        rates: tuple[float | None, ...] = self.learning_rate.rates or (None,)
        axes = [axis for axis in (self._fractions(), self._subjects(), self._masks(), self._patches(), self._seeds()) if axis]
        found = []
        for size, form, rate in itertools.product(self.sizes, forms, rates):
            for others in itertools.product(*axes):
                names = [form if both else None, None if rate is None else f"lr_{short(rate)}", *(name for name, _ in others)]
                stem = "-".join([size.name, *(name for name in names if name)])
                words = (*size.set, f"model.name={json.dumps(size.name)}", *self._form_words(form))
                found.append(Variant(stem, size, form, rate, (*words, *(word for _, own in others for word in own))))
        return tuple(found)

    def outline(self) -> SweepConfig:
        """The sweep without settings: names, folders, order and resources of its elements need no facts.

        Raises:
            UsageError: names clash or are none for folders, or a resource is wrong.
        """
        elements = []
        for variant in self.variants():
            trunk = (f"{variant.stem}-{TRUNK}",) if self.schedule.kind == "trunk" else ()
            names = [f"{variant.stem}-{name}" for name, _, _ in self._budgets(variant.size).named()]
            resources = variant.size.model_dump(include={"nodes", "tasks_per_node", "time", "at_most"})
            elements += [{"name": name, **resources} for name in trunk]
            elements += [{"name": name, "after": trunk, **resources} for name in names]
        own = self.model_dump(include={"config", "folder", "common", "nodes", "tasks_per_node", "time", "at_most"})
        return build(SweepConfig, {**own, "elements": elements}, "elements")

    def trunks(self) -> set[str]:
        """Names of the elements that are there for their branches only."""
        trunk = self.schedule.kind == "trunk"
        return {f"{variant.stem}-{TRUNK}" for variant in self.variants()} if trunk else set()

    def rungs(self, facts: Callable[[Variant], Facts]) -> tuple[Rung, ...]:
        """All elements with their settings, in the order of `outline`.

        Args:
            facts: tells of each variant what turns budgets into steps.

        Raises:
            UsageError: a budget comes to too few steps, or brain tokens are to count and are not known.
        """
        return tuple(rung for variant in self.variants() for rung in self._rungs_of(variant, facts(variant)))

    def sweep(self, rungs: Sequence[Rung]) -> SweepConfig:
        """The sweep that runs them.

        Args:
            rungs: of this ladder, all of them.
        """
        tree = self.outline().model_dump()
        for element, rung in zip(tree["elements"], rungs, strict=True):
            element["set"] = rung.words
        return build(SweepConfig, tree, "elements")

    def check_words(self, words: Iterable[str]) -> None:
        """Make sure that words for all elements leave alone what the ladder itself sets.

        Raises:
            UsageError: one does not.
        """
        owned = {word.partition("=")[0] for variant in self.variants() for word in variant.words if word.startswith("model")}
        axes: tuple[tuple[str, Sequence[object]], ...] = (
            ("data.split.train_share", (*self.data_fraction, *self.subjects)),
            ("data.frames_per_run", self.subjects),
            ("mask", self.mask),
            ("model.patch_size", self.patch),
            ("run.seed", self.seeds),
        )
        try:
            free_words(words, (*OWNED, *sorted(owned), *(key for key, values in axes if values)))
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _rungs_of(self, variant: Variant, facts: Facts) -> Iterable[Rung]:
        budgets = self._budgets(variant.size)
        steps = {f"{variant.stem}-{name}": _steps(budgets, kind, value, facts) for name, kind, value in budgets.named()}
        for name, count in steps.items():
            if count < budgets.least_steps:
                raise UsageError(
                    f"{name}: its budget is {count} steps, fewer than budgets.least_steps={budgets.least_steps}: raise the "
                    f"budget or lower train.global_batch (now {facts.global_batch})"
                )
        rate = variant.rate if variant.rate is not None else self.learning_rate.of(facts.parameters)
        own, shortest = self.schedule, min(steps.values())
        warmup = round(own.warmup * shortest) if own.warmup_steps is None else own.warmup_steps
        cooldowns = {name: max(1, round(own.cooldown * count)) for name, count in steps.items()}
        least = warmup if own.kind == "cosine" else warmup + cooldowns[min(steps, key=lambda name: steps[name])]
        if least >= shortest:
            raise UsageError(
                f"{variant.stem}: warm-up and cooldown take {least} of the {shortest} steps of its shortest budget"
            )
        shared = (*variant.words, f"optimizer.lr={rate!r}", f"schedule.warmup_steps={warmup}")
        if own.kind == "cosine":
            for name, count in steps.items():
                words = (*shared, "schedule.kind=cosine", f"train.max_steps={count}")
                yield Rung(name, variant, "run", (), 0, count, rate, words)
            return
        shared = (*shared, "schedule.kind=constant")
        trunk, leaves = f"{variant.stem}-{TRUNK}", sorted({count - cooldowns[name] for name, count in steps.items()})
        kept = ("schedule.cooldown_steps=0", f"train.max_steps={leaves[-1]}", f"train.keep_steps={leaves}")
        yield Rung(trunk, variant, TRUNK, (), 0, leaves[-1], rate, (*shared, *kept))
        for name, count in steps.items():
            start = count - cooldowns[name]
            words = (*shared, f"schedule.cooldown_steps={cooldowns[name]}", f"train.max_steps={count}")
            origin = (f"run.branch_from={json.dumps(str(self.folder / trunk))}", f"run.branch_step={start}")
            yield Rung(name, variant, "branch", (trunk,), start, count, rate, (*words, *origin))

    def _budgets(self, size: LadderSize) -> LadderBudgets:
        return size.budgets or self.budgets

    def _parametrisations(self) -> tuple[Parametrisation, ...]:
        return self.parametrisations or (("mup",) if self.learning_rate.rule == "mup" else ())

    def _form_words(self, form: Parametrisation | None) -> tuple[str, ...]:
        if form is None:
            return ()
        base = (f"model.base_embed_dim={self.base_embed_dim}",) if form == "mup" and self.base_embed_dim is not None else ()
        return (f"model.parametrisation={form}", *base)

    def _fractions(self) -> _Axis:
        return [(f"data_{short(share)}", (f"data.split.train_share={share!r}",)) for share in self.data_fraction]

    def _subjects(self) -> _Axis:
        return [
            (
                f"share_{short(one.share)}-frames_{one.frames_per_run}",
                (f"data.split.train_share={one.share!r}", f"data.frames_per_run={one.frames_per_run}"),
            )
            for one in self.subjects
        ]

    def _masks(self) -> _Axis:
        return [one.named() for one in self.mask]

    def _patches(self) -> _Axis:
        return [(f"patch_{cells(patch)}", (f"model.patch_size={list(patch)}",)) for patch in self.patch]

    def _seeds(self) -> _Axis:
        return [(f"seed_{seed}", (f"run.seed={seed}",)) for seed in self.seeds]


def is_ladder(path: Path) -> bool:
    """Whether a file is a ladder rather than a plain sweep.

    Raises:
        UsageError: it cannot be read, or is no YAML mapping.
    """
    return "sizes" in read_yaml(path)


def load_ladder(path: Path) -> LadderConfig:
    """Read a ladder's file.

    Raises:
        UsageError: anything in it is unknown, missing or wrong; one line that names file and key.
    """
    return load(LadderConfig, path)


def _steps(budgets: LadderBudgets, kind: BudgetKind, value: float, facts: Facts) -> int:
    if kind == "flops":
        return round(value / (facts.flops_per_clip * facts.global_batch))
    counted = facts.tokens_per_clip if budgets.count == "all" else facts.brain_tokens_per_clip
    if counted is None:
        raise UsageError("budgets.count=brain needs the store's masks: give data.store=PATH of a store that is there")
    tokens = value * facts.parameters if kind == "tokens_per_parameter" else value
    return round(tokens / (counted * facts.global_batch))
