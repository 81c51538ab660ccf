"""The list of a checkpoint's files with sizes and hashes, written last: a folder without a whole one does not count."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftv2.engine.collective import gather
from swiftv2.engine.launch import World
from swiftv2.engine.shards import Written
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, sha256, sync, write_file

MANIFEST = "manifest.json"
FORMAT = 2
KINDS = ("permanent", "ephemeral")


def write_manifest(folder: Path, kind: str, files: Mapping[str, Written]) -> None:
    """Write the manifest of a folder whose files are on the disk already, and bring its folders there too.

    Args:
        folder: the checkpoint.
        kind: permanent or ephemeral.
        files: every file of it, by name below the folder.
    """
    for below in sorted({(folder / name).parent for name in files} | {folder}):
        sync(below)
    entries = {name: one._asdict() for name, one in sorted(files.items())}
    write_file(folder / MANIFEST, json.dumps({"format": FORMAT, "kind": kind, "files": entries}, indent=1) + "\n")


def hash_file(path: Path) -> Written:
    """Bring a file to the disk, and say what a manifest lists of it."""
    sync(path)
    return Written(path.stat().st_size, sha256(path))


def read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest, checked for its form.

    Raises:
        SwiftError: it is missing, damaged or of another version.
    """
    if not (folder / MANIFEST).is_file():
        raise SwiftError(f"{folder / MANIFEST} is missing: the checkpoint was never finished, or was tampered with")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    known = manifest.get("format") == FORMAT and manifest.get("kind") in KINDS
    if not known or not isinstance(files, dict) or not files:
        raise SwiftError(f"{folder / MANIFEST}: not a manifest of format {FORMAT}: it is damaged or of another version")
    for name, entry in files.items():
        inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if not inside or not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise SwiftError(f"{folder / MANIFEST}: the entry of {name!r} is damaged")
    return manifest


def look_at(folder: Path) -> tuple[str | None, str | None]:
    """What is visibly wrong with a checkpoint without reading its files, in one line that names the file; and its kind.

    Either is None: nothing is wrong, or the kind cannot be told.
    """
    try:
        manifest = read_manifest(folder)
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing", None
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{path} has {size} bytes, not {entry['size']}: it is truncated or was changed", None
    except SwiftError as error:
        return str(error), None
    except OSError as error:
        return f"{error.filename}: {error.strerror}", None
    return None, str(manifest["kind"])


def check_hashes(folder: Path, world: World | None = None) -> str | None:
    """What is wrong with a checkpoint after reading all its files: None, or one line that names the file.

    Args:
        folder: the checkpoint.
        world: where given, the ranks share the reading and all get the same answer (collective).
    """
    problem = look_at(folder)[0] if world is None or world.rank == 0 else None
    if world is not None:
        problem = next((p for p in gather(problem, world) if p), None)
    if problem:
        return problem
    problem = _check_content(folder, 0 if world is None else world.rank, 1 if world is None else world.size)
    return problem if world is None else next((p for p in gather(problem, world) if p), None)


def _check_content(folder: Path, part: int, parts: int) -> str | None:
    """Read every `parts`-th file."""
    try:
        for name, entry in list(read_manifest(folder)["files"].items())[part::parts]:
            if sha256(folder / name) != entry["sha256"]:
                return f"{folder / name} does not match its hash: it is damaged or was changed"
    except SwiftError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None
