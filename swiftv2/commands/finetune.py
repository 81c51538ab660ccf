"""The command that fine-tunes."""

import argparse
from pathlib import Path
from typing import Any

from swiftv2.commands.pretrain import OVERRIDES
from swiftv2.commands.ranks import own_rank, training
from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import dump, find_preset, load
from swiftv2.terminal import add_command, say


def add(nouns: Any) -> None:
    """The command `finetune`."""
    text = (
        "fine-tune exported weights, or a model from scratch, on a downstream task. Start it alone, by torchrun, mpirun or "
        "srun. The best step on validation subjects predicts the test subjects, once. A run.dir that exists is resumed; "
        "SIGTERM, SIGUSR1 or Ctrl-C save a checkpoint and end with status 75: give the same command again to go on."
    )
    examples = (
        "swiftv2 finetune configs/finetune/last_blocks.yaml task=hcp_sex task.data.store=hcp.zarr encoder.weights=weights",
        "swiftv2 finetune lora task=abide_asd task.data.store=abide.zarr encoder.weights=weights task.split.index=3",
    )
    parser = add_command(nouns, "finetune", _finetune, text, examples)
    parser.add_argument("config", help="YAML file or preset of configs/finetune")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, with all defaults, and stop")


def _finetune(arguments: argparse.Namespace) -> int:
    config = load(FinetuneConfig, Path(find_preset("finetune", arguments.config)), arguments.overrides)
    if arguments.dry_run:
        say(dump(config).rstrip("\n"))
        return 0
    from swiftv2.recipes.finetune import RESULT, finetune

    result = training(lambda: finetune(config))
    if own_rank() == 0 and not result.stopped_early:
        say(f"{config.run.dir}: {result.step} steps done; look at {config.run.dir / RESULT}")
    return result.exit_status
