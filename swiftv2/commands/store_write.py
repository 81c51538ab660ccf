"""Commands that make or change a store."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftv2.commands.ranks import communicator, termination
from swiftv2.config.data import GridConfig
from swiftv2.config.load import build, override
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import Shown, add_command, add_json, answer


def add(verbs: Any) -> None:
    """The verbs of `store` that make or change one."""
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

    ranks = communicator("store build")
    with termination(ranks), Shown("runs", shown=ranks.rank == 0) as shown:

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
