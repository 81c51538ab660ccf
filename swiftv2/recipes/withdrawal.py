"""What used subjects who withdraw consent: runs, exported weights, embeddings, by the salted hashes that their cards hold."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swiftv2 import weights
from swiftv2.data.changes.drop import Withdrawal
from swiftv2.data.store.layout import read_attributes
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
        subjects: how many of the subjects it used; None where its card lists no subjects.
        this_store: whether it names this store; None where it names none.
    """

    path: str
    kind: str
    subjects: int | None
    this_store: bool | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_users(paths: Iterable[Path], store: Path, withdrawal: Withdrawal) -> tuple[User, ...]:
    """Search folders for what used subjects.

    Every JSON file counts that holds `subjects`, as runs and exported weights do: either null, or a salt and hashes.

    Args:
        paths: folders, searched with all below them, or single cards.
        store: folder of the store that the subjects leave.
        withdrawal: the subjects. One of whom the list gives only the key, and whose id is gone, cannot be found.

    Returns:
        By path: all that used any of the subjects, and all whose card cannot tell.

    Raises:
        UsageError: a path is not there, or subjects cannot be looked for since their ids are not known.
        SwiftError: no store.
    """
    nameless = sum(not subject.id for subject in withdrawal.subjects)
    if nameless:
        raise UsageError(f"{nameless} subjects are given by key and their ids are gone from {store}: list their ids instead")
    store_id = str(read_attributes(store)["store_id"])
    found = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} is not there: --used-by takes folders of runs, exported weights or embeddings")
        found += [user for card in _cards(path) if (user := _user(card, withdrawal, store_id)) is not None]
    return tuple(sorted(set(found), key=lambda user: user.path))


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


def _user(card: Path, withdrawal: Withdrawal, store_id: str) -> User | None:
    """What a card says, or None where it is none or used none of the subjects."""
    try:
        if card.stat().st_size > _LARGEST:
            return None
        content = json.loads(card.read_bytes())
    except OSError as error:
        raise SwiftError(f"{card} cannot be read ({error.strerror}): ask its owner, or name other folders") from error
    except ValueError:
        return None
    if not isinstance(content, dict) or "subjects" not in content:
        return None
    kind = KINDS.get(card.name, "other")
    path, named = str(card if kind == "other" else card.parent), _store_of(content)
    this_store = None if named is None else named == store_id
    keys = _trained_on(content) if this_store else None
    if content["subjects"] is None and keys is None:
        return User(path, kind, None, this_store)
    try:
        salt, hashes = ("", []) if content["subjects"] is None else (content["subjects"]["salt"], content["subjects"]["hashes"])
        known = {*hashes, *(keys or ())}
        count = sum(
            one.key in known or weights.hash_subject(f"{one.cohort}/{one.id}", salt) in known for one in withdrawal.subjects
        )
    except (KeyError, TypeError, ValueError):
        return None
    return User(path, kind, count, this_store) if count else None


def _trained_on(content: dict[str, Any]) -> list[str] | None:
    """Keys of the training subjects, where a run's contract lists them; they compare within one store only."""
    splits = content.get("splits")
    keys = splits.get("train") if isinstance(splits, dict) else None
    return [str(key) for key in keys] if isinstance(keys, list) else None


def _store_of(content: dict[str, Any]) -> str | None:
    """The store that a card names, at its top or in its provenance."""
    provenance = content.get("provenance")
    for place in (content, provenance if isinstance(provenance, dict) else {}):
        store = place.get("store")
        if isinstance(store, dict) and store.get("id"):
            return str(store["id"])
    return None
