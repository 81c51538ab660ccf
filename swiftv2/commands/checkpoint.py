"""Commands on the checkpoints of a run."""

import argparse
from pathlib import Path
from typing import Any

from swiftv2.errors import SwiftError
from swiftv2.terminal import Shown, add_command, add_json, answer

FAILED = 1
RUN_DIR = "run directory of `swiftv2 pretrain`"


def add(verbs: Any) -> None:
    """The verbs of `checkpoint`."""
    text = "list the checkpoints of a run, oldest first."
    parser = add_command(verbs, "list", _checkpoint_list, text, ["swiftv2 checkpoint list runs/first"])
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    text = "check size and hash of every file of every checkpoint. Exit status 1 where one is damaged."
    parser = add_command(verbs, "verify", _checkpoint_verify, text, ["swiftv2 checkpoint verify runs/first"])
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    text = "write weights and their card as safetensors + JSON, which load without DeepSpeed."
    example = "swiftv2 checkpoint export runs/first weights/first --step 1000"
    parser = add_command(verbs, "export", _checkpoint_export, text, [example])
    add_json(parser)
    parser.add_argument("run_dir", type=Path, help=RUN_DIR)
    parser.add_argument("folder", type=Path, help="folder to be made; it takes weights.safetensors and weights.json")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest whole one by default")


def _checkpoint_list(arguments: argparse.Namespace) -> int:
    from swiftv2.engine.checkpoint import list_checkpoints

    found = list_checkpoints(arguments.run_dir)
    if not found:
        raise SwiftError(f"{arguments.run_dir}: no checkpoints there; give a run directory")
    rows = [{"step": c.step, "path": str(c.path), "problem": c.problem} for c in reversed(found)]
    lines = [f"step {c.step}: {c.path}{f', {c.problem}' if c.problem else ''}" for c in reversed(found)]
    answer({"checkpoints": rows}, *lines, as_json=arguments.json)
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.engine.checkpoint import list_checkpoints, verify_checkpoint

    found = list_checkpoints(arguments.run_dir)
    if not found:
        raise SwiftError(f"{arguments.run_dir}: no checkpoints there; give a run directory")
    problems: dict[int, str] = {}
    with Shown("checkpoints") as shown:
        for done, checkpoint in enumerate(found, start=1):
            try:
                verify_checkpoint(checkpoint.path)
            except SwiftError as error:
                problems[checkpoint.step] = str(error)
            shown.update(done, len(found))
    rows = [{"step": c.step, "problem": problems.get(c.step)} for c in reversed(found)]
    lines = [f"step {c.step}: {problems.get(c.step, 'whole')}" for c in reversed(found)]
    answer({"ok": not problems, "checkpoints": rows}, *lines, as_json=arguments.json)
    return FAILED if problems else 0


def _checkpoint_export(arguments: argparse.Namespace) -> int:
    from swiftv2.recipes.export import export_checkpoint

    folder = export_checkpoint(arguments.run_dir, arguments.folder, arguments.step)
    answer({"folder": str(folder)}, f"{folder}: weights.safetensors and weights.json", as_json=arguments.json)
    return 0
