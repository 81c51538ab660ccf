"""Samples that are left out: kept beside a run, and left out by another one from its beginning."""

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from swiftv2.data.samples.reading import stretch_of
from swiftv2.engine.stream import Cause, Exclusion
from swiftv2.errors import UsageError
from swiftv2.files import write_file
from swiftv2.recipes.data import Data

EXCLUSIONS = "exclusions.json"
"""What a run directory keeps of the samples that are left out."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Entry(_Strict):
    clip: NonNegativeInt
    position: NonNegativeInt
    cause: Cause
    run: str
    first: NonNegativeInt
    last: NonNegativeInt


class _File(_Strict):
    store: str
    version: PositiveInt
    exclusions: tuple[_Entry, ...]


def write_exclusions(path: Path, data: Data, exclusions: Iterable[Exclusion]) -> None:
    """Write what is left out, whole or not at all, so that `read_exclusions` takes it over.

    Args:
        path: the file; an older one is replaced.
        data: of the run; numbers of clips are told by its store, and by the frames that they are.
        exclusions: clips and the positions from which on they are left out.

    Raises:
        OSError: it cannot be written.
    """
    rows = [
        {**one._asdict(), **stretch_of(data.store.runs, data.train, one.clip)._asdict()}
        for one in sorted(exclusions, key=lambda one: one.clip)
    ]
    content = {"store": data.store.attributes["store_id"], "version": data.version, "exclusions": rows}
    write_file(path, json.dumps(content, indent=1) + "\n")


def read_exclusions(path: Path, data: Data) -> list[Exclusion]:
    """What another run on the same clips has left out, asked to be left out by this one too.

    Args:
        path: an `exclusions.json`.
        data: of this run.

    Returns:
        Exclusions of cause `asked`, at the positions of the other run.

    Raises:
        UsageError: it cannot be read, is of another form, or of another store or other clips.
    """
    where = f"data.exclude={path}"
    try:
        content = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror}): give the exclusions.json of a run") from error
    except ValidationError as error:
        problem = error.errors()[0]
        found = ".".join(map(str, problem["loc"])) or "the file"
        raise UsageError(f"{where}: {found}: {problem['msg']}: give an exclusions.json as a run wrote it") from error
    if content.store != data.store.attributes["store_id"]:
        raise UsageError(f"{where}: written on another store than {data.store.path}: its clips have other numbers")
    for one in content.exclusions:
        _check(one, data, where)
    return [Exclusion(one.clip, one.position, "asked") for one in content.exclusions]


def _check(one: _Entry, data: Data, where: str) -> None:
    """Make sure that a clip's number means the same frames in both runs."""
    advice = "its run had another version of the store, data.split, data.cohorts or clip: take that of a run on the same clips"
    if one.clip >= len(data.train):
        raise UsageError(f"{where}: names clip {one.clip} of {len(data.train)}: {advice}")
    here = stretch_of(data.store.runs, data.train, one.clip)
    same = (one.run, one.first, one.last) == here
    if one.clip in data.withdrawn_train:
        same = one.run == here.run  # Nobody knows any more which frames it was.
    if not same:
        raise UsageError(
            f"{where}: clip {one.clip} is frames {one.first} to {one.last} of run {one.run} there, and {here.first} to "
            f"{here.last} of run {here.run} here: {advice}"
        )
