"""The command line: which commands there are, and how their failures are told."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from swiftv2 import __version__
from swiftv2.commands import (
    checkpoint,
    doctor,
    embed,
    explain,
    finetune,
    import_v1,
    job,
    plan,
    pretrain,
    report,
    status,
    store_read,
    store_synth,
    store_write,
    sweep,
    task,
    tune,
)
from swiftv2.commands.ranks import STOPPED, STOPPED_EARLY, Terminated, complain, own_rank
from swiftv2.errors import InterruptedRunError, RankError, SwiftError
from swiftv2.terminal import Parser

FAILED, INTERRUPTED = 1, 130
FIRST_RUN = """A first run, on generated data, with two ranks:
  swiftv2 store synth demo/bids --config configs/synth/demo.yaml
  swiftv2 store build demo/bids demo/cohort.zarr grid.voxel_mm=4
  torchrun --standalone --nproc-per-node 2 -m swiftv2 pretrain configs/pretrain/demo.yaml
`swiftv2 COMMAND --help` explains each. Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped early with all that was
done kept (run the same command again), 130 interrupted from the keyboard."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after the program's name; those of the process when None.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped early with its state saved (run it again), 130 interrupted.
    """
    try:
        arguments = _parse(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except SwiftError as error:
        complain(str(error), alone=isinstance(error, RankError | InterruptedRunError))
        return error.exit_status
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(f"{where}{error.strerror or error}", alone=True)
        return FAILED
    except Terminated:
        complain(STOPPED)
        return STOPPED_EARLY
    except KeyboardInterrupt:
        if own_rank() == 0:
            complain("interrupted")
        return INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse hands positional words that follow an option back as unknown; here they are overrides like those before it.
    arguments, rest = parser.parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or "overrides" not in arguments):
        parser.error(f"unknown words: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> Parser:
    parser = Parser(
        prog="swiftv2",
        description="Pretrain 4-D fMRI foundation models: NIfTI -> Zarr store -> SimMIM on Swin4D under DeepSpeed ZeRO.",
        epilog=FIRST_RUN,
    )
    parser.add_argument("--version", action="version", version=f"swiftv2 {__version__}")
    nouns = parser.add_subparsers(required=True, metavar="COMMAND")
    store = _verbs(nouns, "store", "build, describe and check the Zarr store; generate a cohort")
    for module in (store_write, store_read, store_synth):
        module.add(store)
    pretrain.add(nouns)
    finetune.add(nouns)
    tune.add(_verbs(nouns, "tune", "tune fine-tuning by Optuna: run a study's workers, see how it stands, finish it"))
    task.add(_verbs(nouns, "task", "look at downstream tasks, fit baselines and probes, compare results"))
    embed.add(nouns)
    explain.add(_verbs(nouns, "explain", "say what predictions rest on, and how embeddings move in time"))
    checkpoints = _verbs(nouns, "checkpoint", "list, check, export, adopt or import checkpoints, suggest their interval")
    for module in (checkpoint, import_v1):
        module.add(checkpoints)
    plan.add(nouns)
    doctor.add(nouns)
    job.add(_verbs(nouns, "job", "what the Slurm launchers ask before and after the ranks"))
    sweep.add(_verbs(nouns, "sweep", "run sweeps and ladders, collect them, fit scaling laws, predict the next model"))
    status.add(nouns)
    report.add(nouns)
    return parser


def _verbs(nouns: Any, name: str, text: str) -> Any:
    return nouns.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="VERB")
