"""Commands that make or change a store."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.commands.ranks import communicator, termination
from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.config.load import build, override
from swiftv2.errors import SwiftError, UsageError
from swiftv2.terminal import Parser, Shown, add_command, add_json, answer, warn

if TYPE_CHECKING:
    from swiftv2.data.changes.publish import BuildReport
    from swiftv2.data.changes.tally import Progress

COMPRESSIONS = ("none", "lz4", "zstd")
_SHOWN = 10


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
    text = "of the cohort; needed for a glob, else the source folder's by default"
    _add_source(parser, "folder of the store: new, or that of the same build unfinished", text)
    text = "codec of the arrays, none being the fastest to read where the disk is not what one waits for; lz4 by default"
    parser.add_argument("--compression", choices=COMPRESSIONS, default="lz4", help=text)
    _add_words(parser, "MNI152 at 2 mm, RAS by default")
    text = (
        "add runs to a store; they come behind those that are there. Grid, codec, salt and cleaning are the store's. Files "
        "that it has already are passed over. Readers see the former version until all is done. Killed, it goes on when the "
        "same command is given again."
    )
    adding = (
        "swiftv2 store append derivatives/wave2 cohort.zarr --cohort ours",
        "srun -n 128 swiftv2 store append hcp/derivatives cohort.zarr --cohort HCP grid.resample=true",
    )
    parser = add_command(verbs, "append", _store_append, text, adding)
    text = "of the cohort, always to be said: one that the store has, under the name that it has there, or a new one"
    _add_source(parser, "folder of a store", text)
    parser.add_argument("--compression", choices=COMPRESSIONS, help="the store's; another one is refused")
    _add_words(parser, "the store's, but for grid.resample and grid.space, which say something of the files")
    _add_drop(verbs)


def _add_source(parser: Parser, text: str, cohort: str) -> None:
    """What build and append share."""
    add_json(parser)
    parser.add_argument("source", help="BIDS-derivatives folder (*_desc-preproc_bold.nii.gz), or a quoted glob of NIfTI files")
    parser.add_argument("store", type=Path, help=text)
    parser.add_argument("--cohort", metavar="NAME", help=cohort)
    text = "TSV or CSV with a subject column and, where names carry no `sub-`, a file column; participants.tsv by default"
    parser.add_argument("--labels", type=Path, metavar="TABLE", action="append", help=text + "; may be given several times")
    parser.add_argument("--tr", type=float, metavar="SECONDS", help="repetition time that every run must have")
    text = (
        "16 or more hex digits that make the pseudonymous keys, and with them the split of subjects by seed, the same on "
        "every machine; random by default. For real data keep it secret: who has it can try out subject ids"
    )
    parser.add_argument("--salt", metavar="HEX", help=text)
    parser.add_argument("--keep-float", action="store_true", help="keep runs that are no integers as float32, not in 16 bits")
    parser.add_argument("--strict", action="store_true", help="fail where any run is refused")


def _add_words(parser: Parser, default: str) -> None:
    names = [f"grid.{name}" for name in GridConfig.model_fields] + [f"clean.{name}" for name in CleanConfig.model_fields]
    text = f"grid and cleaning: {', '.join(names)}; the grid is {default}"
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=text)


def _add_drop(verbs: Any) -> None:
    text = (
        "take subjects who withdrew consent out of a store, which becomes another version: their runs leave tombstones, and "
        "no byte of their data stays. Killed, it goes on when it, or any other change, is given again."
    )
    examples = (
        "swiftv2 store drop cohort.zarr --subjects withdrawn.txt --dry-run --used-by runs",
        "swiftv2 store drop cohort.zarr --subjects withdrawn.txt --used-by runs exported embeddings",
    )
    parser = add_command(verbs, "drop", _store_drop, text, examples)
    add_json(parser)
    parser.add_argument("store", type=Path, help="folder of a store")
    text = "text file, one subject a line: id with or without sub-, cohort/id, or key; # begins a comment"
    parser.add_argument("--subjects", type=Path, metavar="FILE", required=True, help=text)
    parser.add_argument("--cohort", metavar="NAME", help="of ids that several cohorts have")
    text = "pass over ids that the store does not know, as in a list of all who ever withdrew; they are counted"
    parser.add_argument("--ignore-unknown", action="store_true", help=text)
    text = (
        "folders to be searched for runs, exported weights and embeddings that were trained or evaluated on the subjects; "
        "these are listed"
    )
    parser.add_argument("--used-by", type=Path, nargs="+", metavar="PATH", default=[], help=text)
    parser.add_argument("--dry-run", action="store_true", help="tell what would go, and change nothing")


def _store_build(arguments: argparse.Namespace) -> int:
    from swiftv2.data.changes.build import build as build_store

    grid, clean = _sections(arguments.overrides, "build")
    cohort = _cohort(arguments)

    def change(**options: Any) -> "BuildReport":
        return build_store(arguments.source, arguments.store, grid, cohort, clean=clean, **options)

    return _take(arguments, "build", "built", change)


def _store_append(arguments: argparse.Namespace) -> int:
    from swiftv2.data.changes.append import append
    from swiftv2.data.changes.versions import read_base

    grid, clean = _sections(arguments.overrides, "append")
    if not arguments.cohort:
        cohorts = ", ".join(read_base(arguments.store).cohorts)
        raise UsageError(
            f"say --cohort NAME: {arguments.store} has {cohorts}; under another name the same people count as other subjects"
        )

    def change(**options: Any) -> "BuildReport":
        return append(arguments.source, arguments.store, arguments.cohort, grid=grid, clean=clean, **options)

    return _take(arguments, "append", "appended", change)


def _cohort(arguments: argparse.Namespace) -> str:
    source: str = arguments.source
    cohort: str = arguments.cohort or ("" if any(mark in source for mark in "*?[") else Path(source).resolve().name)
    if not cohort:
        raise UsageError(f"{source} has no folder name to call the cohort by: say --cohort NAME")
    return cohort


def _take(arguments: argparse.Namespace, verb: str, done: str, change: Callable[..., "BuildReport"]) -> int:
    """Run a build or append on all ranks, and print what the first one has."""
    salt = arguments.salt
    if salt is not None and not re.fullmatch("[0-9a-fA-F]{16,}", salt):
        raise UsageError("--salt takes at least 16 hex digits, such as `openssl rand -hex 16` gives")
    if arguments.tr is not None and not 0 < arguments.tr < math.inf:
        raise UsageError(f"--tr {arguments.tr}: give the repetition time in seconds, above 0")
    ranks = communicator(f"store {verb}")
    with termination(ranks), Shown("runs", shown=ranks.rank == 0) as shown:

        def progress(state: "Progress") -> None:
            refused = f"{state.refused} refused" if state.refused else ""
            shown.update(state.done, state.total, state.bytes_done, state.bytes_total, refused)

        try:
            report = change(
                labels=arguments.labels,
                comm=ranks,
                progress=progress,
                expect_tr=arguments.tr,
                keep_float=arguments.keep_float,
                salt=None if salt is None else salt.lower(),
                strict=arguments.strict,
                compression=arguments.compression,
            )
        except SwiftError as error:
            if ranks.rank:  # It is the same on all ranks: the first one says it.
                return error.exit_status
            raise
    if ranks.rank == 0:
        _tell(arguments, done, report)
    return 0


def _tell(arguments: argparse.Namespace, done: str, report: "BuildReport") -> None:
    values = {
        "store": str(arguments.store),
        "version": report.version,
        "taken": report.taken,
        "present": report.present,
        "refused": [{"run": key, "reason": reason} for key, reason in report.refused],
        "frames": report.frames,
        "bytes": report.bytes,
        "report": str(report.report),
        "nothing_to_do": report.nothing_to_do,
    }
    head = "is there already, nothing to do" if report.nothing_to_do else done
    size = f"{_count(report.taken, 'run')}, {_count(report.frames, 'frame')}, {report.bytes / 1e6:.1f} MB"
    lines = [f"{arguments.store} {head}: {size}"]
    lines += [f"in the store already: {_count(report.present, 'file')}"] if report.present else []
    lines += [f"refused {key}: {reason}" for key, reason in report.refused]
    lines += [f"which file is which: {report.report}"] if report.refused else []
    answer(values, *lines, as_json=arguments.json)


def _store_drop(arguments: argparse.Namespace) -> int:
    from swiftv2.data.changes.drop import drop, read_withdrawals

    withdrawal = read_withdrawals(
        arguments.store, arguments.subjects, arguments.cohort, ignore_unknown=arguments.ignore_unknown
    )
    users: list[dict[str, Any]] = []
    cards = None
    if arguments.used_by:
        from swiftv2.recipes.withdrawal import find_users

        search = find_users(arguments.used_by, arguments.store, withdrawal)
        users, cards = [user.to_json() for user in search.users], search.cards
    report = drop(arguments.store, withdrawal, users, dry_run=arguments.dry_run)
    values = {
        "store": str(arguments.store),
        "version": report.version,
        "dry_run": arguments.dry_run,
        "subjects": list(report.subjects),
        "runs": list(report.runs),
        "bytes": report.bytes,
        "already": report.already,
        "unknown": report.unknown,
        "users": list(report.users),
        "cards": cards,
        "finished": report.finished,
        "leftovers": report.leftovers,
        "foreign": list(report.foreign),
    }
    head = "would lose" if arguments.dry_run else f"version {report.version}: it lost"
    size = f"{_count(len(report.subjects), 'subject')}, {_count(len(report.runs), 'run')}, {report.bytes / 1e6:.1f} MB"
    lines = [f"{arguments.store} {head} {size}"]
    lines += ["a drop that was killed was finished first"] if report.finished else []
    lines += [f"left by an append that was given up, gone too: {_count(report.leftovers, 'file')}"] if report.leftovers else []
    lines += [f"withdrawn before: {_count(report.already, 'subject')}"] if report.already else []
    lines += [f"not known to the store: {_count(report.unknown, 'line')} of the list"] if report.unknown else []
    lines += [_used(user) for user in report.users]
    if cards is not None and not report.users:
        searched = ", ".join(map(str, arguments.used_by))
        lines += [f"used by nothing in {searched}, where {_count(cards, 'card')} of runs, weights and others were looked at"]
    answer(values, *lines, as_json=arguments.json)
    if report.foreign:
        shown = ", ".join(report.foreign[:_SHOWN]) + (", ..." if len(report.foreign) > _SHOWN else "")
        warn(
            f"{_count(len(report.foreign), 'file')} in {arguments.store} that the format does not know may hold copies of "
            f"withdrawn data, look there: {shown}"
        )
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _used(user: dict[str, Any]) -> str:
    counts = {"trained on": user["trained_on"], "evaluated on": user["evaluated_on"]}
    used = ", ".join(f"{how} {count}" for how, count in counts.items() if count)
    if used:
        return f"used by {user['path']} ({user['kind']}): {used} of the subjects"
    names = {True: "names this store", False: "names another store", None: "names no store"}[user["this_store"]]
    return f"cannot tell of {user['path']} ({user['kind']}): it lists no subjects; it {names}"


def _sections(words: Sequence[str], verb: str) -> tuple[GridConfig, CleanConfig]:
    tree: dict[str, Any] = {"grid": {}, "clean": {}}
    for word in words:
        if "=" not in word:
            raise UsageError(f"unknown word {word!r}: a glob needs quotes, so that the shell leaves it as it is")
        if not word.startswith(("grid.", "clean.")):
            raise UsageError(f"override {word!r}: store {verb} takes grid.KEY=VALUE and clean.KEY=VALUE words")
        override(tree, word)
    return build(GridConfig, tree["grid"], where="grid"), build(CleanConfig, tree["clean"], where="clean")
