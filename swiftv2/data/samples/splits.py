"""Which subjects train, validate and test.

Subjects are divided, never runs or clips, and a subject is in one part only. The split by seed gives every subject (or
family) a number in [0, 1) that depends on the seed and its key alone, and cuts that line by the fractions: a subject who
joins or leaves the store moves no other. Only where a part would stay empty does it take the subject next to it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from swiftv2.config.data import SplitConfig
from swiftv2.data import keyed
from swiftv2.errors import UsageError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
_HEADERS: dict[str, Part] = {f"{part}{tail}": part for part in PARTS for tail in ("", "_subjects")}


@dataclass(frozen=True)
class Splits:
    """Pseudonymous keys of the subjects of each part, sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    unassigned: tuple[str, ...] = ()
    """Subjects of the store that a split file does not name, or that a share of the training subjects leaves out: used
    nowhere, for the caller to report."""

    def part(self, name: Part) -> tuple[str, ...]:
        """Subjects of one part."""
        parts: dict[Part, tuple[str, ...]] = {"train": self.train, "val": self.val, "test": self.test}
        return parts[name]


def split_subjects(
    config: SplitConfig,
    subjects: Collection[str],
    *,
    ids: Mapping[str, str] | None = None,
    families: Mapping[str, str] | None = None,
) -> Splits:
    """Divide the subjects of a store by the configured file, or by seed and fractions, and take the share to train on.

    Args:
        config: file, or seed and fractions.
        subjects: pseudonymous keys of all subjects of the store.
        ids: key of each subject by the names that a split file may use (the id, or cohort/id); needed for a file that
            does not give pseudonymous keys.
        families: family of subjects by their key, where a label table knows it; the split by seed keeps a family together.

    Raises:
        UsageError: the file is wrong (line named, never the subject), or there are too few subjects for the parts.
    """
    if config.file is not None:
        splits = split_by_file(config.file, subjects, ids or {})
    else:
        splits = split_by_seed(config.seed, config.fractions, subjects, families or {})
    return take_share(splits, config.train_share, config.seed)


def take_share(splits: Splits, share: float, seed: int) -> Splits:
    """A share of the training subjects, at least one; the others are used nowhere.

    Subjects come in an order that depends on seed and key alone, so that a smaller share lies within a larger one.

    Args:
        splits: all parts.
        share: above 0, at most 1.
        seed: of the order.
    """
    wanted = max(round(share * len(splits.train)), 1)
    if wanted == len(splits.train):
        return splits
    line = sorted(splits.train, key=lambda subject: (keyed.uniform(seed, "train_share", subject), subject))
    unused = tuple(sorted((*splits.unassigned, *line[wanted:])))
    return replace(splits, train=tuple(sorted(line[:wanted])), unassigned=unused)


def split_by_seed(
    seed: int,
    fractions: tuple[float, float, float],
    subjects: Collection[str],
    families: Mapping[str, str] | None = None,
) -> Splits:
    """Divide subjects by chance; a pure function of its arguments (see the module's head).

    Raises:
        UsageError: there are fewer subjects (or families) than parts with a share.
    """
    known = families or {}
    units: dict[str, list[str]] = {}
    for subject in sorted(set(subjects)):
        family = known.get(subject)
        units.setdefault(f"family {family}" if family else f"subject {subject}", []).append(subject)
    wanted = [i for i, share in enumerate(fractions) if share > 0]
    if len(units) < len(wanted):
        raise UsageError(
            f"{len(units)} subjects or families cannot fill the {len(wanted)} parts of data.split.fractions={fractions}: "
            "add subjects or set a part's share to 0"
        )
    line = sorted((keyed.uniform(seed, "split", unit), unit) for unit in units)
    bounds = (fractions[0], fractions[0] + fractions[1])
    parts = [min(sum(place >= bound for bound in bounds), wanted[-1]) for place, _ in line]
    _fill_empty_parts(parts, wanted)
    members: list[list[str]] = [[], [], []]
    for part, (_, unit) in zip(parts, line, strict=True):
        members[part] += units[unit]
    train, val, test = (tuple(sorted(m)) for m in members)
    return Splits(train, val, test)


def split_by_file(path: Path, subjects: Collection[str], ids: Mapping[str, str]) -> Splits:
    """Divide subjects by a text file: headers train, val, test (or train_subjects, ...), one subject a line below each.

    Blank lines and lines that begin with # are passed over.

    Args:
        path: the file.
        subjects: pseudonymous keys of all subjects of the store.
        ids: key of each subject by the names that the file may use beside the keys themselves.

    Raises:
        UsageError: the file cannot be read, names a subject before any header, one that the store does not have, or one
            in two parts, or names nobody to train on. Messages give the line's number, not the subject.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{path}: cannot be read ({reason}); give a split file for data.split.file") from error
    known = set(subjects)
    placed: dict[str, Part] = {}
    part: Part | None = None
    for number, text in _content(lines):
        if text in _HEADERS:
            part = _HEADERS[text]
            continue
        if part is None:
            raise UsageError(f"{path}, line {number}: a subject before any header; begin with a line that says train")
        subject = ids.get(text, text)
        if subject not in known:
            raise UsageError(f"{path}, line {number}: this subject is not in the store; correct or remove the line")
        if placed.setdefault(subject, part) != part:
            raise UsageError(
                f"{path}, line {number}: this subject is in {placed[subject]} and in {part}; keep one of the lines"
            )
    if "train" not in placed.values():
        raise UsageError(f"{path}: no subject under the header train; list the training subjects")
    train, val, test = (tuple(sorted(s for s, p in placed.items() if p == name)) for name in PARTS)
    return Splits(train, val, test, unassigned=tuple(sorted(known - placed.keys())))


def _content(lines: Iterable[str]) -> Iterable[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        text = line.strip().lstrip("\ufeff")
        if text and not text.startswith("#"):
            yield number, text


def _fill_empty_parts(parts: list[int], wanted: list[int]) -> None:
    """Let each wanted part without a unit take the nearest one, on the line, of a part that has more than one."""
    for part in wanted:
        if part in parts:
            continue
        # Everything left of this place belongs to earlier parts, so nearest means fewest places away.
        border = sum(p < part for p in parts)
        free = [i for i, p in enumerate(parts) if parts.count(p) > 1]
        parts[min(free, key=lambda i: (abs(i - border + 0.5), i))] = part
