"""The list of a checkpoint's files with sizes and hashes, written last: a folder without a whole one does not count."""

import json
import re
from pathlib import Path

from swiftv2.engine.collective import gather, on_all, on_first
from swiftv2.engine.launch import World
from swiftv2.errors import SwiftError
from swiftv2.files import read_json, sha256, sync, write_file

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, world: World) -> None:
    """Hash and sync every file of the folder, each on the rank that wrote it, then write the manifest (collective)."""
    names = on_first(lambda: _files(folder), world)

    def seal() -> dict[str, dict[str, int | str]]:
        entries: dict[str, dict[str, int | str]] = {}
        for name in names:
            if _owner(name, world) == world.rank:
                path = folder / name
                sync(path)
                entries[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        return entries

    parts = on_all(seal, world)
    files = {name: entry for part in parts for name, entry in sorted(part.items())}

    def write() -> None:
        for below in sorted({(folder / name).parent for name in files}):
            sync(below)
        write_file(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n")

    on_first(write, world)


def check_sizes(folder: Path) -> str | None:
    """What is visibly wrong with a checkpoint without reading its files: None, or one line that names the file."""
    try:
        files = _listed(folder)
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{path} has {size} bytes, not {entry['size']}: it is truncated or was changed"
    except SwiftError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def check_hashes(folder: Path, world: World | None = None) -> str | None:
    """What is wrong with a checkpoint after reading all its files: None, or one line that names the file.

    Args:
        folder: the checkpoint.
        world: where given, the ranks share the reading and all get the same answer (collective).
    """
    problem = check_sizes(folder) if world is None or world.rank == 0 else None
    if world is not None:
        problem = next((p for p in gather(problem, world) if p), None)
    if problem:
        return problem
    for name, entry in _listed(folder).items():
        if world is not None and _owner(name, world) != world.rank:
            continue
        try:
            if sha256(folder / name) != entry["sha256"]:
                problem = f"{folder / name} does not match its hash: it is damaged or was changed"
        except OSError as error:
            problem = f"{folder / name}: {error.strerror}"
        if problem:
            break
    return problem if world is None else next((p for p in gather(problem, world) if p), None)


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _listed(folder: Path) -> dict[str, dict[str, int | str]]:
    if not (folder / MANIFEST).is_file():
        raise SwiftError(f"{folder / MANIFEST} is missing: the checkpoint was never finished, or was tampered with")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or not files:
        raise SwiftError(f"{folder / MANIFEST}: not a manifest of format {FORMAT}: it is damaged or of another version")
    for name, entry in files.items():
        inside = ".." not in Path(name).parts and not Path(name).is_absolute()
        if not inside or not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise SwiftError(f"{folder / MANIFEST}: the entry of {name!r} is damaged")
    return files


def _owner(name: str, world: World) -> int:
    """The rank that wrote a file: DeepSpeed's partitions carry theirs in the name, all others are rank 0's."""
    found = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(found.group(1)) % world.size if found else 0
