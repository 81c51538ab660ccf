"""The plan of a build or append: which runs are taken, in which rows, on which grid; the same at every restart."""

import hashlib
import hmac
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.versions import Base
from swiftv2.data.grid import Grid, kept_voxels, make_grid
from swiftv2.data.ingest.discover import NATIVE_SPACES, Discovery, Source
from swiftv2.data.ingest.nifti import Header, RefusedError, read_header, repetition_time
from swiftv2.data.ingest.run import Candidate
from swiftv2.data.ingest.sidecars import sidecar_facts
from swiftv2.data.keys import file_key, new_salt, run_key, subject_key
from swiftv2.data.labels import LabelRow
from swiftv2.data.store import layout
from swiftv2.data.store.shards import OpenShards, ShardedArray
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sha256

UNTOUCHED = CleanConfig()
WITHDRAWN = "its subject's consent was withdrawn"
WITHDRAWN_ELSEWHERE = "consent of a subject of this id was withdrawn in another cohort of the store"


@dataclass(frozen=True)
class Options:
    """What the user asks of a build, beside the source."""

    grid: GridConfig
    cohort: str
    expect_tr: float | None
    keep_float: bool
    compression: layout.Compression
    clean: CleanConfig = UNTOUCHED

    def kept(self) -> dict[str, Any]:
        """What the store remembers of it for what is appended later."""
        return {
            "grid": self.grid.model_dump(mode="json"),
            "compression": self.compression,
            "keep_float": self.keep_float,
            "clean": self.clean.model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Inspected:
    """A file whose header was read: either good, with its header, repetition time (s) and space (or None), or not taken."""

    source: Source
    header: Header | None = None
    tr: float = 0.0
    space: str | None = None
    refusal: str | None = None
    present: bool = False
    """Whether this very file is in the store already."""


@dataclass(frozen=True)
class Refused:
    """A run that is not taken: pseudonymous keys of run and subject, file below the source (personal data), reason."""

    key: str
    subject: str
    file: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Which runs become which rows.

    Attributes:
        version: of the store that is made.
        salt: of all keys.
        digest: names source files and options.
        grid, voxels: the window and its kept voxels.
        first: row of the first candidate.
        frames: extent of the arrays' axis of frames.
        candidates: runs whose headers are good, by ascending row.
        refused: those that are not taken.
        present: how many files are in the store already.
        labels: of the label table.
        generated: whether all data are generated.
    """

    version: int
    salt: str
    digest: str
    grid: Grid
    voxels: npt.NDArray[np.int32]
    first: int
    frames: int
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    present: int
    labels: tuple[LabelRow, ...]
    generated: bool

    @property
    def rows(self) -> int:
        """Rows of every array."""
        return self.first + len(self.candidates)


class Inspector:
    """Tells of a file what its header and side-car say, and whether the store knows it."""

    def __init__(self, options: Options, salt: str, base: Base | None) -> None:
        self._options, self._salt = options, salt
        self._space = None if base is None else base.grid.space
        self._runs = {} if base is None else {run.key: run for run in base.runs}
        self._present = frozenset[str]() if base is None else base.subjects
        self._withdrawn = frozenset[str]() if base is None else base.withdrawn | base.listed
        self._cohorts = () if base is None else base.cohorts

    def inspect(self, source: Source) -> Inspected:
        """Read header and side-car of a file; of one whose run the store has, all of it."""
        if not source.subject:
            reason = "no subject: its name has no sub-, and the label table has no line with its file"
            return Inspected(source, refusal=reason)
        withdrawn = self._withdrawal(source.subject)
        if withdrawn is not None:
            return Inspected(source, refusal=withdrawn)
        known = self._runs.get(_key(self._salt, self._options.cohort, source))
        if known is not None:
            return self._known(source, known.source_sha256)
        try:
            stated, space = sidecar_facts(source.sidecars)
            header = read_header(source.path)
            tr = repetition_time(stated if stated is not None else source.tr, header, self._options.expect_tr)
            return Inspected(source, header, tr, self._checked_space(source.space or space))
        except RefusedError as refusal:
            return Inspected(source, refusal=str(refusal))

    def _withdrawal(self, subject: str) -> str | None:
        """Why a subject may not come; one may who is there and was left when another cohort's of the same id went."""
        key = subject_key(self._salt, self._options.cohort, subject)
        if key in self._withdrawn:
            return WITHDRAWN
        if key not in self._present and any(
            subject_key(self._salt, cohort, subject) in self._withdrawn for cohort in self._cohorts
        ):
            return WITHDRAWN_ELSEWHERE
        return None

    def _known(self, source: Source, digest: str) -> Inspected:
        try:
            if sha256(source.path) == digest:
                return Inspected(source, present=True)
        except OSError as error:
            return Inspected(source, refusal=f"the file cannot be read ({error.strerror})")
        reason = "the store has another file of this run (subject, session, task, run): a run is taken once"
        return Inspected(source, refusal=reason)

    def _checked_space(self, stated: str | None) -> str | None:
        grid = self._options.grid
        if stated is not None and stated.lower() in NATIVE_SPACES:
            raise RefusedError(f"native space ({stated}): only runs in a template space are taken")
        if stated is None and grid.space is None:
            raise RefusedError("space unknown: neither name nor side-car tells; say grid.space if you know it")
        if stated is not None and grid.space is not None and stated != grid.space:
            raise RefusedError(f"space {stated} where grid.space is {grid.space}")
        space = stated or grid.space
        if grid.kind == "mni152" and space is not None and not space.startswith("MNI152"):
            raise RefusedError(f"unknown space {space}: grid.kind=mni152 takes MNI152 spaces")
        if self._space is not None and space != self._space:
            raise RefusedError(f"space {space} where the store's is {self._space}")
        return space


def choose_salt(store: Path, salt: str | None) -> str:
    """The salt that the store or its unfinished build has, else the one given, else a random one.

    Raises:
        SwiftError: the one given is not that of the store.
    """
    known = None
    for path in (store / layout.SUBJECTS_FILE, store / layout.STAGING / layout.PLAN_FILE):
        if path.is_file():
            try:
                known = str(json.loads(path.read_text(encoding="utf-8"))["salt"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SwiftError(f"{path} cannot be read: restore it from a copy, or ask the store's owner") from error
            break
    if known is not None and salt is not None and salt != known:
        raise UsageError(f"store {store} was begun with another salt: give that one, or build another store")
    return known or salt or new_salt()


def make_plan(discovery: Discovery, inspected: list[Inspected], options: Options, salt: str, base: Base | None) -> Plan:
    """Settle grid and rows. Rows follow the salted keys, so that they tell nothing of the order of the ids.

    Args:
        discovery: the files.
        inspected: what is known of each.
        options: what the user asks.
        salt: of the keys.
        base: the store that is appended to; None for a new one.

    Returns:
        The plan; without candidates where all good files are in the store already.

    Raises:
        UsageError: runs of several spaces without grid.space, or a grid that cannot be.
        SwiftError: no run is left.
    """
    checked = _without_twins(inspected)
    good = [one for one in checked if one.header is not None and one.refusal is None]
    present = sum(one.present for one in checked)
    refused = tuple(_refused(one, options.cohort, salt) for one in checked if one.refusal is not None)
    if not good and not present:
        raise SwiftError(f"no run can be taken: {reasons([one.reason for one in refused])}")
    first = 0 if base is None else base.rows
    candidates = _candidates(good, options.cohort, salt, first)
    grid, voxels = _new_grid(good, options) if base is None else _grid_of(base)
    frames = max([0 if base is None else base.frames, *(one.header.frames for one in candidates)])
    return Plan(
        version=1 if base is None else base.version + 1,
        salt=salt,
        digest=source_digest(discovery.sources, options, salt),
        grid=grid,
        voxels=voxels,
        first=first,
        frames=frames,
        candidates=candidates,
        refused=refused,
        present=present,
        labels=discovery.labels,
        generated=discovery.generated and (base is None or bool(base.attributes["generated"])),
    )


def _candidates(good: list[Inspected], cohort: str, salt: str, first: int) -> tuple[Candidate, ...]:
    keyed = sorted(((_key(salt, cohort, one.source), one) for one in good), key=lambda pair: pair[0])
    return tuple(
        Candidate(row, key, subject_key(salt, cohort, one.source.subject), cohort, one.source, one.header, one.tr, one.space)
        for row, (key, one) in enumerate(keyed, start=first)
        if one.header is not None and one.space is not None
    )


def _new_grid(good: list[Inspected], options: Options) -> tuple[Grid, npt.NDArray[np.int32]]:
    spaces = Counter(one.space for one in good)
    if len(spaces) > 1:
        counted = ", ".join(f"{space} ({count} runs)" for space, count in sorted(spaces.items(), key=str))
        raise UsageError(f"runs lie in several spaces: {counted}; choose one by grid.space")
    header, space = good[0].header, good[0].space
    if header is None or space is None:
        raise SwiftError("a run without header or space was not refused: report this")
    grid = make_grid(options.grid, space, (header.shape, header.affine))
    return grid, kept_voxels(grid, options.grid.mask)


def _grid_of(base: Base) -> tuple[Grid, npt.NDArray[np.int32]]:
    return base.grid, ShardedArray(base.store / "voxels", OpenShards()).read_row(0)


def _refused(one: Inspected, cohort: str, salt: str) -> Refused:
    subject = subject_key(salt, cohort, one.source.subject) if one.source.subject else ""
    return Refused(_key(salt, cohort, one.source), subject, one.source.relative, one.refusal or "")


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
