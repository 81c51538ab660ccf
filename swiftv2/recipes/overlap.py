"""Subjects that weights were trained on, among those of a store: found by salted hashes, without names."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from swiftv2 import weights
from swiftv2.data.store.reader import Store
from swiftv2.errors import SwiftError


@dataclass(frozen=True)
class Overlap:
    """What is known of it.

    Attributes:
        known: whether it can be told: the weights carry hashes, and the store's file of ids may be read.
        counted: subjects asked for that the weights have seen; 0 where it cannot be told.
        asked: subjects asked for.
        why: why it cannot be told.
    """

    known: bool
    counted: int
    asked: int
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find_overlap(card: weights.Card, store: Store, subjects: Iterable[str]) -> Overlap:
    """How many of these subjects the weights were trained on.

    Ids are compared as cohort and id, so that a cohort must have the same name in both stores.

    Args:
        card: of the weights.
        store: whose subjects.
        subjects: pseudonymous keys.
    """
    asked = set(subjects)
    if card.subjects is None:
        return Overlap(False, 0, len(asked), "the weights carry no hashes of their subjects")
    try:
        names = {key: name for name, key in store.subject_ids().items() if "/" in name}
    except SwiftError:
        return Overlap(False, 0, len(asked), "the store's file of ids cannot be read")
    seen = set(card.subjects.hashes)
    found = {key for key in asked if key in names and weights.hash_subject(names[key], card.subjects.salt) in seen}
    return Overlap(True, len(found), len(asked))
