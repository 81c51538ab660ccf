"""Sizes of a model's family: what a width holds and costs, the run that trains it, and the nodes and hours that it takes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftv2.config.load import build, find_preset, load, load_model, override, presets_root
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.models.flops import forward_flops
from swiftv2.models.geometry import patches_with_brain, stage_grids
from swiftv2.plan.machines import Machine, gpu_names, machine, machine_names, machine_of
from swiftv2.plan.memory import Passes
from swiftv2.plan.model import plan_model
from swiftv2.plan.run import BACKWARD, RunPlan, Work, plan_run
from swiftv2.recipes.planning import counted_flops, find_window, layout, passes

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
_SAME = 0.005
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
        return math.prod(stage_grids(self.base.model, (*self.base.model.image_size, self.base.clip.frames))[0])

    @cached_property
    def clip_tokens(self) -> float:
        """Tokens of a clip as the law counts them."""
        if not self.brain:
            return float(self.patches)
        window = find_window(self.base)
        places = patches_with_brain(window.brain[None], self.base.model.patch_size)
        return float(int(places.sum()) * -(-self.base.clip.frames // self.base.model.patch_size[3]))

    def model(self, width: int) -> ModelConfig:
        """The configuration of a width; a shipped model keeps its name, others are called by their parameters."""
        tree = {**self.base.model.model_dump(mode="json"), "embed_dim": width}
        made = build(ModelConfig, tree, where=f"{self.base.model.name} at width {width}")
        name = next((name for name in _presets("model") if _alike(made, load_model(name))), None)
        return made.model_copy(update={"name": name or _spoken(plan_model(made).encoder_parameters)})

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
        """FLOPs of training on one clip by part of the model: the keys of `forward_flops`."""
        model = self.base.model.model_copy(update={"embed_dim": width, "frames": self.base.clip.frames})
        return {part: (1 + BACKWARD) * count for part, count in forward_flops(model).items()}

    @cached_property
    def _polynomials(self) -> tuple[Numbers, Numbers]:
        """Both are quadratic in the width: of products of two widths, of tables and biases, and of what has no width."""
        widths = self.gpu_step * np.array([1, 2, 4])
        counts = [plan_model(self.base.model.model_copy(update={"embed_dim": int(w)})).encoder_parameters for w in widths]
        flops = [self.flops(int(w))["total"] for w in widths]
        return np.polyfit(widths, counts, 2), np.polyfit(widths, flops, 2)


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


def find_machine(name: str) -> Machine:
    """A machine by its name or by that of its GPU.

    Raises:
        UsageError: there is none; the message names those that are.
    """
    if name in machine_names():
        return machine(name)
    if name in gpu_names():
        return machine_of(name)
    raise UsageError(f"no machine is named {name!r}; there are {', '.join([*machine_names(), *gpu_names()])}")


def place(
    config: PretrainConfig, where: Machine, *, nodes: int | None, hours: float | None, mfu: float
) -> tuple[PretrainConfig, RunPlan]:
    """A run on the nodes asked for, or on as few as it fits, in no more hours than are given.

    Micro-batch, ZeRO stage and checkpointing are changed where the run as configured does not fit the memory.

    Returns:
        The run as it fits, and its plan.

    Raises:
        UsageError: it fits nowhere, takes too long everywhere, or cannot be split over the nodes.
    """
    if nodes is not None and not 1 <= nodes <= where.nodes:
        raise UsageError(f"--nodes {nodes}: {where.name} has 1 to {where.nodes} nodes")
    ranks = where.gpus_per_node
    batch = config.train.global_batch
    counts = [n for n in range(1, where.nodes + 1) if batch % (n * ranks) == 0]
    if nodes is not None:
        if nodes not in counts:
            fitting = ", ".join(map(str, counts)) or "none"
            raise UsageError(
                f"train.global_batch={batch} cannot be split over {nodes * ranks} GPUs ({nodes} nodes of {where.name}); "
                f"nodes that work: {fitting}"
            )
        counts = [nodes]
    if not counts:
        raise UsageError(f"train.global_batch={batch} cannot be split over the {ranks} GPUs of a node of {where.name}")
    work, short, slowest = _work(config), math.inf, math.inf
    for count in counts:
        plan = partial(plan_run, work=work, nodes=count, gpu=where.gpu.name, mfu=mfu)
        for changed, made in _fitting(config, plan, count * ranks):
            if not made.fits:
                short = min(short, made.memory.total - made.memory_bytes)
                continue
            taken = hours_of(made, config.train.max_steps)[0]
            if hours is None or taken <= hours:
                return changed, made
            slowest = min(slowest, taken)
            break
    most = f"{counts[-1]} node{'s' if counts[-1] > 1 else ''} of {where.name}"
    if slowest < math.inf:
        raise UsageError(
            f"{config.model.name} takes {slowest:,.1f} h on {most}, the most that train.global_batch={batch} splits over, not "
            f"{hours:g} h: give more hours or a smaller budget"
        )
    raise UsageError(
        f"{config.model.name} does not fit {most}: {short / 1e9:,.1f} GB short on each GPU with one clip at a time and all "
        "stages recomputed; give more nodes, another machine or a smaller budget"
    )


def hours_of(plan: RunPlan, steps: int) -> tuple[float, float, float]:
    """Hours of so many steps of a planned run: likely, with a fast network, with a slow one."""
    rates = (plan.points[name]["clips_per_second"] for name in ("likely", "fast", "slow"))
    likely, fast, slow = (steps * plan.global_batch / rate / 3600 for rate in rates)
    return likely, fast, slow


def affordable(plan: RunPlan, hours: float) -> int:
    """Steps of a planned run that so many hours suffice for."""
    rate: float = plan.points["likely"]["clips_per_second"]
    return math.floor(hours * 3600 * rate / plan.global_batch)


def lasting(config: PretrainConfig, placed: PretrainConfig) -> PretrainConfig:
    """A run with what `place` changed in another one of the same model, which may have other steps."""
    train = config.train.model_copy(update={"micro_batch": placed.train.micro_batch})
    return config.model_copy(update={"model": placed.model, "engine": placed.engine, "train": train})


def _fitting(
    config: PretrainConfig, plan: Callable[[PretrainConfig], RunPlan], ranks: int
) -> Iterator[tuple[PretrainConfig, RunPlan]]:
    """Plans of a run on so many ranks, from the run as configured on to what takes least memory."""
    share = config.train.global_batch // ranks
    most = config.train.micro_batch or share
    first = _with(config, f"train.micro_batch={next(n for n in range(min(most, share), 0, -1) if share % n == 0)}")
    made = plan(first)
    yield first, made
    for word in made.remedies:
        if not word.startswith("--"):
            eased = _with(first, word)
            yield eased, plan(eased)
    stages = list(range(len(config.model.depths)))
    words = ["train.micro_batch=1", f"model.checkpoint_stages={stages}", "model.checkpoint_keep=nothing"]
    if config.engine.backend == "deepspeed":
        words.append("engine.zero_stage=2")
    least = _with(first, *words)
    yield least, plan(least)


def _work(config: PretrainConfig) -> Work:
    """What plans of a run are made from, on any number of nodes: passes are recorded once a model."""
    window = find_window(config)

    @cache
    def of(model: ModelConfig) -> Passes:
        return passes(config.model_copy(update={"model": model}), window)

    flops = counted_flops(config, window)
    return Work(lambda changed: of(changed.model), layout(config), plan_model(config.model), flops, window.source)


def _with(config: PretrainConfig, *words: str) -> PretrainConfig:
    tree: dict[str, Any] = config.model_dump(mode="json")
    for word in words:
        override(tree, word)
    return build(PretrainConfig, tree, where=config.model.name, overrides=words)


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
