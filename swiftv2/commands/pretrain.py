"""The command that pretrains."""

import argparse
from pathlib import Path
from typing import Any

from swiftv2.commands.ranks import own_rank, training
from swiftv2.config.load import dump, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.terminal import add_command, say

OVERRIDES = "words that change single settings of the file, such as train.max_steps=1000; an unknown key is refused"


def add(nouns: Any) -> None:
    """The command `pretrain`."""
    text = (
        "pretrain a Swin4D by SimMIM. Start it alone, by torchrun, mpirun or srun. A run.dir that exists is resumed from its "
        "newest whole checkpoint; run.init_from=FOLDER begins a new one from exported weights. SIGTERM, SIGUSR1 or Ctrl-C "
        "save a checkpoint and end with status 75: give the same command again to go on."
    )
    examples = (
        "swiftv2 pretrain configs/pretrain/demo.yaml data.store=cohort.zarr run.dir=runs/first",
        "torchrun --standalone --nproc-per-node 8 -m swiftv2 pretrain configs/pretrain/806M.yaml data.store=cohort.zarr",
        "srun swiftv2 pretrain configs/pretrain/806M.yaml data.store=cohort.zarr train.global_batch=512",
    )
    parser = add_command(nouns, "pretrain", _pretrain, text, examples)
    parser.add_argument("config", type=Path, help="YAML file, such as configs/pretrain/806M.yaml")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, with all defaults, and stop")


def _pretrain(arguments: argparse.Namespace) -> int:
    config = load(PretrainConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        say(dump(config).rstrip("\n"))
        return 0
    from swiftv2.recipes.pretrain import pretrain

    result = training(lambda: pretrain(config))
    if own_rank() == 0 and not result.stopped_early:
        say(f"{config.run.dir}: {result.step} steps done; look at {config.run.dir / 'figures' / 'pretraining.png'}")
    return result.exit_status
