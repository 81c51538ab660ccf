"""The command that tells what a model, or a whole run, costs."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.load import build, load, load_model, override
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, add_json, answer, table

if TYPE_CHECKING:
    from rich.table import Table

    from swiftv2.plan import ModelPlan, RunPlan

OVERRIDES = "words that change single settings of the file, such as train.max_steps=1000; an unknown key is refused"
GB = 1e9


def add(nouns: Any) -> None:
    """The command `plan`."""
    text = (
        "tell parameters and FLOPs of a model, by stage; with --nodes and --gpu also memory, time, throughput and scaling of "
        "a run. Nothing is allocated and no GPU taken. Time and scaling rest on assumptions that are printed with them "
        "(docs/planning.md)."
    )
    examples = (
        "swiftv2 plan --model 806M",
        "swiftv2 plan --model 806M model.frames=40",
        "swiftv2 plan configs/pretrain/806M.yaml --nodes 16 --gpu a100-80",
        "swiftv2 plan configs/pretrain/3.2B.yaml --nodes 64 --gpu a100-40 --tokens 1e11 model.checkpoint_stages=[0,1] --json",
    )
    parser = add_command(nouns, "plan", _plan, text, examples)
    add_json(parser)
    parser.add_argument("--model", metavar="NAME", help="preset of configs/model, such as 806M, or a YAML file")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the machine; with --gpu the whole run is planned")
    parser.add_argument("--gpu", metavar="NAME", help="a100-40, a100-80, h200, mi250x-gcd or max1550-tile; needs --nodes")
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="share of the GPU's peak that passes reach; 0.35 is assumed, none measured"
    )
    parser.add_argument(
        "--tokens", type=float, metavar="X", help="stage-1 tokens after which the run ends, instead of train.max_steps"
    )
    parser.add_argument("config", nargs="?", help="a pretraining configuration, instead of --model")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDES)


def _plan(arguments: argparse.Namespace) -> int:
    words = [word for word in [arguments.config, *arguments.overrides] if word is not None]
    if arguments.model is None and (not words or "=" in words[0]):
        raise UsageError("plan needs --model NAME or a pretraining configuration (`swiftv2 plan --help` explains)")
    of_a_run = [name for name in ("nodes", "gpu", "mfu", "tokens") if getattr(arguments, name) is not None]
    if not of_a_run:
        model = _model(arguments.model, words) if arguments.model else load(PretrainConfig, Path(words[0]), words[1:]).model
        return _tell_model(model, arguments.json)
    if arguments.model is not None:
        raise UsageError(f"--{of_a_run[0]} plans a run: give a pretraining configuration instead of --model")
    if arguments.nodes is None or arguments.gpu is None:
        raise UsageError("a run is planned for a machine: give both --nodes N and --gpu NAME")
    return _tell_run(load(PretrainConfig, Path(words[0]), words[1:]), arguments)


def _model(name: str, words: Sequence[str]) -> ModelConfig:
    tree: dict[str, Any] = {"model": load_model(name).model_dump(mode="json")}
    for word in words:
        if not word.startswith("model."):
            raise UsageError(f"{word!r}: beside --model only model.KEY=VALUE words count; give --model or a configuration")
        override(tree, word)
    return build(ModelConfig, tree["model"], where=name)


def _tell_model(model: ModelConfig, as_json: bool) -> int:
    from swiftv2.plan import plan_model

    plan = plan_model(model)
    clip = " x ".join(map(str, (*model.image_size, model.frames)))
    head = f"{plan.model}: one forward pass of a clip of {clip} (one multiply-add is 2 FLOPs)\n"
    answer(plan.to_dict(), head, _parts(plan), as_json=as_json)
    return 0


def _parts(plan: "ModelPlan", computed: Mapping[str, int] | None = None) -> "Table":
    """Parameters and FLOPs by part of the model."""
    flops = plan.forward_flops_per_clip
    sizes = {"encoder": plan.encoder_parameters, "decoder": plan.decoder_parameters}
    sizes["total"] = sum(sizes.values())
    titles, rows = ["part", "parameters", "GFLOP", "share"], []
    for part, count in flops.items():
        row = [part, f"{sizes[part]:,}" if part in sizes else "", f"{count / 1e9:,.3f}", f"{count / flops['total']:.1%}"]
        rows.append(row if computed is None else [*row, f"{computed[part] / 1e9:,.3f}"])
    return table(titles if computed is None else [*titles, "GFLOP done"], rows)


def _tell_run(config: PretrainConfig, arguments: argparse.Namespace) -> int:
    from swiftv2.plan.run import MFU
    from swiftv2.recipes.planning import plan

    mfu = MFU if arguments.mfu is None else arguments.mfu
    made = plan(config, nodes=arguments.nodes, gpu=arguments.gpu, mfu=mfu, tokens=arguments.tokens)
    answer(made.to_dict(), *_run_parts(made), as_json=arguments.json)
    return 0


def _run_parts(plan: "RunPlan") -> list["str | Table"]:
    """What is printed of a run."""
    engine = "plain" if plan.backend == "plain" else f"ZeRO {plan.zero_stage}"
    batch = f"global batch {plan.global_batch} = {plan.ranks} ranks x micro-batch {plan.micro_batch} x {plan.accumulation}"
    head = f"{plan.model.model} on {plan.nodes} nodes of {plan.machine}, {engine}, {plan.precision}: {batch}"
    return [
        head,
        f"Voxels of a clip: {plan.window}.\n",
        _verdict(plan) + "\n",
        _memory(plan),
        f"\n{_most(plan)}",
        "\nOne clip, forward:\n",
        _parts(plan.model, plan.computed_flops_per_clip),
        "\nOne optimizer step:\n",
        _communication(plan),
        f"\nTime, at an assumed {plan.assumed_mfu:.0%} of the GPU's peak in the passes; no GPU measured it:\n",
        _time(plan),
        f"\n{_budget(plan)}\n",
        *_scaling("Weak scaling (the batch grows with the nodes)", plan.weak),
        *_scaling("Strong scaling (the same global batch)", plan.strong),
    ]


def _verdict(plan: "RunPlan") -> str:
    need, have = plan.memory.total / GB, plan.memory_bytes / GB
    if plan.fits:
        return f"FITS: {need:,.1f} GB of {have:,.1f} GB on each GPU."
    what = f"it would with {', or '.join(plan.remedies)}" if plan.remedies else "no single change of those tried makes it fit"
    return f"DOES NOT FIT: {need:,.1f} GB needed, {have:,.1f} GB there, short by {need - have:,.1f} GB; {what}."


def _memory(plan: "RunPlan") -> "Table":
    """GB of a rank at its peak: as configured, and by ZeRO stage."""
    kinds = list(plan.memory.parts)
    rows = [["as configured", *(f"{size / GB:,.2f}" for size in plan.memory.parts.values()), _yes(plan.fits), ""]]
    for name, stage in plan.stages.items():
        title = f"ZeRO {name}" if stage.backend == "deepspeed" else "nothing partitioned (plain)"
        sizes = [f"{size / GB:,.2f}" for size in stage.memory.parts.values()]
        rows.append([title, *sizes, _yes(stage.fits), str(stage.largest_micro_batch)])
    return table(["GB a rank", *kinds, "fits", "largest micro-batch"], rows)


def _most(plan: "RunPlan") -> str:
    """The most of each kind, which need not be there at the peak."""
    told = ", ".join(f"{kind} {size / GB:,.2f}" for kind, size in plan.memory.most.items())
    return f"The table holds the moment of the peak. The most of each kind at any time, as configured, in GB: {told}."


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _communication(plan: "RunPlan") -> "Table":
    rows = []
    for name, stage in plan.stages.items():
        title = f"ZeRO {name}" if stage.backend == "deepspeed" else "nothing partitioned (plain)"
        sizes = (stage.gradient_bytes, stage.weight_bytes, stage.sent_bytes)
        rows.append([title, *(f"{size / GB:,.2f}" for size in sizes)])
    return table(["GB", "gradients summed", "weights gathered", "sent by a rank"], rows)


def _time(plan: "RunPlan") -> "Table":
    rows = []
    for name, point in plan.points.items():
        step, waiting = point["step_seconds"], point["communication_seconds"]
        rows.append([name, f"{step:,.2f}", f"{waiting:,.2f}", f"{point['clips_per_second']:,.1f}", f"{point['mfu']:.1%}"])
    return table(["network", "s a step", "s communicating", "clips/s", "MFU"], rows)


def _budget(plan: "RunPlan") -> str:
    told = plan.budget
    parts = [f"{told['steps']:,.0f} steps, {told['clips']:,.0f} clips, {told['tokens']:.3g} stage-1 tokens"]
    for kind, unit, digits in (("days", "days", 2), ("node_hours", "node-hours", 0)):
        likely, fast, slow = (f"{told[f'{kind}_{name}']:,.{digits}f}" for name in ("likely", "fast", "slow"))
        parts.append(f"{likely} {unit} ({fast} to {slow})")
    return ", ".join(parts) + "; evaluation, saves and interruptions not counted."


def _scaling(title: str, points: Sequence[Mapping[str, float]]) -> list["str | Table"]:
    if not points:
        return [f"{title}: the global batch cannot be split over one node, with which others are compared.\n"]
    rows = []
    for p in points:
        between = f"{p['efficiency_slow']:.0%} to {p['efficiency_fast']:.0%}"
        counts = [f"{p[key]:,.0f}" for key in ("nodes", "ranks", "global_batch")]
        rows.append([*counts, f"{p['step_seconds']:,.2f}", f"{p['clips_per_second']:,.1f}", f"{p['efficiency']:.0%}", between])
    heads = ["nodes", "ranks", "global batch", "s a step", "clips/s", "efficiency", "between"]
    return [f"{title}:\n", table(heads, rows), ""]
