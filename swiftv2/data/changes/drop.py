"""Withdrawn consent: a subject's runs become tombstones, and no byte of their data stays in the store.

The index with the tombstones is committed first, so that from then on every reader refuses the runs; then the data go.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swiftv2 import __version__
from swiftv2.data.changes.versions import (
    Base,
    alone_in,
    encode_runs,
    finish_append,
    foreign_files,
    make_staging,
    named_in,
    prune_report,
    read_base,
    read_lines,
    read_subjects,
    remove_staging,
    settle,
    write_lines,
    writing,
)
from swiftv2.data.keys import HEX_DIGITS, bare_subject, subject_key
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json, write_file

HEADERS = ("participant_id", "subject", "subject_id", "sub", "eid", "id", "src_subject_id", "subjectkey")
_SHOWN = 10


@dataclass(frozen=True)
class Subject:
    """A subject that the list names and the store knows; `id` is empty where only the key is known."""

    key: str
    cohort: str
    id: str


@dataclass(frozen=True)
class Withdrawal:
    """What a list of ids comes to in a store.

    Attributes:
        subjects: that the store knows, withdrawn before or not, by key.
        unknown: lines of the list whose subject the store does not know.
        keys: of all subjects, also under which unknown ones might come later, in any of the store's cohorts.
        names: ids that the list gives.
    """

    subjects: tuple[Subject, ...]
    unknown: int
    keys: frozenset[str]
    names: frozenset[str]


@dataclass(frozen=True)
class DropReport:
    """What a drop did, or under `dry_run` would do.

    Attributes:
        version: of the store, afterwards.
        subjects: withdrawn now.
        runs: keys of their runs.
        bytes: of their bold shards.
        already: subjects of the list that were withdrawn before.
        unknown: lines of the list whose subject the store does not know.
        users: what used the subjects, as it was found before ids went; of an interrupted drop, too.
        finished: whether a drop that was killed was finished first.
        leftovers: bold shards that went, of runs that an append left which was killed and given up.
        foreign: files in the folder that the format does not know: they stay, and may be copies of withdrawn data.
    """

    version: int
    subjects: tuple[str, ...]
    runs: tuple[str, ...]
    bytes: int
    already: int
    unknown: int
    users: tuple[dict[str, Any], ...]
    finished: bool = False
    leftovers: int = 0
    foreign: tuple[str, ...] = ()


def read_withdrawals(store: Path, listed: Path, cohort: str | None = None, *, ignore_unknown: bool = False) -> Withdrawal:
    """Find the subjects of a list.

    Args:
        store: folder of the store.
        listed: text file, one subject a line: its id with or without `sub-`, cohort/id, or its pseudonymous key. Blank lines,
            `#` comments and a header line are passed over.
        cohort: of ids that several cohorts have.
        ignore_unknown: whether lines may name subjects that the store does not know.

    Raises:
        UsageError: the list cannot be read or is empty, or lines are unknown or not clear; told by their numbers.
        SwiftError: no store, or its file of ids cannot be read.
    """
    base = read_base(store)
    book = _Book(base, str(read_subjects(store)["salt"]), cohort)
    found: dict[str, Subject] = {}
    keys: set[str] = set()
    ids: set[str] = set()
    strangers, unknown, several = 0, [], []
    lines = _names(listed)
    if not lines:
        raise UsageError(f"{listed} names no subject: give a text file, one subject a line")
    for number, name in lines:
        subjects = book.find(name)
        ids |= book.ids(name)
        keys |= {subject.key for subject in subjects} or book.keys(name)
        if not subjects:
            strangers += 1
            if not book.heard_of(name):
                unknown.append(number)
        elif len(subjects) > 1:
            several.append(number)
        else:
            known = found.get(subjects[0].key)
            found[subjects[0].key] = subjects[0] if known is None or not known.id else known
    if several:
        raise UsageError(f"{listed}, {_lines(several)}: several cohorts have this id: say --cohort NAME, or write cohort/id")
    if unknown and not ignore_unknown:
        raise UsageError(
            f"{listed}, {_lines(unknown)}: not in {store}: mend the list, or say --ignore-unknown where it names others too"
        )
    return Withdrawal(tuple(found[key] for key in sorted(found)), strangers, frozenset(keys), frozenset(ids))


def _names(listed: Path) -> list[tuple[int, str]]:
    try:
        lines = listed.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{listed} cannot be read ({reason}): give a text file, one subject a line") from error
    names = [(number, line.split("#")[0].strip().strip('"')) for number, line in enumerate(lines, start=1)]
    names = [(number, name) for number, name in names if name]
    return names[1:] if names and names[0][1].lower() in HEADERS else names


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")
    return f"line {shown}" if len(numbers) == 1 else f"lines {shown}"


class _Book:
    """Finds subjects by any of their names: those of the index, and those whose runs were refused or given up."""

    def __init__(self, base: Base, salt: str, cohort: str | None) -> None:
        known = read_subjects(base.store)["subjects"]
        ids = {key: one["id"] for key, one in known.items()}
        self._known = {run.subject: Subject(run.subject, run.cohort, ids.get(run.subject, "")) for run in base.runs}
        self._report = read_lines(base.store / layout.REPORT_FILE)
        self._named = {str(line.get("subject", "")) for line in self._report} | known.keys()
        self._listed = base.listed
        cohorts = base.cohorts
        if cohort is not None and cohort not in cohorts:
            raise UsageError(f"{base.store} has no cohort {cohort}: it has {', '.join(cohorts)}")
        self._salt = salt
        self._cohorts = list(cohorts) if cohort is None else [cohort]

    def find(self, name: str) -> list[Subject]:
        """All subjects that the name may mean."""
        if _is_key(name) and name in self._known:
            return [self._known[name]]
        keyed = {subject_key(self._salt, cohort, text): (cohort, text) for cohort, text in self._pairs(name)}
        return [Subject(key, *names) for key, names in keyed.items() if key in self._known or key in self._named]

    def keys(self, name: str) -> set[str]:
        """Keys under which a subject of this name may come."""
        return {name} if _is_key(name) else {subject_key(self._salt, *pair) for pair in self._pairs(name)}

    def ids(self, name: str) -> set[str]:
        """Ids that the name may mean."""
        return set() if _is_key(name) else {text for _, text in self._pairs(name)}

    def heard_of(self, name: str) -> bool:
        """Whether a former list gave the name, or a file of which nobody tells the subject has it in its own name."""
        ids = frozenset(self.ids(name))
        return self.keys(name) <= self._listed or any(named_in(line, ids) for line in self._report)

    def _pairs(self, name: str) -> list[tuple[str, str]]:
        """Cohorts and ids that the name may mean."""
        pairs = [(cohort, name) for cohort in self._cohorts]
        pairs += [(cohort, name.removeprefix(f"{cohort}/")) for cohort in self._cohorts if name.startswith(f"{cohort}/")]
        return [(cohort, bare_subject(text)) for cohort, text in pairs]


def _is_key(name: str) -> bool:
    return re.fullmatch(rf"s[0-9a-f]{{{HEX_DIGITS}}}", name) is not None


def drop(store: Path, withdrawal: Withdrawal, users: Iterable[dict[str, Any]] = (), *, dry_run: bool = False) -> DropReport:
    """Take subjects out of a store; what a killed drop left to do is done first.

    Their runs keep their rows and their lines in the index, as tombstones: with keys, names, length and times, without
    anything computed from their data. Memory: one shard of a small array.

    Args:
        store: folder of the store.
        withdrawal: what `read_withdrawals` found there.
        users: what used the subjects, as plain values; kept in the store.
        dry_run: whether to change nothing.

    Raises:
        UsageError: a build or append is unfinished.
        SwiftError: no store, a damaged one, or a failure to write.
    """
    listed = tuple(users)
    if dry_run:
        return _report(read_base(store), withdrawal, listed)
    former = finish_drop(store)
    finish_append(store)
    if layout.unfinished(store) == "append":
        raise UsageError(
            f"{store}: an append is unfinished: give it again and then this, or give it up by removing {store / layout.STAGING}"
        )
    layout.read_attributes(store)
    with writing(store, "drop"):
        make_staging(store, layout.DROPPING)
        with alone_in(store, layout.DROPPING):
            _check_alone(store)
            base = read_base(store)
            report = _report(base, withdrawal, listed or tuple(former["users"] if former else ()))
            plan = {
                "version": base.version + bool(report.runs),
                "subjects": list(report.subjects),
                "users": list(listed),
                "listed": sorted(withdrawal.keys),
                "names": sorted(withdrawal.names),
            }
            write_file(store / layout.DROPPING / layout.PLAN_FILE, json.dumps(plan), layout.PRIVATE)
            leftovers = _carry_out(store, plan)
    now = read_base(store)
    foreign = foreign_files(now)
    return replace(report, version=now.version, finished=former is not None, leftovers=leftovers, foreign=foreign)


def _report(base: Base, withdrawal: Withdrawal, users: tuple[dict[str, Any], ...]) -> DropReport:
    runs = [run for run in base.runs if run.subject in withdrawal.keys and run.present]
    now = {run.subject for run in runs}
    return DropReport(
        version=base.version,
        subjects=tuple(sorted(now)),
        runs=tuple(run.key for run in runs),
        bytes=sum(run.bytes for run in runs),
        already=len(withdrawal.keys & base.withdrawn - now),
        unknown=withdrawal.unknown,
        users=users,
    )


def _check_alone(store: Path) -> None:
    """Both kinds of change make their folder first and then look for the other's: at least one of two sees the other."""
    if (store / layout.STAGING).is_dir():
        remove_staging(store, layout.DROPPING)
        raise SwiftError(f"{store} is being changed by another process: let it end, or stop it first")


def finish_drop(store: Path) -> dict[str, Any] | None:
    """Do what a killed drop left to do, if there was one.

    Returns:
        Its plan, with `users`, what used its subjects; None where there was none.

    Raises:
        SwiftError: another process is at work there, the store is damaged, or a failure to write.
    """
    kept = store / layout.DROPPING / layout.PLAN_FILE
    if not (store / layout.DROPPING).is_dir():
        return None
    with writing(store, "drop"), alone_in(store, layout.DROPPING):
        if not kept.is_file():
            remove_staging(store, layout.DROPPING)
            return None
        plan = _read_plan(kept)
        _carry_out(store, plan)
    return plan


def _read_plan(path: Path) -> dict[str, Any]:
    plan = {"listed": [], "names": []} | read_json(path)
    try:
        int(plan["version"])
        lists = [plan[name] for name in ("subjects", "users", "listed", "names")]
    except (KeyError, TypeError, ValueError):
        lists = [None]
    if not all(isinstance(one, list) for one in lists):
        raise SwiftError(f"{path} is damaged: remove {path.parent}, then give `swiftv2 store drop` of the same list again")
    return plan


def _carry_out(store: Path, plan: dict[str, Any]) -> int:
    """Commit the tombstones, then remove the data; every step may be done again. Returns the leftovers that went."""
    base, version, subjects = read_base(store), int(plan["version"]), frozenset(plan["subjects"])
    gone = [run.key for run in base.runs if run.subject in subjects]
    if any(run.present and run.subject in subjects for run in base.runs):
        version = base.version + 1
        runs = tuple(tombstone(run, version) if run.subject in subjects and run.present else run for run in base.runs)
        index = encode_runs(runs)
        write_file(store / layout.index_name(version), index)
        layout.write_attributes(store, _attributes(base, version, runs, index))
    _remember(base, version, gone, plan)
    leftovers = settle(store)
    prune_report(store, frozenset(plan["listed"]), frozenset(plan["names"]))
    if any(run.present and run.subject in subjects for run in read_base(store).runs):
        raise SwiftError(f"{store}: runs of the list are there again, by another process: give `swiftv2 store drop` again")
    remove_staging(store, layout.DROPPING)
    return leftovers


def _remember(base: Base, version: int, gone: list[str], plan: dict[str, Any]) -> None:
    """Add a line to the withdrawals: what went, and who else is not to come; nothing where all of it stands there."""
    path = base.store / layout.WITHDRAWALS_FILE
    lines = read_lines(path)
    if gone:  # A killed attempt may have written its line.
        lines = [line for line in lines if line["version"] < version]
    heard = base.withdrawn.union(plan["subjects"], *(line.get("listed", ()) for line in lines))
    listed = sorted(frozenset(plan["listed"]) - heard)
    if gone or listed:
        subjects = sorted(plan["subjects"])
        lines.append({"version": version, "subjects": subjects, "runs": gone, "users": plan["users"], "listed": listed})
        write_lines(path, lines)


def _attributes(base: Base, version: int, runs: tuple[Run, ...], index: bytes) -> dict[str, Any]:
    change = {
        "version": version,
        "change": "drop",
        "runs": len(runs),
        "runs_sha256": hashlib.sha256(index).hexdigest(),
        "writer": f"swiftv2 {__version__}",
        "withdrawn": sum(run.withdrawn == version for run in runs),
    }
    return base.attributes | {
        "version": version,
        "writer": change["writer"],
        "index": layout.index_name(version),
        "runs_sha256": change["runs_sha256"],
        "history": [*base.attributes["history"], change],
    }


def tombstone(run: Run, version: int) -> Run:
    """What is kept of a run: its names and keys, its row, its length and times; nothing computed from its data."""
    return replace(
        run,
        slope=0.0,
        intercept=0.0,
        statistics=(0.0,) * len(run.statistics),
        brain_voxels=0,
        brain_rule="",
        coverage=0.0,
        values="",
        max_error=0.0,
        resampled=False,
        cleaned=False,
        confounds=(),
        source_orientation="",
        source_shape=(),
        source_affine=(),
        source_sha256="",
        bytes=0,
        cleaning={},
        withdrawn=version,
    )
