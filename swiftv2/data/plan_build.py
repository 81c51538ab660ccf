"""The plan of a build: which runs are taken, in which rows, on which grid; the same on every rank and at every restart."""

import hashlib
import hmac
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.data import layout
from swiftv2.data.discover import NATIVE_SPACES, Discovery, Source
from swiftv2.data.grid import Grid, kept_voxels, make_grid
from swiftv2.data.ingest import Candidate
from swiftv2.data.keys import file_key, new_salt, run_key, subject_key
from swiftv2.data.labels import LabelRow
from swiftv2.data.nifti import Header, RefusedError, read_header, repetition_time
from swiftv2.data.sidecars import sidecar_facts
from swiftv2.errors import SwiftError, UsageError


@dataclass(frozen=True)
class Options:
    """What the user asks of a build, beside the source."""

    grid: GridConfig
    cohort: str
    expect_tr: float | None
    keep_float: bool
    compression: layout.Compression
    clean: CleanConfig = CleanConfig()


@dataclass(frozen=True)
class Inspected:
    """A file whose header was read: either good, with its header, repetition time (s) and space (or None), or refused."""

    source: Source
    header: Header | None = None
    tr: float = 0.0
    space: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Refused:
    """A run that is not taken: pseudonymous key, file below the source (personal data), reason."""

    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Runs with their rows, what was refused by its header, the grid and its kept voxels, and the salt of all keys."""

    salt: str
    digest: str
    grid: Grid
    voxels: npt.NDArray[np.int32]
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    labels: tuple[LabelRow, ...]
    generated: bool

    @property
    def longest(self) -> int:
        """Frames of the longest run."""
        return max(candidate.header.frames for candidate in self.candidates)


def inspect(source: Source, options: Options) -> Inspected:
    """Read what the header and the side-car of a file say, or why it is refused."""
    if not source.subject:
        return Inspected(source, refusal="no subject: its name has no sub-, and the label table has no line with its file")
    try:
        stated, space = sidecar_facts(source.sidecars)
        header = read_header(source.path)
        tr = repetition_time(stated if stated is not None else source.tr, header, options.expect_tr)
        return Inspected(source, header, tr, _space(source.space or space, options.grid))
    except RefusedError as refusal:
        return Inspected(source, refusal=str(refusal))


def _space(stated: str | None, grid: GridConfig) -> str | None:
    if stated is not None and stated.lower() in NATIVE_SPACES:
        raise RefusedError(f"native space ({stated}): only runs in a template space are taken")
    if stated is None and grid.space is None:
        raise RefusedError("space unknown: neither name nor side-car tells; say grid.space if you know it")
    if stated is not None and grid.space is not None and stated != grid.space:
        raise RefusedError(f"space {stated} where grid.space is {grid.space}")
    space = stated or grid.space
    if grid.kind == "mni152" and space is not None and not space.startswith("MNI152"):
        raise RefusedError(f"unknown space {space}: grid.kind=mni152 takes MNI152 spaces")
    return space


def choose_salt(store: Path, salt: str | None) -> str:
    """The salt that the store or its unfinished build has, else the one given, else a random one.

    Raises:
        SwiftError: the one given is not that of the store.
    """
    known = None
    for path in (store / layout.SUBJECTS_FILE, store / layout.STAGING / "plan.json"):
        if path.is_file():
            try:
                known = str(json.loads(path.read_text(encoding="utf-8"))["salt"])
            except (OSError, ValueError, KeyError) as error:
                raise SwiftError(f"{path} cannot be read: remove the store {store} and build it again") from error
            break
    if known is not None and salt is not None and salt != known:
        raise UsageError(f"store {store} was begun with another salt: give that one, or build another store")
    return known or salt or new_salt()


def make_plan(discovery: Discovery, inspected: list[Inspected], options: Options, salt: str) -> Plan:
    """Settle grid and rows. Rows follow the salted keys, so that they tell nothing of the order of the ids.

    Raises:
        UsageError: runs of several spaces without grid.space, or a grid that cannot be.
        SwiftError: no run is left.
    """
    checked = _without_twins(inspected)
    good = [one for one in checked if one.refusal is None]
    refused = [Refused(_key(salt, options.cohort, one.source), one.source.relative, one.refusal or "")
               for one in checked if one.refusal is not None]  # fmt: skip
    if not good:
        raise SwiftError(f"no run can be taken: {reasons([one.reason for one in refused])}")
    spaces = Counter(one.space for one in good)
    if len(spaces) > 1:
        counted = ", ".join(f"{space} ({count} runs)" for space, count in sorted(spaces.items(), key=str))
        raise UsageError(f"runs lie in several spaces: {counted}; choose one by grid.space")
    first, space = good[0].header, good[0].space
    if first is None or space is None:
        raise SwiftError("a run without header or space was not refused: report this")
    grid = make_grid(options.grid, space, (first.shape, first.affine))
    keyed = sorted((_key(salt, options.cohort, one.source), one) for one in good)
    candidates = []
    for row, (key, one) in enumerate(keyed):
        if one.header is not None:
            subject = subject_key(salt, options.cohort, one.source.subject)
            candidates.append(Candidate(row, key, subject, options.cohort, one.source, one.header, one.tr, space))
    return Plan(
        salt=salt,
        digest=source_digest(discovery.sources, options, salt),
        grid=grid,
        voxels=kept_voxels(grid, options.grid.mask),
        candidates=tuple(candidates),
        refused=tuple(refused),
        labels=discovery.labels,
        generated=discovery.generated,
    )


def _key(salt: str, cohort: str, source: Source) -> str:
    if not source.subject:
        return file_key(salt, source.relative)
    return run_key(salt, cohort, source.subject, source.session, source.task, source.run)


def _without_twins(inspected: list[Inspected]) -> list[Inspected]:
    def identity(one: Inspected) -> tuple[str, str, str, str]:
        source = one.source
        return source.subject, source.session, source.task, source.run

    counts = Counter(identity(one) for one in inspected if one.refusal is None)
    reason = "several files of one run (subject, session, task, run): give a glob that takes one of them"
    return [
        Inspected(one.source, refusal=reason) if one.refusal is None and counts[identity(one)] > 1 else one for one in inspected
    ]


def source_digest(sources: tuple[Source, ...], options: Options, salt: str) -> str:
    """A salted hash of the source files (names and sizes) and the options: equal where a build would be the same."""
    content = {
        "sources": [[one.relative, one.size] for one in sources],
        "options": {
            **asdict(options),
            "grid": options.grid.model_dump(mode="json"),
            "clean": options.clean.model_dump(mode="json"),
        },
    }
    return hmac.new(salt.encode(), json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def reasons(texts: list[str]) -> str:
    """Reasons with how often each occurs, the most frequent first, in one line."""
    return "; ".join(f"{text} ({count})" for text, count in Counter(texts).most_common())
