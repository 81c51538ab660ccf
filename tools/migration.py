"""What the converters of SwiFT v1 and v2 data share: their options, where the voxels are, which subjects there are."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from migration_files import (
    Frames,
    RefusedError,
    Where,
    beside,
    check_same,
    describe,
    draw_mean,
    find_brain,
    header_of,
    nifti,
    write_bold,
    write_mask,
)

from swiftv2.config.data import GridConfig
from swiftv2.config.load import build as build_config
from swiftv2.config.load import override
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sync, write_file
from swiftv2.terminal import Parser, Shown, say

FSL_SHAPE = (91, 109, 91)
FSL_AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2.0, 0, -126], [0, 0, 2.0, -72], [0, 0, 0, 1]])
"""FSL's MNI152 at 2 mm, stored LAS."""
NAMES = r"(?:sub-)?(?P<subject>[A-Za-z0-9]+)"
REPORT = "conversion_report.tsv"
PICTURE = "orientation_check.png"
_TR_RANGE_S = (0.05, 20.0)
_SIDES = ({"L", "R"}, {"P", "A"}, {"I", "S"})


@dataclass(frozen=True)
class Found:
    """A subject's folder or file, by its place among all of them (from 1), and what its name tells."""

    number: int
    path: Path
    names: dict[str, str]


def parser(program: str, what: str, source: str) -> Parser:
    """The options that both converters have."""
    made = Parser(prog=program, description=what)
    made.add_argument("source", type=Path, help=source)
    made.add_argument("out", type=Path, help="folder that takes the NIfTI files; what is there already is not done again")
    place = made.add_argument_group("what the old data never recorded (docs/migration.md tells how to find it out)")
    place.add_argument("--orientation", metavar="LAS", help="directions in which the three indices grow, such as LAS or RAS")
    place.add_argument("--space", help="template space, such as MNI152NLin6Asym")
    place.add_argument("--voxel-mm", type=float, nargs="+", metavar="MM", help="edge of a voxel, or three edges")
    place.add_argument("--tr", type=float, metavar="SECONDS", help="repetition time")
    text = "world mm (R A S) of the centre of the first voxel, instead of --crop"
    place.add_argument("--corner", type=float, nargs=3, metavar=("X", "Y", "Z"), help=text)
    text = (
        "where the first voxel lies in FSL's 91 x 109 x 91 template at 2 mm, in voxels of the data's orientation; < 0: padding"
    )
    place.add_argument("--crop", type=int, nargs=3, metavar=("I", "J", "K"), help=text)
    made.add_argument("--names", default=NAMES, metavar="REGEX", help="names of subjects; groups subject, session, task, run")
    made.add_argument("--task", default="rest", help="task where --names has no such group; rest by default")
    made.add_argument("--background", choices=("auto", "min", "zero"), default="auto", help="value of voxels outside the brain")
    made.add_argument("--frames", type=int, metavar="N", help="frames that every subject must have")
    made.add_argument("--part", metavar="I/N", help="convert the I-th of N parts only, so that N jobs share the work")
    made.add_argument("--show", metavar="NAME", help=f"draw the mean of this subject into OUT/{PICTURE} and convert nothing")
    made.add_argument("--store", type=Path, help="build this store when all is converted")
    made.add_argument("--cohort", help="of the store")
    made.add_argument("--labels", type=Path, metavar="TABLE", help="label table of the store")
    made.add_argument("--salt", metavar="HEX", help="salt of the store's keys; random by default")
    made.add_argument("--keep-float", action="store_true", help="let the store keep float32 rather than scale to 16 bits")
    made.add_argument("--skip-refused", action="store_true", help="build the store although subjects were refused")
    made.add_argument("--grid", nargs="*", default=[], metavar="KEY=VALUE", help="of the store, such as voxel_mm=2")
    return made


def where(arguments: argparse.Namespace) -> Where:
    """The affine, space and repetition time that the options state.

    Raises:
        UsageError: one is missing or makes no sense.
    """
    needed = ("orientation", "space", "voxel_mm", "tr")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(arguments, name) is None]
    missing += ["--corner or --crop"] if arguments.corner is None and arguments.crop is None else []
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: the old files record none of it, and a guess may swap left and right; look into "
            "the NIfTI files that they were made from, or docs/migration.md, and check one subject with --show NAME"
        )
    if arguments.corner is not None and arguments.crop is not None:
        raise UsageError("--corner and --crop say the same: give one of them")
    codes = arguments.orientation.upper()
    if len(codes) != 3 or any(not set(codes) & side for side in _SIDES):
        raise UsageError(
            f"--orientation {arguments.orientation}: three letters, one each of L or R, P or A, I or S, such as LAS"
        )
    edges = arguments.voxel_mm * 3 if len(arguments.voxel_mm) == 1 else arguments.voxel_mm
    if len(edges) != 3 or not all(0.1 <= edge <= 20 for edge in edges):
        raise UsageError("--voxel-mm takes one edge or three, 0.1 to 20 mm")
    if not _TR_RANGE_S[0] <= arguments.tr <= _TR_RANGE_S[1]:
        raise UsageError(f"--tr {arguments.tr:g}: 0.05 to 20 s are plausible")
    if not re.fullmatch(r"[A-Za-z0-9]+", arguments.space) or not re.fullmatch(r"[A-Za-z0-9]+", arguments.task):
        raise UsageError("--space and --task take letters and digits only, as BIDS names have them")
    return Where(_affine(codes, edges, arguments.corner, arguments.crop), arguments.space, arguments.tr)


def _affine(codes: str, edges: Sequence[float], corner: Sequence[float] | None, crop: Sequence[int] | None) -> Any:
    orientations = nifti.orientations
    wanted = orientations.axcodes2ornt(tuple(codes))
    affine = np.eye(4)
    for axis, (world, direction) in enumerate(wanted):
        affine[axis, axis] = 0.0
        affine[int(world), axis] = direction * edges[axis]
    for axis in range(3):
        if not affine[:3, axis].any():
            raise UsageError(f"--orientation {codes} makes no affine")
    if corner is not None:
        affine[:3, 3] = corner
        return affine
    if any(edge != 2.0 for edge in edges):
        raise UsageError("--crop counts in FSL's template at 2 mm: give --voxel-mm 2, or --corner")
    turn = orientations.ornt_transform(orientations.io_orientation(FSL_AFFINE), wanted)
    template = FSL_AFFINE @ orientations.inv_ornt_aff(turn, FSL_SHAPE)
    affine[:3, 3] = (template @ [*(crop or ()), 1])[:3]
    return affine


def name_all(paths: Sequence[Path], arguments: argparse.Namespace) -> list[Found]:
    """Tell subjects apart by their names.

    Raises:
        UsageError: nothing there, a name that does not fit, or two that say the same.
    """
    if not paths:
        raise UsageError(f"nothing to convert in {arguments.source}: docs/migration.md shows what is looked for")
    try:
        pattern = re.compile(arguments.names)
    except re.error as error:
        raise UsageError(f"--names is no regular expression ({error})") from error
    if "subject" not in pattern.groupindex:
        raise UsageError("--names needs a group (?P<subject>...)")
    found: list[Found] = []
    seen: dict[Any, int] = {}
    for number, path in enumerate(sorted(paths), start=1):
        match = pattern.fullmatch(path.name if path.is_dir() else path.stem)
        names = {} if match is None else {key: value for key, value in match.groupdict().items() if value}
        if match is None or not all(re.fullmatch(r"[A-Za-z0-9]+", value) for value in names.values()):
            raise UsageError(
                f"the name of subject {number} of {len(paths)} does not fit --names: letters and digits make an id"
            )
        key = tuple(sorted(names.items()))
        if key in seen:
            raise UsageError(
                f"subjects {seen[key]} and {number} of {len(paths)} have one name by --names: let it tell them apart"
            )
        seen[key] = number
        found.append(Found(number, path, names))
    return found


def convert(
    arguments: argparse.Namespace, paths: Sequence[Path], opened: Callable[[Path], Frames], made_by: str, background: str
) -> int:
    """Convert all subjects, one after another; returns the exit status: 1 where some were refused.

    Args:
        arguments: the options of `parser`.
        paths: a folder or file a subject.
        opened: opens one; raises RefusedError.
        made_by: the converter's name, for dataset_description.json.
        background: what `auto` means: `auto` decides by the data.
    """
    place, found = where(arguments), name_all(paths, arguments)
    background = background if arguments.background == "auto" else arguments.background
    if arguments.show is not None:
        return _show(arguments, place, found, opened)
    grid = _grid(arguments)
    mine, part = _part(arguments.part, found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines, refused = [], 0
    with Shown("subjects") as shown:
        for done, subject in enumerate(mine, start=1):
            reason, remarks = "", ""
            try:
                remarks = _convert_one(arguments, place, subject, opened, made_by, background)
            except RefusedError as refusal:
                reason = str(refusal)
                print(f"{made_by}: subject {subject.number} of {len(found)} refused: {reason}", file=sys.stderr)
            refused += bool(reason)
            status = "refused" if reason else "converted"
            lines.append(f"{subject.number}\t{subject.path.name}\t{status}\t{reason or remarks}\n")
            shown.update(done, len(mine), note=f"{refused} refused" if refused else "")
    describe(arguments.out, made_by)
    report = arguments.out / (REPORT.replace(".tsv", f".{part}.tsv") if part else REPORT)
    write_file(report, "number\tname\tstatus\treason\n" + "".join(lines), 0o600)
    say(f"{arguments.out}: {len(mine) - refused} subjects converted, {refused} refused; {report} names them")
    if grid is not None and (not refused or arguments.skip_refused):
        _build(arguments, grid)
    elif grid is not None:
        say("no store was built, since subjects were refused: mend them and convert again, or say --skip-refused")
    return 1 if refused else 0


def _part(text: str | None, found: list[Found]) -> tuple[list[Found], str]:
    if text is None:
        return found, ""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--part {text}: I/N with 1 <= I <= N, such as 3/16")
    return found[int(match[1]) - 1 :: int(match[2])], match[1]


def _grid(arguments: argparse.Namespace) -> GridConfig | None:
    if arguments.store is None:
        return None
    if arguments.cohort is None or arguments.part is not None:
        raise UsageError("--store needs --cohort NAME and goes without --part: build when all parts are converted")
    tree: dict[str, Any] = {"grid": {}}
    for word in arguments.grid:
        override(tree, f"grid.{word}")
    return build_config(GridConfig, tree["grid"], where="grid")


def _build(arguments: argparse.Namespace, grid: GridConfig) -> None:
    from swiftv2.data.changes.build import build

    options: dict[str, Any] = {"labels": arguments.labels, "salt": arguments.salt, "keep_float": arguments.keep_float}
    report = build(arguments.out, arguments.store, grid, arguments.cohort, **options)
    say(f"{arguments.store}: {report.taken} runs, {report.frames:,} frames, {len(report.refused)} refused")
    for key, reason in report.refused:
        say(f"refused {key}: {reason}")


def _convert_one(
    arguments: argparse.Namespace, place: Where, subject: Found, opened: Callable[[Path], Frames], made_by: str, background: str
) -> str:
    """Write a subject's files, the BOLD file last, or find them there; returns remarks for the report."""
    names = {"task": arguments.task, **subject.names}
    session = f"ses-{names['session']}" if "session" in names else ""
    folder = arguments.out / f"sub-{names['subject']}" / session / "func"
    parts = [f"sub-{names['subject']}", session, f"task-{names['task']}", f"run-{names['run']}" if "run" in names else ""]
    stem = "_".join([*(part for part in parts if part), f"space-{place.space}"])
    bold = folder / f"{stem}_desc-preproc_bold.nii.gz"
    run = opened(subject.path)
    if arguments.frames is not None and run.count != arguments.frames:
        raise RefusedError(f"{run.count} frames where --frames says {arguments.frames}")
    if run.count < 2:
        raise RefusedError("one frame only")
    header = header_of((*run.shape, run.count), np.dtype(np.float32), place)
    if bold.is_file():
        return check_same(bold, header)
    folder.mkdir(parents=True, exist_ok=True)
    low, high = write_bold(bold, header, run)
    mask, value = find_brain(low, high, background)
    write_mask(folder / f"{stem}_desc-brain_mask.nii.gz", mask, place)
    facts = {"RepetitionTime": place.tr, "Space": place.space, "Background": value, "ConvertedBy": made_by, **run.facts}
    write_file(folder / f"{stem}_desc-preproc_bold.json", json.dumps(facts, indent=1) + "\n")
    beside(bold).replace(bold)
    sync(folder)
    return "; ".join(run.remarks)


def _show(arguments: argparse.Namespace, place: Where, found: list[Found], opened: Callable[[Path], Frames]) -> int:
    subject = next((one for one in found if arguments.show in (one.path.name, one.path.stem)), None)
    if subject is None:
        raise UsageError("--show: no subject of this name")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / PICTURE
    frames = draw_mean(path, opened(subject.path), place, arguments.orientation.upper())
    say(f"{path}: the mean of {frames} frames; front, top and the template's outline tell whether the place fits")
    say("left and right look nearly alike: compare with a NIfTI file that the data were made from (docs/migration.md)")
    return 0


def run_tool(program: str, command: Callable[[], int]) -> int:
    """Run a converter; what it cannot do is one line."""
    try:
        return command()
    except SwiftError as error:
        print(f"{program}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"{program}: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted; what is converted is kept: run the same command again to go on", file=sys.stderr)
        return 130
