"""Which subjects of a downstream task train, validate and test: by file, chance, folds, sites, or few to learn from.

Subjects who must stay together (one family) form a group, and whole groups are dealt to the parts. A group goes where its
classes (or fifths of a number) are furthest below their share, and among equals where subjects are: the divisor method of
Sainte-Lague, which favours neither large nor small parts. Who comes first is drawn from the seed and the members' keys
alone, so that a split depends neither on the order of its units nor on what was drawn before.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swiftv2.config.task import TaskSplitConfig
from swiftv2.data import keyed
from swiftv2.data.samples.splits import PARTS, Splits, split_by_file
from swiftv2.errors import SwiftError, UsageError

FIFTHS = (0.2, 0.4, 0.6, 0.8)
"""Quantiles between which a number is in one stratum."""


@dataclass(frozen=True)
class Unit:
    """What is divided: a subject, or a run where the split says so."""

    key: str
    """Pseudonymous key of the unit."""
    subject: str
    """Pseudonymous key of its subject."""
    family: str | None = None
    """Family of the subject, where known."""
    site: str | None = None
    """Site of the unit, where known."""
    value: str | float | None = None
    """First target, for stratifying: a class, a number, or nothing where it is missing."""


@dataclass(frozen=True)
class _Group:
    """Units that stay together, in the order of their keys, and the stratum of each: None without a value."""

    units: tuple[Unit, ...]
    strata: tuple[int | None, ...]

    @cached_property
    def name(self) -> str:
        return "\n".join(unit.key for unit in self.units)

    @cached_property
    def counts(self) -> Counter[int]:
        """Units of each stratum."""
        return Counter(stratum for stratum in self.strata if stratum is not None)

    def only(self, kept: Iterable[Unit]) -> "_Group":
        """The same group without some of its units."""
        keys = {unit.key for unit in kept}
        pairs = [(unit, stratum) for unit, stratum in zip(self.units, self.strata, strict=True) if unit.key in keys]
        return _Group(tuple(unit for unit, _ in pairs), tuple(stratum for _, stratum in pairs))


def split_units(config: TaskSplitConfig, units: Sequence[Unit], ids: Mapping[str, str] | None = None) -> Splits:
    """Divide the units of a task; a pure function of its arguments, whatever the order of the units.

    Units without a value are dealt like the others, and count for no class. With few shots they are never shots.

    Args:
        config: kind of split, and which of its folds or draws.
        units: all units that have any of the task's targets; keys are unique.
        ids: key of each unit by the names that a split file may use (kind=file).

    Returns:
        Keys of the units by part. Unassigned are those whom a file does not name, who have no site, or whose relatives are
        in another part than their own site or the number of shots would put them in.

    Raises:
        UsageError: there are too few units, sites or values for the split; the message says how many there are.
        SwiftError: a split file puts a subject or family into two parts.
    """
    if len({unit.key for unit in units}) != len(units):
        raise ValueError("a unit comes twice")
    if config.unit == "run" and config.kind == "site":
        raise UsageError("split: kind=site divides subjects by where they were scanned: take unit=subject")
    ordered = sorted(units, key=lambda unit: unit.key)
    if config.kind == "file":
        splits = _by_file(config, ordered, ids or {})
    else:
        groups = _groups(config, ordered)
        if config.kind == "seed":
            dealt = _deal(groups, config.fractions, config.seed, f"task draw {config.index}")
            splits = _splits(dealt)
        elif config.kind == "kfold":
            splits = _fold(config, groups)
        elif config.kind == "site":
            splits = _by_site(config, groups)
        else:
            splits = _few_shot(config, groups)
    check_leak(splits, ordered, subjects=config.unit == "subject", families=config.unit == "subject" and config.families)
    return splits


def check_leak(splits: Splits, units: Iterable[Unit], *, subjects: bool = True, families: bool = True) -> None:
    """Make sure that nobody, and no family, is in two parts.

    Args:
        splits: keys of units by part; the unassigned are used nowhere and may be anybody.
        units: all units that the parts name.
        subjects: whether a subject must not be in two parts; False where runs are divided.
        families: whether a family must not.

    Raises:
        SwiftError: a unit, subject or family is in two parts; how many are, and in which.
    """
    known = {unit.key: unit for unit in units}
    found: dict[str, dict[str, set[str]]] = {"unit": {}, "subject": {}, "family": {}}
    for part in PARTS:
        for key in splits.part(part):
            if key not in known:
                raise SwiftError(
                    f"split: {part} names a unit that the task does not have ({key}): the split is of another task"
                )
            unit = known[key]
            names = {"unit": key, "subject": unit.subject if subjects else None, "family": unit.family if families else None}
            for kind, name in names.items():
                if name:
                    found[kind].setdefault(name, set()).add(part)
    for kind, places in found.items():
        across = [places[name] for name in sorted(places) if len(places[name]) > 1]
        if across:
            parts = " and ".join(part for part in PARTS if part in set().union(*across))
            many = {"unit": "units are", "subject": "subjects are", "family": "families are"}[kind]
            mend = "set split.families=false to allow relatives apart, or " if kind == "family" else ""
            raise SwiftError(f"split: {len(across)} {many} in more than one of {parts}: {mend}keep each in one part")


def _by_file(config: TaskSplitConfig, units: Sequence[Unit], ids: Mapping[str, str]) -> Splits:
    assert config.file is not None  # noqa: S101 - the configuration says so
    splits = split_by_file(config.file, [unit.key for unit in units], ids)
    if not splits.val:
        raise UsageError(f"{config.file}: no line under the header val; list those who validate: they choose the best step")
    return splits


def _fold(config: TaskSplitConfig, groups: Sequence[_Group]) -> Splits:
    """One fold of `count` tests; the folds are the same for every index."""
    folds = _deal(groups, (1.0 / config.count,) * config.count, config.seed, "task folds")
    rest = [group for number, fold in enumerate(folds) if number != config.index for group in fold]
    return _splits((*_validation(config, rest), folds[config.index]))


def _by_site(config: TaskSplitConfig, groups: Sequence[_Group]) -> Splits:
    """Whole sites test. Relatives elsewhere of those who test are left out, for they may not train."""
    sites = sorted({unit.site for group in groups for unit in group.units if unit.site})
    if len(sites) < 2:
        raise UsageError(f"split: column {config.site_column} names {len(sites)} sites; kind=site needs 2 or more")
    if config.test_sites is not None:
        unknown = sorted(set(config.test_sites) - set(sites))
        if unknown:
            raise UsageError(
                f"split: test_sites {unknown} are not among the {len(sites)} sites of {config.site_column}: {sites}"
            )
        testing = set(config.test_sites)
    elif config.index < len(sites):
        testing = {sites[config.index]}
    else:
        raise UsageError(f"split: index={config.index} is beyond the {len(sites)} sites; it begins at 0")
    if testing == set(sites):
        raise UsageError(f"split: all {len(sites)} sites test; leave some in training")
    rest: list[_Group] = []
    test: list[_Group] = []
    unassigned: list[str] = []
    for group in groups:
        tests = any(unit.site in testing for unit in group.units)
        kept = [unit for unit in group.units if unit.site and (unit.site in testing) == tests]
        unassigned += [unit.key for unit in group.units if unit not in kept]
        if kept:
            (test if tests else rest).append(group.only(kept))
    return _splits((*_validation(config, rest), test), unassigned)


def _validation(config: TaskSplitConfig, rest: Sequence[_Group]) -> list[list[_Group]]:
    """Train and val, of the groups that do not test."""
    return _deal(rest, (1.0 - config.val_share, config.val_share), config.seed, f"task validation {config.index}")


def _few_shot(config: TaskSplitConfig, groups: Sequence[_Group]) -> Splits:
    """Exactly `shots` units train and `val_shots` validate, of the same shares of strata; all others test.

    Whole families are taken where they fit. Where only larger ones are left, some members are used, and the others, who
    may not test, nowhere.
    """
    val_shots = config.val_shots or max(round(config.shots / 4), 1)
    have: Counter[int] = Counter()
    for group in groups:
        have.update(group.counts)
    total = sum(have.values())
    if total < config.shots + val_shots + 1:
        raise UsageError(
            f"split: {config.shots} shots, {val_shots} to validate and at least 1 to test need {config.shots + val_shots + 1} "
            f"subjects with a value; there are {total}: take fewer shots"
        )
    purpose = f"task shots {config.index}"
    line = sorted(groups, key=lambda group: (keyed.uniform(config.seed, purpose, group.name), group.name))
    train_quota = _quota(config.shots, have)
    val_quota = _quota(val_shots, train_quota)
    train, used = _take(line, train_quota)
    line = [group for group in line if group.name not in used]
    val, also_used = _take(line, val_quota)
    test = [group for group in line if group.name not in also_used]
    missing = config.shots + val_shots - sum(len(group.units) for group in (*train, *val))
    if missing or not any(group.counts for group in test):
        raise UsageError(
            f"split: {config.shots} shots and {val_shots} to validate leave nobody to test, or lack {missing}, among {total} "
            f"subjects in {len(groups)} families: take fewer shots"
        )
    taken = {unit.key for group in (*train, *val) for unit in group.units}
    relatives = [u.key for g in groups if g.name in used | also_used for u in g.units if u.key not in taken]
    return _splits((train, val, test), relatives)


def _quota(wanted: int, have: Mapping[int, int]) -> dict[int, int]:
    """Share a number out over strata by what they have, largest remainders first, nobody beyond what there is."""
    total = sum(have.values())
    exact = {stratum: wanted * count / total for stratum, count in sorted(have.items())}
    quota = {stratum: int(share) for stratum, share in exact.items()}
    for stratum in sorted(exact, key=lambda s: (quota[s] - exact[s], s)):
        if sum(quota.values()) < wanted:
            quota[stratum] += 1
    return quota


def _take(line: Sequence[_Group], quota: Mapping[int, int]) -> tuple[list[_Group], set[str]]:
    """Fill the quota of each stratum, first with whole groups, then with members of groups; and the names of those touched."""
    left = Counter(quota)
    taken: list[_Group] = []
    used: set[str] = set()
    for group in line:
        if None not in group.strata and all(left[stratum] >= count for stratum, count in group.counts.items()):
            left.subtract(group.counts)
            taken.append(group)
            used.add(group.name)
    for group in line:
        members = []
        for unit, stratum in zip(group.units, group.strata, strict=True) if group.name not in used else ():
            if stratum is not None and left[stratum] > 0:
                left[stratum] -= 1
                members.append(unit)
        if members:
            taken.append(group.only(members))
            used.add(group.name)
    return taken, used


def _groups(config: TaskSplitConfig, units: Sequence[Unit]) -> list[_Group]:
    """Units in groups that stay together: of one subject, and of one family; runs each on their own."""
    strata = _strata([unit.value for unit in units], config.stratify)
    # Names of subjects and families, each tied to the first name that it was met with.
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    names = []
    for unit in units:
        if config.unit == "run":
            names.append(f"run {unit.key}")
            continue
        names.append(f"subject {unit.subject}")
        if config.families and unit.family:
            root[find(names[-1])] = find(f"family {unit.family}")
    members: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        members.setdefault(find(name), []).append(place)
    return [_Group(tuple(units[i] for i in m), tuple(strata[i] for i in m)) for m in members.values()]


def _strata(values: Sequence[str | float | None], stratify: bool) -> list[int | None]:
    """Number of each value's class or fifth; all 0 where nothing is to be kept alike, or no value is known."""
    there = [value is not None and not (isinstance(value, float) and math.isnan(value)) for value in values]
    if not any(there):
        return [0] * len(values)
    known = [value for value, is_there in zip(values, there, strict=True) if is_there and value is not None]
    if not stratify:
        numbers = [0] * len(known)
    elif any(isinstance(value, str) for value in known):
        places = {name: place for place, name in enumerate(sorted({str(value) for value in known}))}
        numbers = [places[str(value)] for value in known]
    else:
        edges = np.quantile(np.array(known, dtype=np.float64), FIFTHS)
        numbers = [int(np.searchsorted(edges, float(value), "left")) for value in known]
    following = iter(numbers)
    return [next(following) if is_there else None for is_there in there]


def _deal(groups: Sequence[_Group], shares: Sequence[float], seed: int, purpose: str) -> list[list[_Group]]:
    """Deal groups to parts of these shares; every part gets one that has a value.

    Families come first, for those who stand alone can even out what they leave; these come stratum by stratum, so that
    parts are alike in size too.
    """
    totals: Counter[int] = Counter()
    for group in groups:
        totals.update(group.counts)
    draw = {group.name: keyed.uniform(seed, purpose, group.name) for group in groups}

    def turn(group: _Group) -> tuple[bool, float, float, str]:
        alone = len(group.units) == 1
        stratum = min(group.counts, default=np.inf) if alone else 0.0
        return alone, stratum, draw[group.name], group.name

    parts: list[list[_Group]] = [[] for _ in shares]
    counts: list[Counter[int]] = [Counter() for _ in shares]
    sizes = [0] * len(shares)
    for group in sorted(groups, key=turn):
        size = len(group.units)

        def cost(part: int, group: _Group = group, size: int = size) -> tuple[float, float, float]:
            # The rise of the squared distances from the shares, less what is the same for all parts.
            excess = sum((2 * counts[part][s] * n + n * n) / totals[s] for s, n in group.counts.items()) / shares[part]
            crowd = (2 * sizes[part] * size + size * size) / shares[part]
            return excess, crowd, keyed.uniform(seed, f"{purpose} part {part}", group.name)

        part = min(range(len(shares)), key=cost)
        parts[part].append(group)
        counts[part].update(group.counts)
        sizes[part] += size
    _fill_empty(parts, draw)
    return parts


def _fill_empty(parts: list[list[_Group]], draw: Mapping[str, float]) -> None:
    """Let each part without a value take the smallest group that has one from the part with the most such groups."""

    def valued(part: int) -> list[_Group]:
        return [group for group in parts[part] if group.counts]

    for part in range(len(parts)):
        if valued(part):
            continue
        donor = max(range(len(parts)), key=lambda p: len(valued(p)))
        if len(valued(donor)) < 2:
            number = sum(len(valued(p)) for p in range(len(parts)))
            raise UsageError(
                f"split: {number} subjects or families with a value cannot fill {len(parts)} parts: "
                "take fewer folds, another kind of split, or more subjects"
            )
        moved = min(valued(donor), key=lambda group: (len(group.units), draw[group.name], group.name))
        parts[donor].remove(moved)
        parts[part].append(moved)


def _splits(parts: Sequence[Sequence[_Group]], unassigned: Iterable[str] = ()) -> Splits:
    train, val, test = (tuple(sorted(unit.key for group in part for unit in group.units)) for part in parts)
    return Splits(train, val, test, unassigned=tuple(sorted(unassigned)))
