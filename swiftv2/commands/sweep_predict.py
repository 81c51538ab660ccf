"""The verb `sweep predict`: what a fitted law advises for a budget, and the configuration that would train it."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.load import dump, find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, add_json, answer, table

if TYPE_CHECKING:
    from swiftv2.plan.machines import Machine
    from swiftv2.recipes.placing import Place
    from swiftv2.recipes.sizing import Family, Size
    from swiftv2.scaling.predict import Cost, Fit, Optimum, Reach

FEW_EPOCHS = 4
"""Passes over the data up to which repeated tokens are worth nearly as much as new ones (arXiv 2305.16264)."""
_ROUNDS = 3
_WIDEST = 1 << 15


def add(verbs: Any) -> None:
    """The verb `predict`."""
    text = (
        "tell what a fitted law advises for a budget: the compute-optimal size and tokens, the loss, each with its interval, "
        "the next size of a family, its learning rate, nodes and hours, and the configuration that would train it. What is "
        "too far beyond the fitted runs is refused unless --beyond is given (docs/scaling_predict.md)."
    )
    examples = (
        "swiftv2 sweep predict laws/family/fit.json --budget 1e21 --out laws/next",
        "swiftv2 sweep predict laws/family/fit.json --budget 1e21 --machine perlmutter-a100-80 --hours 48 --json",
        "swiftv2 sweep predict laws/family/fit.json --nodes 64 --hours 24 --machine h200 model.parametrisation=mup",
        "swiftv2 sweep predict laws/tiny/fit.json --parameters 2.1e6 --tokens 4e8 --base demo",
    )
    parser = add_command(verbs, "predict", _predict, text, examples)
    add_json(parser)
    parser.add_argument("fit", type=Path, metavar="FIT.json", help="what `swiftv2 sweep fit --out` wrote")
    words = "words that change single settings of the base, such as data.store=PATH"
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=words)
    parser.add_argument("--budget", type=float, metavar="FLOPS", help="FLOPs of the whole training, such as 1e21")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes; with --hours and --machine, instead of --budget")
    parser.add_argument("--hours", type=float, metavar="H", help="hours; with --budget, as few nodes as end in that time")
    parser.add_argument("--machine", metavar="NAME", help="machine or GPU, such as perlmutter-a100-80 or h200")
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="share of the GPUs' peak that passes reach; 0.35 is assumed, none measured"
    )
    parser.add_argument(
        "--parameters", type=float, metavar="N", help="with --tokens: the loss of this size, not of the optimum"
    )
    parser.add_argument("--tokens", type=float, metavar="D", help="tokens as the fitted table counts them; with --parameters")
    parser.add_argument("--unique", type=float, metavar="D", help="tokens that there are, to tell how often they are repeated")
    parser.add_argument(
        "--base", default="7M", metavar="PRESET", help="pretraining preset or file whose family is scaled in width; 7M"
    )
    parser.add_argument(
        "--cost",
        choices=("stages", "knd"),
        help="FLOPs by the family's stages, or k N D with the fit's k; by stages where the fitted sizes are of the family",
    )
    parser.add_argument("--lr", type=float, metavar="RATE", help="learning rate; under muP that tuned at the base width")
    parser.add_argument("--beyond", action="store_true", help="tell also what is refused otherwise, with the reasons")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write prediction.json and the configuration there")


@dataclass(frozen=True)
class _Question:
    """A law, a family, and how FLOPs of one are counted for the other."""

    fit: "Fit"
    family: "Family"
    cost: "Cost | None"
    """FLOPs of a token by parameters; None: k N D."""
    arguments: argparse.Namespace

    def best(self, flops: float) -> "Optimum":
        """The optimum of a budget, or what was given instead."""
        from swiftv2.scaling.predict import given, optimum

        if self.arguments.parameters is not None:
            return given(self.fit, self.arguments.parameters, self.arguments.tokens, self.cost)
        least, most = (float(self.family.parameters(width)) for width in (self.family.smallest, _WIDEST))
        return optimum(self.fit, flops, self.cost, (least, most))

    def sizes(self, found: "Optimum") -> list["Size"]:
        """Widths around it, the one to take first."""
        import numpy as np

        from swiftv2.recipes.sizing import near
        from swiftv2.scaling.predict import law

        def tokens(parameters: float) -> float:
            if self.arguments.parameters is not None:
                return found.tokens.value
            token = self.fit.k * parameters if self.cost is None else float(self.cost(np.array(parameters)))
            return found.flops / token

        def loss(parameters: float, seen: float) -> float:
            return float(law(self.fit.constants, parameters, seen))

        return near(self.family, found.parameters.value, tokens, loss, on_gpus=self.arguments.machine is not None)

    def steps(self, size: "Size", flops: float) -> int:
        """Optimizer steps of a size: by the budget, or by its tokens where the law's FLOPs are not those of the family."""
        by_flops = self.cost is None and self.fit.derived
        clips = flops / float(self.family.clip_flops(size.width)) if by_flops else size.tokens / self.family.clip_tokens
        return round(clips / self.family.base.train.global_batch)

    def seen(self, size: "Size", steps: int) -> float:
        """Tokens, as the law counts them, of so many steps."""
        clips = steps * self.family.base.train.global_batch
        if self.cost is None and self.fit.derived:
            return clips * float(self.family.clip_flops(size.width)) / (self.fit.k * size.parameters)
        return clips * self.family.clip_tokens


@dataclass(frozen=True)
class _Answer:
    found: "Optimum"
    far: "Reach"
    sizes: list["Size"]
    config: PretrainConfig
    rule: str
    place: "Place | None"
    warnings: list[str]


def _predict(arguments: argparse.Namespace) -> int:
    from swiftv2.recipes.placing import find_machine
    from swiftv2.recipes.sizing import Family
    from swiftv2.scaling.predict import read_fit

    _check(arguments)
    machine = None if arguments.machine is None else find_machine(arguments.machine)
    fit = read_fit(arguments.fit)
    base = load(PretrainConfig, find_preset("pretrain", arguments.base), arguments.overrides)
    family = Family(base, brain=fit.columns.tokens == "brain_tokens")
    cost, warnings = _cost(fit, family, arguments)
    question = _Question(fit, family, cost, arguments)
    by_time = arguments.budget is None and arguments.parameters is None
    made = _by_time(question, machine) if by_time and machine is not None else _by_flops(question, machine)
    made = replace(made, warnings=[*warnings, *made.warnings])
    tree = _tree(question, made, machine)
    if arguments.out is not None:
        _write(arguments.out, tree, made.config)
    answer(tree, *_lines(tree, made), as_json=arguments.json)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that say the budget twice, or not at all."""
    given = arguments.parameters is not None or arguments.tokens is not None
    timed = arguments.nodes is not None and arguments.hours is not None
    if given and (arguments.parameters is None or arguments.tokens is None):
        raise UsageError("the loss of one run: give both --parameters N and --tokens D")
    if given and arguments.budget is not None:
        raise UsageError("give --budget, or --parameters with --tokens, not both")
    if arguments.machine is None and (arguments.nodes is not None or arguments.hours is not None):
        raise UsageError("--nodes and --hours are those of a machine: give --machine NAME, too")
    if not given and arguments.budget is None and not timed:
        raise UsageError("no budget: give --budget FLOPS, or --nodes N --hours H --machine NAME")
    if timed and (given or arguments.budget is not None):
        raise UsageError("--nodes and --hours together are a budget of their own: leave one out, or the other budget")
    _check_numbers(arguments)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out}: a file is there; give a folder")


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing."""
    for name in ("budget", "hours", "lr", "mfu", "unique"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value:g}: give a positive number")
    if arguments.nodes is not None and arguments.nodes < 1:
        raise UsageError(f"--nodes {arguments.nodes}: give 1 or more")
    if arguments.mfu is not None and arguments.mfu > 1:
        raise UsageError(f"--mfu {arguments.mfu:g} is no share of the peak: give a number above 0 and up to 1, such as 0.35")


def _cost(fit: "Fit", family: "Family", arguments: argparse.Namespace) -> tuple["Cost | None", list[str]]:
    """How FLOPs are counted for the law, and what is to be said of it."""
    belongs = all(family.holds(point.parameters) for point in fit.points)
    warnings = []
    if not belongs:
        warnings.append(
            f"the fitted sizes are none of the family of --base {arguments.base}: law and configuration belong together only "
            "where they are"
        )
    if arguments.cost == "stages" and fit.derived:
        raise UsageError(
            "--cost stages: the fit's tokens are FLOPs / (k N) and not counted; fit with --tokens for a law of real tokens"
        )
    if arguments.cost == "stages" or (arguments.cost is None and belongs and not fit.derived):
        return family.token_flops, warnings
    warnings.append(f"the law's optimum is that of C = {fit.k:.3g} N D, which does not hold for hierarchical models")
    return None, warnings


def _by_flops(question: _Question, machine: "Machine | None") -> _Answer:
    """For a budget of FLOPs, or for a size and tokens."""
    from swiftv2.recipes.placing import place
    from swiftv2.recipes.sizing import configure

    arguments = question.arguments
    found, far, warnings = _advised(question, arguments.budget)
    sizes = question.sizes(found)
    steps = question.steps(sizes[0], found.flops)
    config, rule, said = configure(question.family, sizes[0].width, steps, arguments.lr)
    placed = None
    if machine is not None:
        placed = place(config, machine, _mfu(arguments), nodes=arguments.nodes, hours=arguments.hours)
        config = placed.config
    return _Answer(found, far, sizes, config, rule, placed, [*warnings, *said])


def _by_time(question: _Question, machine: "Machine") -> _Answer:
    """For nodes and hours: their FLOPs depend on the size, so the size is chosen anew by what the last one reached."""
    from swiftv2.recipes.placing import place
    from swiftv2.recipes.sizing import configure

    arguments = question.arguments
    gpu, mfu = machine.gpu, _mfu(arguments)
    peak = gpu.peak_bf16_flops if question.family.base.engine.precision == "bf16" else gpu.peak_fp32_flops
    flops = arguments.nodes * machine.gpus_per_node * peak * mfu * arguments.hours * 3600
    places: dict[int, Place] = {}
    for _ in range(_ROUNDS):
        found, far, warnings = _advised(question, flops)
        sizes = question.sizes(found)
        width = sizes[0].width
        if width in places:
            break
        trial = configure(question.family, width, question.steps(sizes[0], flops), arguments.lr)[0]
        places[width] = place(trial, machine, mfu, nodes=arguments.nodes)
        clips = places[width].affords(arguments.hours) * trial.train.global_batch
        flops = clips * float(question.family.clip_flops(width))
    config, rule, said = configure(question.family, width, places[width].affords(arguments.hours), arguments.lr)
    return _Answer(found, far, sizes, places[width].lasting(config), rule, places[width], [*warnings, *said])


def _advised(question: _Question, flops: float) -> tuple["Optimum", "Reach", list[str]]:
    """The optimum, how far it is, and warnings.

    Raises:
        UsageError: something speaks against saying it, and --beyond was not given.
    """
    from swiftv2.scaling.predict import judge, reach

    found = question.best(flops)
    far = reach(question.fit, found.flops, question.cost)
    warnings, refusals = judge(question.fit, found, far)
    if refusals and not question.arguments.beyond:
        more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
        raise UsageError(f"{question.arguments.fit}: {refusals[0]}{more}; --beyond tells it all the same")
    if found.parameters.value <= float(question.family.parameters(question.family.smallest)):
        warnings.append(f"the optimum is no larger than the family's least width, {question.family.smallest}")
    return found, far, [*refusals, *warnings]


def _mfu(arguments: argparse.Namespace) -> float:
    from swiftv2.plan.run import MFU

    return MFU if arguments.mfu is None else float(arguments.mfu)


def _tree(question: _Question, made: _Answer, machine: "Machine | None") -> dict[str, Any]:
    """The answer as plain values."""
    fit, arguments, config, found = question.fit, question.arguments, made.config, made.found
    steps, warnings = config.train.max_steps, [*made.warnings]
    run = _run(question, made)
    if not 0.9 < run["flops"] / found.flops < 1.1:
        warnings.append(f"by stages the run takes {run['flops']:.3g} FLOPs, not {found.flops:.3g}")
    if run["epochs"] is not None and run["epochs"] > FEW_EPOCHS:
        unique = f"{arguments.unique:.3g} unique tokens"
        warnings.append(f"{run['epochs']:.1f} passes over {unique}: the law takes all of them for new ones")
    place, sure = made.place, arguments.parameters is None
    likely, fast, slow = (None, None, None) if place is None else place.hours(steps)
    clips = steps * config.train.global_batch
    return {
        "budget": {
            "flops": found.flops,
            "node_hours": None if place is None or likely is None else place.nodes * likely,
        },
        "cost": f"{fit.k:g} N D" if question.cost is None else f"stages of {arguments.base}",
        "parameters": found.parameters.value,
        "parameters_interval": list(found.parameters[1:]) if sure else None,
        "tokens": found.tokens.value,
        "tokens_interval": list(found.tokens[1:]) if sure else None,
        "loss": found.loss.value,
        "loss_interval": list(found.loss[1:]),
        "level": fit.level,
        "lr": config.optimizer.lr,
        "lr_rule": made.rule,
        "nodes": None if place is None else place.nodes,
        "hours": likely,
        "hours_interval": None if place is None or place.nodes == 1 else [fast, slow],
        "mfu_assumed": None if place is None else _mfu(arguments),
        "machine": None if machine is None else machine.name,
        "size": config.model.name,
        "embed_dim": config.model.embed_dim,
        "run": run,
        "sizes": [{**vars(one), "loss_given_up": one.loss - found.loss.value} for one in made.sizes],
        "flops_by_stage": {part: clips * count for part, count in question.family.flops(made.sizes[0].width).items()},
        "extrapolation": {"factor": made.far.factor, "verdict": made.far.verdict},
        "config": None if arguments.out is None else str(arguments.out / f"{config.model.name}.yaml"),
        "warnings": warnings,
    }


def _run(question: _Question, made: _Answer) -> dict[str, Any]:
    """The run that is advised."""
    from swiftv2.scaling.predict import loss_of, repeated_loss

    train, unique = made.config.train, question.arguments.unique
    size, held = made.sizes[0], question.family.holdings(made.sizes[0].width)
    tokens, clips = question.seen(size, train.max_steps), train.max_steps * train.global_batch
    loss = loss_of(question.fit, held.parameters, tokens)
    return {
        "parameters": held.parameters,
        "decoder_parameters": held.decoder_parameters,
        "tokens": tokens,
        "patches": clips * question.family.patches,
        "epochs": None if unique is None else tokens / unique,
        "loss_repeated": None if unique is None else repeated_loss(question.fit, held.parameters, tokens, unique),
        "steps": train.max_steps,
        "global_batch": train.global_batch,
        "micro_batch": train.micro_batch,
        "gpu_memory_bytes": None if made.place is None else made.place.memory_bytes,
        "flops": clips * held.training_flops,
        "loss": loss.value,
        "loss_interval": list(loss[1:]),
        "loss_given_up": loss.value - made.found.loss.value,
    }


def _write(folder: Path, tree: dict[str, Any], config: PretrainConfig) -> None:
    from swiftv2.files import write_file

    said = json.dumps(tree, indent=1, allow_nan=False)
    head = f"# {tree['size']}, as `swiftv2 sweep predict` advised for {tree['budget']['flops']:.3g} FLOPs.\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(Path(tree["config"]), head + dump(config))
    write_file(folder / "prediction.json", said + "\n")


def _lines(tree: dict[str, Any], made: _Answer) -> Sequence[Any]:
    """What is printed."""

    def between(name: str, pattern: str) -> str:
        ends = tree[f"{name}_interval"]
        return f"{tree[name]:{pattern}}" + (f" ({ends[0]:{pattern}} to {ends[1]:{pattern}})" if ends else "")

    run, far = tree["run"], tree["extrapolation"]
    head = (
        f"{tree['budget']['flops']:.3g} FLOPs ({tree['cost']}), {far['factor']:.3g} times those of the largest run fitted: "
        f"{far['verdict']}\n"
        f"parameters {between('parameters', '.3g')}, tokens {between('tokens', '.3g')}, loss {between('loss', '.4g')}; "
        f"intervals of {tree['level']:.0%}, that of the loss with run-to-run noise\n"
    )
    size = (
        f"\n{tree['size']}: embed_dim {tree['embed_dim']}, {run['parameters']:,} encoder and {run['decoder_parameters']:,} "
        f"decoder parameters, {run['steps']:,} steps of {run['global_batch']} clips, {run['patches']:.3g} patches, "
        f"{run['flops']:.3g} FLOPs, loss {run['loss']:.4g}; learning rate {tree['lr']:g} ({tree['lr_rule']})"
    )
    rows = [
        [
            str(one.width),
            f"{one.parameters:.4g}",
            f"{one.tokens:.3g}",
            f"{one.loss:.5g}",
            f"{one.loss - made.found.loss.value:.2g}",
        ]
        for one in sorted(made.sizes, key=lambda one: one.width)
    ]
    lines: list[Any] = [head, table(["embed_dim", "parameters", "tokens", "loss", "given up"], rows, words=0), size]
    if tree["hours"] is not None:
        lines.append(
            f"on {tree['nodes']} node{'s' * (tree['nodes'] > 1)} of {tree['machine']}: {between('hours', ',.3g')} h, "
            f"{tree['budget']['node_hours']:,.4g} node-hours, at an assumed {tree['mfu_assumed']:.0%} of the peak; "
            "evaluation, saves and interruptions not counted"
        )
    if tree["config"] is not None:
        lines.append(f"configuration: {tree['config']}")
    return [*lines, *(f"warning: {one}" for one in tree["warnings"])]
