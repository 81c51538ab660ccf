"""What used subjects who withdraw consent: runs, exported weights, embeddings, by the hashes and keys that their cards hold."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swiftv2 import weights
from swiftv2.data.changes.drop import Withdrawal
from swiftv2.data.store.reader import read_index
from swiftv2.errors import SwiftError, UsageError
from swiftv2.recipes.data import CONTRACT

KINDS = {CONTRACT: "run", weights.CARD: "weights"}
_LARGEST = 1 << 28
"""Bytes of a file that is looked into at most: hashes of a million subjects take a quarter of that."""


@dataclass(frozen=True)
class User:
    """Something that was made from subjects.

    Attributes:
        path: the run directory, the folder of exported weights, or the card of anything else.
        kind: `run`, `weights` or `other`.
        trained_on: how many of the subjects it was trained on; None where its card lists no subjects.
        evaluated_on: how many it was evaluated on, which also chose its best checkpoint and may be in its pictures; None
            where its card does not tell (only runs on this store do).
        this_store: whether it names this store; None where it names none.
    """

    path: str
    kind: str
    trained_on: int | None
    evaluated_on: int | None
    this_store: bool | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Search:
    """What a search for users came to.

    Attributes:
        users: by path, all that used any of the subjects, and all whose card cannot tell.
        cards: how many cards were looked at.
    """

    users: tuple[User, ...]
    cards: int


def find_users(paths: Iterable[Path], store: Path, withdrawal: Withdrawal) -> Search:
    """Search folders for what used subjects.

    Every JSON file counts as a card that holds `subjects`, as runs and exported weights do: either null, or a salt and hashes.

    Args:
        paths: folders, searched with all below them, or single cards.
        store: folder of the store that the subjects leave.
        withdrawal: the subjects. One of whom the list gives only the key, and whose id is gone, cannot be found.

    Raises:
        UsageError: a path is not there, or subjects cannot be looked for since their ids are not known.
        SwiftError: no store.
    """
    nameless = sum(not subject.id for subject in withdrawal.subjects)
    if nameless:
        raise UsageError(f"{store} no longer has the ids of {nameless} of the listed keys: list their ids instead")
    attributes, runs = read_index(store)
    known = _Known(withdrawal, str(attributes["store_id"]), {run.key: run.subject for run in runs})
    found: dict[str, User | None] = {}
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} is not there: --used-by takes folders of runs, exported weights or embeddings")
        for card in _cards(path):
            content = _content(card)
            if content is not None:
                found[str(card)] = _user(card, content, known)
    users = {user for user in found.values() if user is not None}
    return Search(tuple(sorted(users, key=lambda user: user.path)), len(found))


def _cards(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path, onerror=_complain):
        if "zarr.json" in names:
            folders.clear()
            continue
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".json"))


def _complain(error: OSError) -> None:
    raise SwiftError(f"{error.filename} cannot be searched ({error.strerror}): ask its owner, or name other folders")


@dataclass(frozen=True)
class _Known:
    """Whom to look for, in what store; `subjects` has the subject of each of its runs, both by key."""

    withdrawal: Withdrawal
    store_id: str
    subjects: Mapping[str, str]


def _content(card: Path) -> dict[str, Any] | None:
    """What a file holds, or None where it is no card."""
    try:
        if card.stat().st_size > _LARGEST:
            return None
        content = json.loads(card.read_bytes())
    except OSError as error:
        raise SwiftError(f"{card} cannot be read ({error.strerror}): ask its owner, or name other folders") from error
    except ValueError:
        return None
    return content if isinstance(content, dict) and "subjects" in content else None


def _user(card: Path, content: dict[str, Any], known: _Known) -> User | None:
    """What a card says, or None where it used none of the subjects; of a damaged one nobody can tell."""
    kind = KINDS.get(card.name, "other")
    path, named = str(card if kind == "other" else card.parent), _store_of(content)
    this_store = None if named is None else named == known.store_id
    try:
        trained = _trained_on(content, known, own=this_store is True)
        evaluated = _evaluated_on(content, known) if this_store else None
    except (KeyError, TypeError, ValueError):
        return None if kind == "other" else User(path, kind, None, None, this_store)
    return None if trained == 0 and not evaluated else User(path, kind, trained, evaluated, this_store)


def _trained_on(content: dict[str, Any], known: _Known, *, own: bool) -> int | None:
    """How many of the subjects are listed by salted hash or, in a run on this store, by key; None where none are listed."""
    hashed = content["subjects"]
    keys = content["splits"]["train"] if own and "splits" in content else None
    if hashed is None and keys is None:
        return None
    salt, hashes = ("", []) if hashed is None else (hashed["salt"], hashed["hashes"])
    listed = {*hashes, *(keys or ())}
    return sum(
        one.key in listed or weights.hash_subject(f"{one.cohort}/{one.id}", salt) in listed for one in known.withdrawal.subjects
    )


def _evaluated_on(content: dict[str, Any], known: _Known) -> int | None:
    """How many of the subjects gave held-out clips to a run on this store; keys compare within one store only."""
    if "splits" not in content:
        return None
    # Of the parts val and test a run evaluates one: the one whose runs it cut into clips.
    cut = {known.subjects.get(run) for run in content["clips"]}
    heldout = {*content["splits"]["val"], *content["splits"]["test"]} & cut
    return sum(one.key in heldout for one in known.withdrawal.subjects)


def _store_of(content: dict[str, Any]) -> str | None:
    """The store that a card names, at its top or in its provenance."""
    provenance = content.get("provenance")
    for place in (content, provenance if isinstance(provenance, dict) else {}):
        store = place.get("store")
        if isinstance(store, dict) and store.get("id"):
            return str(store["id"])
    return None
