"""The command that shows whether activations keep their size as a model grows wider."""

import argparse
import json
from pathlib import Path
from typing import Any

from swiftv2.config.load import build, find_preset, override, read_yaml
from swiftv2.config.model import ModelConfig
from swiftv2.errors import UsageError
from swiftv2.files import write_file
from swiftv2.terminal import add_command, add_json, answer

PATCHES = (4, 4, 4, 2)
"""Patches of the clips on which it is looked: sizes of activations hardly depend on how many there are."""


def add(verbs: Any) -> None:
    """The verb `coordinates` of `sweep`."""
    text = (
        "train a model at several widths for a few steps of Adam on smooth noise, in the standard form and under muP, and show "
        "how large its activations are: under muP they stay, in the standard form they grow with the width. On the CPU."
    )
    examples = (
        "swiftv2 sweep coordinates 7M --out coordinates",
        "swiftv2 sweep coordinates 837M_new --widths 36 72 144 288 --out coordinates model.depths=[2,2,2,2]",
    )
    parser = add_command(verbs, "coordinates", _coordinates, text, examples)
    add_json(parser)
    parser.add_argument("model", help="preset of configs/model, such as 7M, or a YAML file")
    words = "words that change the model, such as model.depths=[2,2]; clips of 4 x 4 x 4 x 2 patches unless they say otherwise"
    parser.add_argument("overrides", nargs="*", metavar="MODEL.KEY=VALUE", help=words)
    parser.add_argument("--widths", type=int, nargs="+", default=[36, 72, 144], metavar="E", help="widths of the first stage")
    parser.add_argument("--steps", type=int, default=4, help="steps of Adam (4)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate, a large one (1e-2)")
    parser.add_argument("--seeds", type=int, default=2, help="first values that are averaged over (2)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write coordinates.json and the plot (SVG and PNG)")


def _coordinates(arguments: argparse.Namespace) -> int:
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out}: a file is there; give a folder")
    path = find_preset("model", arguments.model)
    tree: dict[str, Any] = {"model": read_yaml(path)}
    patch = build(ModelConfig, tree["model"], where=str(path)).patch_size
    tree["model"] |= {
        "image_size": [n * p for n, p in zip(PATCHES[:3], patch[:3], strict=True)],
        "frames": PATCHES[3] * patch[3],
    }
    for word in arguments.overrides:
        if not word.startswith("model."):
            raise UsageError(f"{word}: only the model can be changed here, as model.KEY=VALUE")
        override(tree, word)
    config = build(ModelConfig, tree["model"], where=str(path))
    from swiftv2.recipes.coordinates import check_coordinates
    from swiftv2.report.scaling import coordinates, save_figure

    check = check_coordinates(config, arguments.widths, steps=arguments.steps, lr=arguments.lr, seeds=arguments.seeds)
    check["model"] = arguments.model
    written = []
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_file(arguments.out / "coordinates.json", json.dumps(check, indent=1) + "\n")
        written = [str(one) for one in save_figure(coordinates(check), arguments.out, "coordinates")]
    answer(check | {"written": written}, *_lines(check), *written, as_json=arguments.json)
    return 0


def _lines(check: dict[str, Any]) -> list[str]:
    lines = [f"{'size ~ width^s after the last step':<36}  standard      muP"]
    for name, slopes in check["slopes"].items():
        lines.append(f"{name:<36}  {slopes['standard']:>+8.2f} {slopes['mup']:>+8.2f}")
    return lines
