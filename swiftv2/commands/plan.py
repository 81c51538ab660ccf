"""The command that tells what a model costs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftv2.config.load import build, load, load_model, override
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, add_json, answer, table

OVERRIDES = "words that change single settings of the file, such as train.max_steps=1000; an unknown key is refused"


def add(nouns: Any) -> None:
    """The command `plan`."""
    text = "tell parameters and FLOPs of a model, by stage. Nothing is allocated and no GPU taken."
    examples = (
        "swiftv2 plan --model 806M",
        "swiftv2 plan --model 806M model.frames=40",
        "swiftv2 plan configs/pretrain/demo.yaml",
    )
    parser = add_command(nouns, "plan", _plan, text, examples)
    add_json(parser)
    parser.add_argument("--model", metavar="NAME", help="preset of configs/model, such as 806M, or a YAML file")
    parser.add_argument("config", nargs="?", help="a pretraining configuration, instead of --model")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDES)


def _plan(arguments: argparse.Namespace) -> int:
    words = [word for word in [arguments.config, *arguments.overrides] if word is not None]
    if arguments.model is None and (not words or "=" in words[0]):
        raise UsageError("plan needs --model NAME or a pretraining configuration (`swiftv2 plan --help` explains)")
    model = _planned(arguments.model, words) if arguments.model else load(PretrainConfig, Path(words[0]), words[1:]).model
    from swiftv2.plan import plan_model

    plan = plan_model(model)
    flops = plan.forward_flops_per_clip
    sizes = {"encoder": plan.encoder_parameters, "decoder": plan.decoder_parameters}
    sizes["total"] = sum(sizes.values())
    rows = [
        [part, f"{sizes[part]:,}" if part in sizes else "", f"{count / 1e9:,.3f}", f"{count / flops['total']:.1%}"]
        for part, count in flops.items()
    ]
    clip = " x ".join(map(str, (*model.image_size, model.frames)))
    head = f"{plan.model}: one forward pass of a clip of {clip} (one multiply-add is 2 FLOPs)\n"
    answer(plan.to_dict(), head, table(["part", "parameters", "GFLOP", "share"], rows), as_json=arguments.json)
    return 0


def _planned(name: str, words: Sequence[str]) -> ModelConfig:
    tree: dict[str, Any] = {"model": load_model(name).model_dump(mode="json")}
    for word in words:
        if not word.startswith("model."):
            raise UsageError(f"{word!r}: beside --model only model.KEY=VALUE words count; give --model or a configuration")
        override(tree, word)
    return build(ModelConfig, tree["model"], where=name)
