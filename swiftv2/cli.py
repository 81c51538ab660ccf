"""The command line: parse, call, print. What a command does lives in the parts that it calls."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swiftv2 import __version__
from swiftv2.config.data import GridConfig
from swiftv2.config.load import build, load, load_model, override, read_yaml
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.errors import SwiftError, UsageError

OVERRIDES = "section.key=value words that change single settings; an unknown key is refused"
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


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
    except UsageError as error:
        # A wrong setting is wrong on every rank: one of them says so.
        if _rank() == 0:
            print(f"swiftv2: {error}", file=sys.stderr)
        return error.exit_status
    except SwiftError as error:
        print(f"swiftv2{f' (rank {_rank()})' if _rank() else ''}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("swiftv2: interrupted", file=sys.stderr)
        return 130


def _rank() -> int:
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal()), 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="swiftv2",
        description="Pretrain 4-D fMRI foundation models: NIfTI -> Zarr store -> SimMIM on Swin4D under DeepSpeed ZeRO.",
        epilog="A first run: `swiftv2 store synth cohort voxel_mm=4`, `swiftv2 store build cohort cohort.zarr grid.voxel_mm=4`, "
        "`torchrun --standalone --nproc-per-node 2 -m swiftv2 pretrain configs/pretrain/demo.yaml data.store=cohort.zarr`.",
    )
    parser.add_argument("--version", action="version", version=f"swiftv2 {__version__}")
    nouns = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_store(nouns)
    _add_pretrain(nouns)
    _add_checkpoint(nouns)
    _add_plan(nouns)
    return parser


def _add(
    parent: Any, name: str, command: Callable[[argparse.Namespace], int], text: str, *, reports: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    if reports:
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _verbs(nouns: Any, name: str, text: str) -> Any:
    return nouns.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="VERB")


def _print(arguments: argparse.Namespace, values: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(values) if arguments.json else "\n".join(lines))


def _add_store(nouns: Any) -> None:
    verbs = _verbs(nouns, "store", "build, describe and check the Zarr store; generate a cohort")
    parser = _add(verbs, "build", _store_build, "NIfTI files to a store; under mpirun or srun the ranks share the runs", reports=True)
    parser.add_argument("source", help="a BIDS-derivatives folder, or a quoted glob of NIfTI files")
    parser.add_argument("store", type=Path, help="folder of the store; an unfinished build goes on where it stands")
    parser.add_argument("--cohort", default=None, help="name of the cohort (the source's folder name when not given)")
    parser.add_argument("--labels", type=Path, help="label table, TSV or CSV (participants.tsv of the folder when not given)")
    parser.add_argument("--tr", type=float, help="repetition time in seconds that every run must have")
    parser.add_argument("--keep-float", action="store_true", help="keep runs that are no integers as float32, not scaled to 16 bits")
    parser.add_argument("--strict", action="store_true", help="fail where any run is refused")
    parser.add_argument("overrides", nargs="*", metavar="grid.key=value", help="the grid, such as grid.voxel_mm=4")
    parser = _add(verbs, "info", _store_info, "cohorts, runs, frames, hours, repetition times, bytes", reports=True)
    parser.add_argument("store", type=Path)
    parser = _add(verbs, "verify", _store_verify, "read every chunk and check it", reports=True)
    parser.add_argument("store", type=Path)
    parser = _add(verbs, "synth", _store_synth, "generate a cohort of fMRIPrep-like files with known traits", reports=True)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, help="YAML file, such as configs/synth/demo.yaml")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as subjects=20 voxel_mm=6")


def _add_pretrain(nouns: Any) -> None:
    parser = _add(
        nouns,
        "pretrain",
        _pretrain,
        "SimMIM pretraining; an existing run.dir is resumed. Start it alone, by torchrun, mpirun or srun",
    )
    parser.add_argument("config", type=Path, help="YAML file, such as configs/pretrain/806M.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def _add_checkpoint(nouns: Any) -> None:
    verbs = _verbs(nouns, "checkpoint", "list, check and export the checkpoints of a run")
    parser = _add(verbs, "list", _checkpoint_list, "checkpoints of a run directory, oldest first", reports=True)
    parser.add_argument("run_dir", type=Path)
    parser = _add(verbs, "verify", _checkpoint_verify, "check sizes and hashes of every file of every checkpoint", reports=True)
    parser.add_argument("run_dir", type=Path)
    parser = _add(verbs, "export", _checkpoint_export, "weights and their card as safetensors + JSON, without DeepSpeed", reports=True)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("folder", type=Path, help="folder to be made")
    parser.add_argument("--step", type=int, help="step of the checkpoint (the newest when not given)")


def _add_plan(nouns: Any) -> None:
    parser = _add(nouns, "plan", _plan, "parameters and FLOPs of a model, by stage, before any GPU is taken", reports=True)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--model", help="preset of configs/model, or a YAML file")
    chosen.add_argument("config", nargs="?", type=Path, help="a pretraining configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)


def _store_build(arguments: argparse.Namespace) -> int:
    from swiftv2.data.build import Progress
    from swiftv2.data.build import build as build_store
    from swiftv2.data.ranks import Alone, Communicator, MPICommunicator

    tree: dict[str, Any] = {"grid": {}}
    for word in arguments.overrides:
        if not word.startswith("grid."):
            raise UsageError(f"override {word!r}: store build takes grid.key=value words")
        override(tree, word)
    grid = build(GridConfig, tree["grid"], where="grid")
    mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")) or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    ranks: Communicator = MPICommunicator() if mpi else Alone()
    cohort = arguments.cohort or Path(arguments.source).resolve().name
    show = ranks.rank == 0 and not arguments.json

    def progress(state: Progress) -> None:
        if show:
            print(f"\r{state.done}/{state.total} runs, {state.refused} refused", end="", file=sys.stderr, flush=True)

    report = build_store(
        arguments.source,
        arguments.store,
        grid,
        cohort,
        labels=arguments.labels,
        comm=ranks,
        progress=progress,
        expect_tr=arguments.tr,
        keep_float=arguments.keep_float,
        strict=arguments.strict,
    )
    if ranks.rank:
        return 0
    if show and not report.nothing_to_do:
        print(file=sys.stderr)
    values = {
        "store": str(arguments.store),
        "taken": report.taken,
        "refused": [{"run": key, "reason": reason} for key, reason in report.refused],
        "frames": report.frames,
        "bytes": report.bytes,
        "report": str(report.report),
        "nothing_to_do": report.nothing_to_do,
    }
    head = "is there already: nothing to do" if report.nothing_to_do else "built"
    lines = [f"{arguments.store} {head}: {report.taken} runs, {report.frames} frames, {report.bytes / 1e6:.1f} MB"]
    lines += [f"refused {key}: {reason}" for key, reason in report.refused]
    lines += [f"which file is which: {report.report}"] if report.refused else []
    _print(arguments, values, lines)
    return 0


def _store_info(arguments: argparse.Namespace) -> int:
    from swiftv2.data.verify import info

    values = info(arguments.store)
    _print(arguments, values, [f"{key}: {json.dumps(value) if isinstance(value, dict) else value}" for key, value in values.items()])
    return 0


def _store_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.data.verify import verify

    report = verify(arguments.store)
    values = {"ok": report.ok, "runs": report.runs, "bytes": report.bytes, "bad": [list(pair) for pair in report.bad]}
    lines = [f"{report.runs} runs, {report.bytes / 1e6:.1f} MB read, {len(report.bad)} problems"]
    _print(arguments, values, lines + [f"{key}: {problem}" for key, problem in report.bad])
    return 0 if report.ok else 1


def _store_synth(arguments: argparse.Namespace) -> int:
    from swiftv2.data.synth import generate

    tree = read_yaml(arguments.config) if arguments.config else {}
    for word in arguments.overrides:
        override(tree, word)
    config = build(SynthConfig, tree, where=str(arguments.config or "synth"))
    report = generate(config, arguments.folder, arguments.workers)
    _print(arguments, {"folder": str(arguments.folder)}, [f"{arguments.folder}: {report}"])
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from swiftv2.config.load import dump

    config = load(PretrainConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(dump(config), end="")
        return 0
    from swiftv2.recipes.pretrain import pretrain

    return pretrain(config)


def _checkpoint_list(arguments: argparse.Namespace) -> int:
    from swiftv2.engine.checkpoint import list_checkpoints

    found = list_checkpoints(arguments.run_dir)
    if not found:
        raise SwiftError(f"{arguments.run_dir}: no checkpoints there; give a run directory")
    rows = [{"step": c.step, "path": str(c.path), "problem": c.problem} for c in reversed(found)]
    _print(arguments, {"checkpoints": rows}, [f"step {c.step}: {c.path}{f', {c.problem}' if c.problem else ''}" for c in reversed(found)])
    return 0


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.engine.checkpoint import list_checkpoints, verify_checkpoint

    found = list_checkpoints(arguments.run_dir)
    if not found:
        raise SwiftError(f"{arguments.run_dir}: no checkpoints there; give a run directory")
    problems: dict[int, str] = {}
    for checkpoint in found:
        try:
            verify_checkpoint(checkpoint.path)
        except SwiftError as error:
            problems[checkpoint.step] = str(error)
    rows = [{"step": c.step, "problem": problems.get(c.step)} for c in reversed(found)]
    lines = [f"step {c.step}: {problems.get(c.step, 'whole')}" for c in reversed(found)]
    _print(arguments, {"ok": not problems, "checkpoints": rows}, lines)
    return 1 if problems else 0


def _checkpoint_export(arguments: argparse.Namespace) -> int:
    from swiftv2.recipes.export import export_checkpoint

    folder = export_checkpoint(arguments.run_dir, arguments.folder, arguments.step)
    _print(arguments, {"folder": str(folder)}, [f"{folder}: weights.safetensors and weights.json"])
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from swiftv2.plan import plan_model

    plan = plan_model(load_model(arguments.model) if arguments.model else load(PretrainConfig, arguments.config, arguments.overrides).model)
    flops = [f"  {name}: {count / 1e9:.3f} GFLOP" for name, count in plan.forward_flops_per_clip.items()]
    sizes = [f"encoder: {plan.encoder_parameters:,} parameters", f"decoder: {plan.decoder_parameters:,} parameters"]
    _print(arguments, plan.to_dict(), [plan.model, *sizes, "forward pass of one clip:", *flops])
    return 0
