"""BIDS names and the JSON side-cars that hold for a file: its own, and those that it inherits from folders above."""

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from swiftv2.data.ingest.nifti import RefusedError

SUFFIXES = (".nii.gz", ".nii")
Value = TypeVar("Value", float, str)
Levels = tuple[tuple[Path, ...], ...]


def stem_of(name: str) -> str:
    """A file's name without `.nii` or `.nii.gz`."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return name


def entities_of(stem: str) -> dict[str, str]:
    """Entities (`sub-01` is {sub: 01}) of a BIDS name."""
    return dict(re.findall(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9+.]+)", stem))


class Folders:
    """Names in folders, each listed once however many runs it holds."""

    def __init__(self) -> None:
        """Nothing is listed yet."""
        self._names: dict[Path, frozenset[str]] = {}
        self._sidecars: dict[Path, tuple[tuple[str, str, frozenset[tuple[str, str]]], ...]] = {}

    def names(self, folder: Path) -> frozenset[str]:
        """Names in a folder; none where it cannot be listed."""
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(path.name for path in folder.iterdir())
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]

    def first(self, folder: Path, names: list[str]) -> Path | None:
        """The first of some names that a folder holds."""
        return next((folder / name for name in names if name in self.names(folder)), None)

    def sidecars(self, path: Path, root: Path) -> Levels:
        """JSON side-cars that hold for a file, by BIDS' inheritance principle, the nearest level first.

        A JSON file holds for the files beside and below it that have its suffix and all of its entities. The one with the
        file's own name is a level of its own before the others of its folder.

        Args:
            path: the file.
            root: folder of the whole tree.
        """
        stem = stem_of(path.name)
        entities = frozenset(entities_of(stem).items())
        own = self.first(path.parent, [f"{stem}.json"])
        levels: list[tuple[Path, ...]] = [] if own is None else [(own,)]
        folders = [path.parent, *path.parent.parents]
        for folder in folders[: folders.index(root) + 1] if entities and root in folders else []:
            found = self._listed_sidecars(folder)
            suffix = stem.rpartition("_")[2]
            fitting = [folder / name for name, kind, names in found if kind == suffix and names <= entities]
            level = tuple(one for one in fitting if one != own)
            if level:
                levels.append(level)
        return tuple(levels)

    def _listed_sidecars(self, folder: Path) -> tuple[tuple[str, str, frozenset[tuple[str, str]]], ...]:
        if folder not in self._sidecars:
            found = []
            for name in sorted(self.names(folder)):
                if name.endswith(".json"):
                    *parts, suffix = name.removesuffix(".json").split("_")
                    entities = entities_of("_".join(parts))
                    if len(entities) == len(parts):
                        found.append((name, suffix, frozenset(entities.items())))
            self._sidecars[folder] = tuple(found)
        return self._sidecars[folder]


def sidecar_facts(levels: Levels) -> tuple[float | None, str | None]:
    """Repetition time in seconds and template space that JSON side-cars state, None each where they state none.

    Args:
        levels: side-cars that hold for one file, the nearest level first; a nearer one wins, value by value.

    Raises:
        RefusedError: a side-car is no JSON object, its RepetitionTime is no number, or two of one level disagree.
    """
    contents = [[_content(path) for path in level] for level in levels]
    times = [[_repetition_time(content) for content in level] for level in contents]
    spaces = [[_space(content) for content in level] for level in contents]
    tr, space = _nearest(times, "RepetitionTime"), _nearest(spaces, "Space")
    if tr is None and any("VolumeTiming" in content for level in contents for content in level):
        raise RefusedError("the JSON side-car states VolumeTiming and no RepetitionTime: only even sampling is taken")
    return tr, space


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RefusedError(f"a JSON side-car is not valid JSON (line {error.lineno}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise RefusedError("a JSON side-car is no UTF-8 text") from error
    except OSError as error:
        raise RefusedError(f"a JSON side-car cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise RefusedError("a JSON side-car is no JSON object")
    return content


def _repetition_time(content: dict[str, Any]) -> float | None:
    tr = content.get("RepetitionTime")
    if tr is not None and (isinstance(tr, bool) or not isinstance(tr, int | float)):
        raise RefusedError("RepetitionTime in the JSON side-car is no number")
    return None if tr is None else float(tr)


def _space(content: dict[str, Any]) -> str | None:
    space = content.get("Space", content.get("SpatialReference"))
    return space if isinstance(space, str) and re.fullmatch(r"[A-Za-z0-9]+", space) else None


def _nearest(levels: list[list[Value | None]], name: str) -> Value | None:
    for level in levels:
        stated = sorted({value for value in level if value is not None})
        if len(stated) > 1:
            values = " and ".join(str(value) for value in stated)
            raise RefusedError(
                f"JSON side-cars in one folder state different {name} for it ({values}): leave one, or give the file its own"
            )
        if stated:
            return stated[0]
    return None
