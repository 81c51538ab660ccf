"""The command that generates a cohort."""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swiftv2.config.load import build, override, read_yaml
from swiftv2.config.synth import SynthConfig
from swiftv2.errors import UsageError
from swiftv2.terminal import Shown, add_command, add_json, answer


def add(verbs: Any) -> None:
    """The verb of `store` that generates a cohort."""
    text = "generate a cohort of fMRIPrep-like files with known traits."
    example = "swiftv2 store synth demo/bids --config configs/synth/demo.yaml subjects=20"
    parser = add_command(verbs, "synth", _store_synth, text, [example])
    add_json(parser)
    parser.add_argument("folder", type=Path, help="folder to be made, which `swiftv2 store build` then takes")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file, such as configs/synth/demo.yaml")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; one a core by default"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="single settings, such as subjects=20 voxel_mm=6")


def _store_synth(arguments: argparse.Namespace) -> int:
    from swiftv2.data.synth import generate

    tree = read_yaml(arguments.config) if arguments.config else {}
    for word in arguments.overrides:
        override(tree, word)
    config = build(SynthConfig, tree, str(arguments.config or "synth"), arguments.overrides)
    if arguments.workers < 1:
        raise UsageError("--workers takes a number of processes, 1 or more")
    with Shown("subjects") as shown:
        report = generate(config, arguments.folder, arguments.workers, shown.update)
    answer({"folder": str(arguments.folder), **asdict(report)}, f"{arguments.folder}: {report}", as_json=arguments.json)
    return 0
