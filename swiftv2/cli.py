"""The command line: parse, call, print. What a command does lives in the parts that it calls."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swiftv2 import __version__
from swiftv2.config.load import load, load_model, override
from swiftv2.errors import SwiftError, UsageError

OVERRIDES = "section.key=value words that change single settings; an unknown key is refused"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after the program's name; those of the process when None.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped early with its state saved (run it again).
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except SwiftError as error:
        print(f"swiftv2: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("swiftv2: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swiftv2",
        description="Pretrain 4-D fMRI foundation models: NIfTI -> Zarr store -> SimMIM on Swin4D under DeepSpeed ZeRO.",
        epilog="A first run: `swiftv2 store synth cohort`, `swiftv2 store build cohort cohort.zarr`, "
        "`swiftv2 pretrain configs/pretrain/5M.yaml data.store=cohort.zarr`.",
    )
    parser.add_argument("--version", action="version", version=f"swiftv2 {__version__}")
    nouns = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_store(nouns)
    _add_pretrain(nouns)
    _add_checkpoint(nouns)
    _add_plan(nouns)
    return parser


def _add(parent: Any, name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _print(arguments: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    print(json.dumps(values) if arguments.json else text)
