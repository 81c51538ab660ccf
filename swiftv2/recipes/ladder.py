"""What the runs of a ladder cost before any of them is queued: by machines that are known, or by what was measured."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swiftv2.config.ladder import Facts, LadderConfig, Rung, Variant
from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.plan.calibration import forecast_interval
from swiftv2.plan.machines import gpu as find_gpu
from swiftv2.plan.machines import machine_of
from swiftv2.plan.network import Job
from swiftv2.plan.run import BACKWARD, MFU, check_machine, recomputed_flops, traffic
from swiftv2.recipes.branch import compared
from swiftv2.recipes.holdings import Counter, Holdings, Reading, unfinished
from swiftv2.records import METRICS, read_metrics

MANY_EPOCHS = 4.0
"""Passes over the data up to which they are worth almost as much as new ones, for language (Muennighoff et al., 2023)."""
_NAMED = 3


@dataclass(frozen=True)
class Line:
    """What is told of an element before it runs."""

    name: str
    role: str
    """run, trunk (only there for its branches) or branch."""
    size: str
    done: bool
    parameters: int
    """Of the encoder."""
    decoder_parameters: int
    tokens: int
    """Of all patches, seen in training from its very beginning."""
    brain_tokens: int | None
    """Of patches that hold brain; None without a store, as with the following two."""
    unique_tokens: int | None
    """Of all patches, in the training split."""
    epochs: float | None
    steps: int
    own_steps: int
    """Steps that the element does itself: a branch only its cooldown."""
    flops: int
    """Of training from its very beginning, forward and backward, stage by stage."""
    own_flops: int
    learning_rate: float
    nodes: int
    hours: float | None
    """Of its own steps; None where nothing tells how fast they go."""
    node_hours: float | None
    basis: str | None
    """What tells how fast they go, in words."""


@dataclass(frozen=True)
class Pace:
    """What costs are planned by, in the place of what was measured.

    Attributes:
        flops_per_second: of a node, forward and backward of the model's own products, as the user measured it.
        gpu: of the planner's machines.
        mfu: share of the GPU's peak that passes are assumed to reach.
    """

    flops_per_second: float | None = None
    gpu: str | None = None
    mfu: float = MFU

    def check(self) -> None:
        """Refuse what is no pace.

        Raises:
            UsageError: a number is out of range, or the GPU is not known.
        """
        if self.flops_per_second is not None and not 0 < self.flops_per_second < math.inf:
            raise UsageError(f"--flops-per-second {self.flops_per_second:g}: give what a node does, such as 2e13")
        if not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu {self.mfu:g} is no share of the peak: give a number above 0 and up to 1, such as {MFU}")
        if self.gpu is not None:
            find_gpu(self.gpu)


@dataclass(frozen=True)
class LadderPlan:
    """A ladder before it is queued."""

    rungs: tuple[Rung, ...]
    lines: tuple[Line, ...]
    window: str
    """Where the voxels of a clip come from, in words."""
    warnings: tuple[str, ...]

    @property
    def node_hours(self) -> float | None:
        """Of what is not finished yet; None where that is not known of all of it."""
        hours = [line.node_hours for line in self.lines if not line.done]
        return None if None in hours else sum(hour for hour in hours if hour is not None)


class _Speed(NamedTuple):
    """Clips a second of a run, and what tells so."""

    clips: float
    basis: str


class _Measured(NamedTuple):
    """How fast a finished run went: FLOP/s of a node, forward and backward of the model's own products."""

    size: str
    flops_per_clip: int
    flops_per_second: float


def plan_ladder(ladder: LadderConfig, words: Sequence[str] = (), pace: Pace | None = None) -> LadderPlan:
    """Plan all elements of a ladder.

    Args:
        ladder: the ladder.
        words: `section.key=value` words for all elements.
        pace: what costs are planned by; else finished elements of this ladder, else the GPU that it names.

    Raises:
        UsageError: a configuration, a word, a budget or the GPU is wrong.
        SwiftError: the store is there and cannot be opened.
    """
    ladder.check_words(words)
    given, counter = pace or Pace(), Counter()
    given.check()
    configs = {variant.stem: _configuration(ladder, variant, words) for variant in ladder.variants()}
    held = {stem: counter.hold(config) for stem, config in configs.items()}

    def facts(variant: Variant) -> Facts:
        own = held[variant.stem]
        batch = configs[variant.stem].train.global_batch
        return Facts(own.parameters, own.tokens_per_clip, own.brain_tokens_per_clip, own.training_flops, batch)

    rungs = ladder.rungs(facts)
    for rung in rungs:
        _check_begun(ladder, rung, words)
    read = {stem: counter.read(one) if one.data.store.is_dir() else None for stem, one in configs.items()}
    measured = _measure(ladder, rungs, held)
    lines = []
    for rung in rungs:
        stem = rung.variant.stem
        nodes = rung.variant.size.nodes or ladder.nodes or 1
        speed = _speed(given, ladder.gpu, measured, rung.variant.size.name, configs[stem], held[stem], nodes)
        done = unfinished(ladder.folder / rung.name) is None
        lines.append(_line(rung, configs[stem].train.global_batch, held[stem], read[stem], nodes, speed, done=done))
    return LadderPlan(rungs, tuple(lines), next(iter(held.values())).window, _warnings(lines))


def _configuration(ladder: LadderConfig, variant: Variant, words: Sequence[str]) -> PretrainConfig:
    # The size alone counts here: steps and rate are made from what it holds.
    path = find_preset("pretrain", ladder.config)
    try:
        return load(PretrainConfig, path, (*ladder.common, *variant.words, *words))
    except UsageError as error:
        raise UsageError(f"{variant.stem}: {error}") from error


def _check_begun(ladder: LadderConfig, rung: Rung, words: Sequence[str]) -> None:
    """Make sure that an element that has begun is what the ladder now says that it is.

    Raises:
        UsageError: it was made with other settings, of which the first is named.
    """
    path = ladder.folder / rung.name / "config.yaml"
    if not path.is_file():
        return
    now = load(PretrainConfig, find_preset("pretrain", ladder.config), (*ladder.common, *rung.words, *words))
    was = load(PretrainConfig, path)
    done = unfinished(path.parent) is None
    mine, theirs = (_trained(config, ends=done or now.schedule.kind == "cosine") for config in (now, was))
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise UsageError(
                f"element {rung.name} was begun with {key}={theirs.get(key)}, and the ladder now says {value}: "
                "put the ladder back, or give it another folder"
            )
    missing = sorted(set(now.train.keep_steps) - set(was.train.keep_steps))
    if missing and done:
        raise UsageError(
            f"element {rung.name} is done and has kept no checkpoint of step {missing[0]}, from which a branch is to begin: "
            "give the ladder another folder"
        )


def _trained(config: PretrainConfig, *, ends: bool) -> dict[str, Any]:
    """What is learned, from what, and where it ends: a constant rate may go on for longer."""
    schedule = {f"schedule.{name}": value for name, value in config.schedule.model_dump(mode="json").items()}
    return dict(compared(config)) | schedule | ({"train.max_steps": config.train.max_steps} if ends else {})


def _line(
    rung: Rung, batch: int, held: Holdings, read: Reading | None, nodes: int, speed: _Speed | None, *, done: bool
) -> Line:
    clips, own_clips = rung.steps * batch, (rung.steps - rung.start) * batch
    brain = held.brain_tokens_per_clip
    hours = own_clips / speed.clips / 3600 if speed is not None else None
    return Line(
        name=rung.name,
        role=rung.role,
        size=rung.variant.size.name,
        done=done,
        parameters=held.parameters,
        decoder_parameters=held.decoder_parameters,
        tokens=clips * held.tokens_per_clip,
        brain_tokens=None if brain is None else clips * brain,
        unique_tokens=None if read is None else read.unique_tokens,
        epochs=None if read is None else clips * held.tokens_per_clip / read.unique_tokens,
        steps=rung.steps,
        own_steps=rung.steps - rung.start,
        flops=clips * held.training_flops,
        own_flops=own_clips * held.training_flops,
        learning_rate=rung.rate,
        nodes=nodes,
        hours=hours,
        node_hours=None if hours is None else hours * nodes,
        basis=None if speed is None else speed.basis,
    )


def _speed(
    pace: Pace,
    named: str | None,
    measured: Sequence[_Measured],
    size: str,
    config: PretrainConfig,
    held: Holdings,
    nodes: int,
) -> _Speed | None:
    """How fast a run goes; `named` is the ladder's GPU."""
    if pace.flops_per_second is not None:
        return _Speed(
            pace.flops_per_second * nodes / held.training_flops, f"{pace.flops_per_second:.3g} FLOP/s a node, as given"
        )
    if pace.gpu is None and measured:
        same = [one for one in measured if one.size == size]
        # Narrow models reach less of a machine than wide ones: the nearest in cost tells most.
        near = min(abs(math.log(one.flops_per_clip / held.training_flops)) for one in same or measured)
        chosen = [one for one in same or measured if abs(math.log(one.flops_per_clip / held.training_flops)) <= near]
        rate = statistics.median(one.flops_per_second for one in chosen)
        what = f"{rate:.3g} FLOP/s a node, measured on finished runs of {chosen[0].size}"
        return _Speed(rate * nodes / held.training_flops, what)
    gpu = pace.gpu or named
    return None if gpu is None else _forecast(config, held, nodes, gpu, pace.mfu)


def _forecast(config: PretrainConfig, held: Holdings, nodes: int, gpu: str, mfu: float) -> _Speed:
    """Of the planner, without its memory: the same passes, peak and network."""
    found, machine = find_gpu(gpu), machine_of(gpu)
    _, micro_batch, accumulation = check_machine(config, nodes, gpu)
    peak = found.peak_bf16_flops if config.engine.precision == "bf16" else found.peak_fp32_flops
    flops = (1 + BACKWARD) * held.forward_flops["total"] + recomputed_flops(config, held.forward_flops)
    sent = traffic(config.engine, held.parameters + held.decoder_parameters)
    job = Job(flops / (mfu * peak), micro_batch, sent, overlap=1.0 if config.engine.overlap_comm else 0.0)
    point = forecast_interval(job, machine, [nodes], accumulation=accumulation)[0].likely
    return _Speed(point.clips_per_second, f"{gpu} at an assumed {mfu:.0%} of its peak (docs/planning.md)")


def _measure(ladder: LadderConfig, rungs: Sequence[Rung], held: Mapping[str, Holdings]) -> list[_Measured]:
    found = []
    for rung in rungs:
        run_dir: Path = ladder.folder / rung.name
        if unfinished(run_dir) is not None:
            continue
        rates = [row["clips_per_second"] for row in read_metrics(run_dir / METRICS) if row.get("clips_per_second")]
        if rates:
            cost = held[rung.variant.stem].training_flops
            nodes = rung.variant.size.nodes or ladder.nodes or 1
            found.append(_Measured(rung.variant.size.name, cost, statistics.median(rates) * cost / nodes))
    return found


def _warnings(lines: Sequence[Line]) -> tuple[str, ...]:
    over = sorted((line for line in lines if (line.epochs or 0.0) > MANY_EPOCHS), key=lambda line: -(line.epochs or 0.0))
    if not over:
        return ()
    named = ", ".join(f"{line.name} {line.epochs:.1f}" for line in over[:_NAMED])
    many = f"{len(over)} elements go over their data more than {MANY_EPOCHS:g} times ({named}{', ...' * (len(over) > _NAMED)})"
    return (f"{many}: repeated data teach less, and a law that takes them for new ones is wrong",)
