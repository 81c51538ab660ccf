"""The command line: parse, call, print. What a command does lives in the parts that it calls."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from swiftv2 import __version__
from swiftv2.config.data import GridConfig
from swiftv2.config.load import build, dump, load, load_model, override, read_yaml
from swiftv2.config.model import ModelConfig
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.errors import RankError, SwiftError, UsageError
from swiftv2.terminal import Parser, Shown, add_command, add_json, answer, say, table

if TYPE_CHECKING:  # What is heavy is imported by the commands that need it, so that --help answers at once.
    from swiftv2.data.ranks import Communicator

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_STEP_ID")
FAILED, STOPPED_EARLY, INTERRUPTED = 1, 75, 130
COUNTS = ("subjects", "runs", "frames", "hours", "resampled", "cleaned", "confounds")
SILENT_SECONDS = 15.0
KINDS = {"TR (s)": "tr", "space": "spaces", "numbers": "dtypes", "brain by": "brain_rules", "axes of the files": "orientations"}
STOPPED = "stopped by SIGTERM; what is done is kept: run the same command again to go on"
OVERRIDES = "words that change single settings of the file, such as train.max_steps=1000; an unknown key is refused"
RUN_DIR = "run directory of `swiftv2 pretrain`"
FIRST_RUN = """A first run, on generated data, with two ranks:
  swiftv2 store synth demo/bids --config configs/synth/demo.yaml
  swiftv2 store build demo/bids demo/cohort.zarr grid.voxel_mm=4
  torchrun --standalone --nproc-per-node 2 -m swiftv2 pretrain configs/pretrain/demo.yaml
`swiftv2 COMMAND --help` explains each. Exit status: 0 done, 1 failed, 2 wrong use, 75 stopped early with all that was
done kept (run the same command again), 130 interrupted from the keyboard."""


class Terminated(BaseException):
    """SIGTERM came in a command whose work can go on later."""


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
        _complain(str(error), alone=isinstance(error, RankError))
        return error.exit_status
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _complain(f"{where}{error.strerror or error}", alone=True)
        return FAILED
    except Terminated:
        _complain(STOPPED)
        return STOPPED_EARLY
    except KeyboardInterrupt:
        if _rank() == 0:
            _complain("interrupted")
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


def _rank() -> int:
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdecimal()), 0)


def _complain(text: str, *, alone: bool = False) -> None:
    """Say what is wrong, in one line; `alone`: on this rank, and maybe on no other."""
    if _rank() > 0 and not alone:
        # The first rank says the same. When it has left, the launcher ends this one, and the line stands there once.
        time.sleep(SILENT_SECONDS)
    line = " ".join(text.splitlines())
    print(f"swiftv2{f' (rank {_rank()})' if _rank() else ''}: {line}", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        prog="swiftv2",
        description="Pretrain 4-D fMRI foundation models: NIfTI -> Zarr store -> SimMIM on Swin4D under DeepSpeed ZeRO.",
        epilog=FIRST_RUN,
    )
    parser.add_argument("--version", action="version", version=f"swiftv2 {__version__}")
    nouns = parser.add_subparsers(required=True, metavar="COMMAND")
    store = _verbs(nouns, "store", "build, describe and check the Zarr store; generate a cohort")
    _add_build(store)
    _add_info_and_verify(store)
    _add_synth(store)
    _add_pretrain(nouns)
    _add_checkpoint(_verbs(nouns, "checkpoint", "list, check and export the checkpoints of a run"))
    _add_plan(nouns)
    return parser


def _verbs(nouns: Any, name: str, text: str) -> Any:
    return nouns.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="VERB")


def _add_build(verbs: Any) -> None:
    text = (
        "bring NIfTI files to a store. Under mpirun or srun the ranks share the runs. What is refused is listed with its "
        "reason. A build that was stopped or killed goes on when the same command is given again."
    )
    examples = (
        "swiftv2 store build derivatives/fmriprep cohort.zarr",
        "swiftv2 store build 'scans/*.nii.gz' cohort.zarr --cohort ours --labels labels.tsv grid.space=MNI152NLin6Asym",
        "mpirun -n 16 swiftv2 store build derivatives/fmriprep cohort.zarr grid.voxel_mm=4",
    )
    parser = add_command(verbs, "build", _store_build, text, examples)
    add_json(parser)
    parser.add_argument("source", help="BIDS-derivatives folder (*_desc-preproc_bold.nii.gz), or a quoted glob of NIfTI files")
    parser.add_argument("store", type=Path, help="folder of the store: new, or that of the same build unfinished")
    parser.add_argument(
        "--cohort", metavar="NAME", help="of the cohort; needed for a glob, else the source folder's by default"
    )
    text = "TSV or CSV with a subject column and, where names carry no `sub-`, a file column; participants.tsv by default"
    parser.add_argument("--labels", type=Path, metavar="TABLE", help=text)
    parser.add_argument("--tr", type=float, metavar="SECONDS", help="repetition time that every run must have")
    text = (
        "16 or more hex digits that make the pseudonymous keys, and with them the split of subjects by seed, the same on "
        "every machine; random by default. For real data keep it secret: who has it can try out subject ids"
    )
    parser.add_argument("--salt", metavar="HEX", help=text)
    parser.add_argument("--keep-float", action="store_true", help="keep runs that are no integers as float32, not in 16 bits")
    parser.add_argument("--strict", action="store_true", help="fail where any run is refused")
    text = f"the grid: {', '.join(f'grid.{name}' for name in GridConfig.model_fields)}; MNI152 at 2 mm, RAS by default"
    parser.add_argument("overrides", nargs="*", metavar="grid.KEY=VALUE", help=text)


def _add_info_and_verify(verbs: Any) -> None:
    text = "tell cohorts, runs, frames, hours, repetition times, bytes."
    parser = add_command(verbs, "info", _store_info, text, ["swiftv2 store info cohort.zarr"])
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")
    text = "read every chunk and check it. Exit status 1 where anything is damaged; each problem is named by run key."
    parser = add_command(verbs, "verify", _store_verify, text, ["swiftv2 store verify cohort.zarr"])
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")


def _add_synth(verbs: Any) -> None:
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


def _add_pretrain(nouns: Any) -> None:
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


def _add_checkpoint(verbs: Any) -> None:
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


def _add_plan(nouns: Any) -> None:
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


def _communicator() -> "Communicator":
    """The ranks that share a command: those of MPI where a launcher started several, else this process alone."""
    from swiftv2.data.ranks import Alone, MPICommunicator

    if not any(name in os.environ for name in LAUNCHER_VARIABLES):
        return Alone()
    from swiftv2.engine.launch import find_place

    place = find_place(os.environ)
    if place.size == 1:
        return Alone()
    if place.launcher == "torchrun":
        raise UsageError(
            "store build shares its runs between ranks of mpirun or srun, not of torchrun: start it by those, or alone"
        )
    try:
        ranks = MPICommunicator()
    except (ImportError, RuntimeError) as error:
        raise SwiftError(f"started by {place.launcher}, but mpi4py cannot be imported ({error}): install it") from error
    if ranks.size != place.size:
        raise SwiftError(
            f"{place.launcher} started {place.size} ranks, but mpi4py sees {ranks.size}: it was built for another MPI; "
            "use that one's mpirun, or srun with a fitting --mpi"
        )
    return ranks


@contextlib.contextmanager
def _termination(ranks: "Communicator") -> Iterator[None]:
    """Let SIGTERM end a command that can go on later with its own exit status."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if ranks.size > 1:
            # Leaving by the front door would wait for the other ranks; the launcher ends them when this one is gone.
            if ranks.rank == 0:
                _complain(STOPPED)
            os._exit(STOPPED_EARLY)
        raise Terminated

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _store_build(arguments: argparse.Namespace) -> int:
    grid = _grid(arguments.overrides)
    source = arguments.source
    cohort = arguments.cohort or ("" if any(mark in source for mark in "*?[") else Path(source).resolve().name)
    if not cohort:
        raise UsageError(f"{source} has no folder name to call the cohort by: say --cohort NAME")
    salt = arguments.salt
    if salt is not None and (len(salt) < 16 or not all(digit in "0123456789abcdef" for digit in salt.lower())):
        raise UsageError("--salt takes at least 16 hex digits, such as `openssl rand -hex 16` gives")
    from swiftv2.data.build import Progress
    from swiftv2.data.build import build as build_store

    ranks = _communicator()
    with _termination(ranks), Shown("runs", shown=ranks.rank == 0) as shown:

        def progress(state: Progress) -> None:
            refused = f"{state.refused} refused" if state.refused else ""
            shown.update(state.done, state.total, state.bytes_done, state.bytes_total, refused)

        try:
            report = build_store(
                source,
                arguments.store,
                grid,
                cohort,
                labels=arguments.labels,
                comm=ranks,
                progress=progress,
                expect_tr=arguments.tr,
                keep_float=arguments.keep_float,
                salt=None if salt is None else salt.lower(),
                strict=arguments.strict,
            )
        except SwiftError as error:
            if ranks.rank:  # It is the same on all ranks: the first one says it.
                return error.exit_status
            raise
    if ranks.rank:
        return 0
    values = {
        "store": str(arguments.store),
        "taken": report.taken,
        "refused": [{"run": key, "reason": reason} for key, reason in report.refused],
        "frames": report.frames,
        "bytes": report.bytes,
        "report": str(report.report),
        "nothing_to_do": report.nothing_to_do,
    }
    head = "is there already, nothing to do" if report.nothing_to_do else "built"
    lines = [f"{arguments.store} {head}: {report.taken} runs, {report.frames:,} frames, {report.bytes / 1e6:.1f} MB"]
    lines += [f"refused {key}: {reason}" for key, reason in report.refused]
    lines += [f"which file is which: {report.report}"] if report.refused else []
    answer(values, *lines, as_json=arguments.json)
    return 0


def _grid(words: Sequence[str]) -> GridConfig:
    tree: dict[str, Any] = {"grid": {}}
    for word in words:
        if "=" not in word:
            raise UsageError(f"unknown word {word!r}: a glob needs quotes, so that the shell leaves it as it is")
        if not word.startswith("grid."):
            raise UsageError(f"override {word!r}: store build takes grid.KEY=VALUE words")
        override(tree, word)
    return build(GridConfig, tree["grid"], where="grid")


def _store_info(arguments: argparse.Namespace) -> int:
    from swiftv2.data.verify import info

    values = info(arguments.store)
    grid, generated = values["grid"], ", generated data" if values["generated"] else ""
    shape, edges = " x ".join(map(str, grid["shape"])), " x ".join(f"{x:g}" for x in grid["voxel_mm"])
    disk = f"{values['files']} files, {values['bytes'] / 1e6:.1f} MB; {values['withdrawn']} runs withdrawn"
    place = f"{grid['orientation']}, {grid['space']}; {values['voxels']:,} voxels kept"
    head = [
        f"{arguments.store}: format {values['format']}, version {values['version']}{generated}; {disk}",
        f"grid {grid['kind']}: {shape} voxels of {edges} mm, {place}\n",
    ]
    groups = values["cohorts"] | ({"all": values} if len(values["cohorts"]) > 1 else {})
    facts = [(name.replace("_", " "), [f"{group[name]:,}" for group in groups.values()]) for name in COUNTS]
    facts += [(title, [_counts(group[name]) for group in groups.values()]) for title, name in KINDS.items()]
    rows = [[title, *cells] for title, cells in facts]
    answer(values, *head, table(["cohort", *groups], rows), as_json=arguments.json)
    return 0


def _counts(values: dict[str, int]) -> str:
    return ", ".join(values) if len(values) == 1 else ", ".join(f"{key} ({count})" for key, count in values.items())


def _store_verify(arguments: argparse.Namespace) -> int:
    from swiftv2.data.verify import verify

    with Shown("runs") as shown:
        report = verify(arguments.store, shown.update)
    values = {"ok": report.ok, "runs": report.runs, "bytes": report.bytes, "bad": [list(pair) for pair in report.bad]}
    head = f"{arguments.store}: {report.runs} runs, {report.bytes / 1e6:.1f} MB read, {len(report.bad)} problems"
    answer(values, head, *(f"{key}: {problem}" for key, problem in report.bad), as_json=arguments.json)
    return 0 if report.ok else FAILED


def _store_synth(arguments: argparse.Namespace) -> int:
    from swiftv2.data.synth import generate

    tree = read_yaml(arguments.config) if arguments.config else {}
    for word in arguments.overrides:
        override(tree, word)
    config = build(SynthConfig, tree, where=str(arguments.config or "synth"))
    if arguments.workers < 1:
        raise UsageError("--workers takes a number of processes, 1 or more")
    with Shown("subjects") as shown:
        report = generate(config, arguments.folder, arguments.workers, shown.update)
    answer({"folder": str(arguments.folder), **asdict(report)}, f"{arguments.folder}: {report}", as_json=arguments.json)
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    config = load(PretrainConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        say(dump(config).rstrip("\n"))
        return 0
    from swiftv2.recipes.pretrain import pretrain

    try:
        result = pretrain(config)
    except RuntimeError as error:
        if "gloo" not in str(error) and type(error).__name__ not in ("DistBackendError", "DistNetworkError"):
            raise
        reason = str(error).partition("\n")[0]
        raise SwiftError(f"the ranks lost each other ({reason}); the same command goes on from the last checkpoint") from error
    if _rank() == 0 and not result.stopped_early:
        say(f"{config.run.dir}: {result.step} steps done; look at {config.run.dir / 'figures' / 'pretraining.png'}")
    return result.exit_status


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
