"""Sizes of a model's family: what a width holds and costs, and the run that trains it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.load import build, find_preset, load, load_model, presets_root
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.plan.run import BACKWARD
from swiftv2.recipes.holdings import Counter, Holdings

Numbers = NDArray[np.float64]
HEAD_MULTIPLE = 8
"""What head dimensions are multiples of on GPUs, whose attention pads others."""
GIVEN_UP = 1e-3
"""Part of the loss that may be given up for a width with such head dimensions."""
FEWEST_STEPS = 10
WARMUP_SHARE = 10
"""A run's warm-up is at most one step in so many."""
_ROTARY = 6
"""Least head dimension of rotary embeddings."""
_SAME = 0.003
"""How far counts of parameters may differ that are of the same width."""
_NOT_ITS_SIZE = (
    *("name", "drop_path", "parametrisation", "base_embed_dim"),
    *("packing", "attention_buckets", "checkpoint_stages", "checkpoint_keep"),
)


@dataclass(frozen=True)
class Size:
    """A width of a family for a budget."""

    width: int
    """`model.embed_dim`."""
    parameters: float
    """Of the encoder."""
    tokens: float
    """Trained on, as the law counts them."""
    loss: float
    """By the law."""


@dataclass(frozen=True)
class Family:
    """Models that differ from a base in width alone: depths, heads, patches and clips are the base's."""

    base: PretrainConfig
    """The run whose model is scaled."""
    brain: bool = False
    """Whether tokens are those patches alone that hold brain."""
    _counter: Counter = field(default_factory=Counter, init=False, repr=False, compare=False)

    @cached_property
    def step(self) -> int:
        """What widths are multiples of: every stage divides into its heads, in even parts for rotary embeddings."""
        model = self.base.model
        parts = [heads * (2 if model.variant == "decoupled" else 1) for heads in model.num_heads]
        return math.lcm(*(part // math.gcd(part, 1 << stage) for stage, part in enumerate(parts)))

    @cached_property
    def gpu_step(self) -> int:
        """What widths are multiples of whose head dimensions suit GPUs."""
        parts = [heads * HEAD_MULTIPLE for heads in self.base.model.num_heads]
        wide = math.lcm(*(part // math.gcd(part, 1 << stage) for stage, part in enumerate(parts)))
        return math.lcm(wide, self.step)

    @cached_property
    def smallest(self) -> int:
        """The least width."""
        model = self.base.model
        if model.variant != "decoupled":
            return self.step
        least = max(math.ceil(_ROTARY * heads / (1 << stage)) for stage, heads in enumerate(model.num_heads))
        return math.ceil(least / self.step) * self.step

    @cached_property
    def patches(self) -> int:
        """Tokens of a clip at the first stage, background counted."""
        return self.holdings(self.base.model.embed_dim).tokens_per_clip

    @cached_property
    def clip_tokens(self) -> int:
        """Tokens of a clip as the law counts them.

        Raises:
            UsageError: they are those with brain, and there is no store that tells which.
        """
        if not self.brain:
            return self.patches
        brain = self.holdings(self.base.model.embed_dim).brain_tokens_per_clip
        if brain is None:
            raise UsageError(
                f"the law counts brain tokens, and {self.base.data.store} is not there to tell which: data.store=PATH"
            )
        return brain

    def holdings(self, width: int) -> Holdings:
        """What a width holds and costs, counted as in the table of a ladder."""
        return self._counter.hold(self._at(width))

    def model(self, width: int) -> ModelConfig:
        """The configuration of a width; a shipped model keeps its name, others are called by their parameters."""
        made = self._at(width).model
        name = next((name for name in _presets("model") if _alike(made, load_model(name))), None)
        return made.model_copy(update={"name": name or _spoken(self.holdings(width).parameters)})

    def parameters(self, width: Numbers | float) -> Numbers:
        """Encoder parameters by width, also between widths that there are."""
        return np.asarray(np.polyval(self._polynomials[0], width), dtype=np.float64)

    def clip_flops(self, width: Numbers | float) -> Numbers:
        """FLOPs of training on one clip, all stages and the decoder, by width."""
        return np.asarray(np.polyval(self._polynomials[1], width), dtype=np.float64)

    def width(self, parameters: Numbers | float) -> Numbers:
        """The width, maybe between those that there are, at which the encoder has so many parameters."""
        square, straight, constant = self._polynomials[0]
        inside = straight**2 - 4 * square * (constant - np.asarray(parameters, dtype=np.float64))
        return np.asarray((np.sqrt(np.maximum(inside, 0.0)) - straight) / (2 * square), dtype=np.float64)

    def token_flops(self, parameters: Numbers) -> Numbers:
        """FLOPs of training on one token of a clip, by encoder parameters."""
        return self.clip_flops(self.width(parameters)) / self.clip_tokens

    def holds(self, parameters: float) -> bool:
        """Whether one of the family's widths has so many parameters."""
        nearest = self.step * max(1, round(float(self.width(parameters)) / self.step))
        return abs(float(self.parameters(nearest)) / parameters - 1) < _SAME

    def flops(self, width: int) -> dict[str, int]:
        """FLOPs of training on one clip by part of the model: the keys of `swiftv2.models.flops.forward_flops`."""
        return {part: (1 + BACKWARD) * count for part, count in self.holdings(width).forward_flops.items()}

    @cached_property
    def _polynomials(self) -> tuple[Numbers, Numbers]:
        """Both are quadratic in the width: of products of two widths, of tables and biases, and of what has no width."""
        widths = self.gpu_step * np.array([1, 2, 4])
        held = [self.holdings(int(width)) for width in widths]
        counts, flops = [one.parameters for one in held], [one.training_flops for one in held]
        return np.polyfit(widths, counts, 2), np.polyfit(widths, flops, 2)

    def _at(self, width: int) -> PretrainConfig:
        tree = {**self.base.model.model_dump(mode="json"), "embed_dim": width}
        model = build(ModelConfig, tree, where=f"{self.base.model.name} at width {width}")
        return self.base.model_copy(update={"model": model})


def near(
    family: Family,
    parameters: float,
    tokens: Callable[[float], float],
    loss: Callable[[float, float], float],
    *,
    on_gpus: bool,
) -> list[Size]:
    """Widths around an optimum, the one to take first.

    Args:
        family: whose widths.
        parameters: of the optimum.
        tokens: that a size (parameters) is trained on for the same budget.
        loss: of a size and tokens.
        on_gpus: whether a width with head dimensions that suit GPUs is taken where it gives up little.
    """
    between = float(family.width(parameters)) if parameters > float(family.parameters(0.0)) else 0.0
    widths: dict[int, None] = {}
    for step in (family.step, family.gpu_step) if on_gpus else (family.step,):
        widths |= dict.fromkeys((math.floor(between / step) * step, math.ceil(between / step) * step))
    widths = dict.fromkeys(sorted(max(width, family.smallest) for width in widths))
    sizes = []
    for width in widths:
        held = float(family.parameters(width))
        sizes.append(Size(width, held, tokens(held), loss(held, tokens(held))))
    sizes.sort(key=lambda size: size.loss)
    suited = [s for s in sizes if s.width % family.gpu_step == 0 and s.loss <= sizes[0].loss * (1 + GIVEN_UP)]
    first = suited[0] if on_gpus and suited else sizes[0]
    return [first, *(size for size in sizes if size is not first)]


def configure(family: Family, width: int, steps: int, rate: float | None = None) -> tuple[PretrainConfig, str, list[str]]:
    """The run that trains a width.

    Args:
        family: whose base run is followed in all else.
        width: `model.embed_dim`.
        steps: optimizer steps.
        rate: learning rate; where None, under muP the base's, else that of the shipped run of this very model, else the base's.

    Returns:
        The configuration, how its learning rate was found, and warnings.

    Raises:
        UsageError: too few steps to train anything.
    """
    base, model = family.base, family.model(width)
    if steps < FEWEST_STEPS:
        raise UsageError(
            f"the budget trains {model.name} for {steps} steps of train.global_batch={base.train.global_batch}, fewer than "
            f"{FEWEST_STEPS}: give more, or a smaller train.global_batch"
        )
    lr, rule, warnings = _rate(base, model, rate)
    warmup = min(base.schedule.warmup_steps, steps // WARMUP_SHARE)
    if warmup < base.schedule.warmup_steps:
        warnings.append(f"schedule.warmup_steps is {warmup}, not {base.schedule.warmup_steps}: the run has {steps} steps")
    tree: dict[str, Any] = base.model_dump(mode="json")
    tree["model"] = model.model_dump(mode="json")
    tree["run"]["dir"] = f"runs/pretrain_{model.name}"
    tree["optimizer"]["lr"] = lr
    tree["schedule"]["warmup_steps"] = warmup
    tree["train"]["max_steps"] = steps
    return build(PretrainConfig, tree, where=f"the run of {model.name}"), rule, warnings


def _rate(base: PretrainConfig, model: ModelConfig, rate: float | None) -> tuple[float, str, list[str]]:
    """Learning rate, where it comes from, and warnings."""
    if rate is not None:
        return rate, "given", []
    own = base.optimizer.lr
    if model.parametrisation == "mup":
        return own, f"that of {base.model.name}, which muP holds at every width", []
    if model.embed_dim == base.model.embed_dim:
        return own, f"that of {base.model.name}", []
    if model.name in _presets("pretrain"):
        shipped = load(PretrainConfig, find_preset("pretrain", model.name))
        return shipped.optimizer.lr, f"that of configs/pretrain/{model.name}.yaml", []
    warning = (
        f"lr {own:g} is that of {base.model.name} (width {base.model.embed_dim}); in the standard parametrisation the best "
        f"rate falls with width ({model.embed_dim} here): give --lr, or model.parametrisation=mup"
    )
    return own, f"that of {base.model.name}, not tuned at this width", [warning]


def _presets(kind: str) -> list[str]:
    return sorted(path.stem for path in (presets_root() / kind).glob("*.yaml"))


def _alike(model: ModelConfig, shipped: ModelConfig) -> bool:
    """Whether both have the same parameters and FLOPs, however they are set up and computed."""
    return shipped.model_copy(update={name: getattr(model, name) for name in _NOT_ITS_SIZE}) == model


def _spoken(count: int) -> str:
    """A number of parameters in three digits, such as 316M."""
    rounded = float(f"{count:.3g}")
    unit, size = next(((unit, size) for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if rounded >= size), ("", 1.0))
    return f"{rounded / size:g}{unit}"
