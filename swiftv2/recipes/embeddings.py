"""Embeddings on the disk: shards of clips while they are made, then those of subjects and a card that tells what they are.

A folder whose card is missing is unfinished. Everything in it is there whole or not at all.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from swiftv2.errors import SwiftError
from swiftv2.files import read_json, write_file

CARD, PLAN = "embeddings.json", "plan.json"
KEYS = ("subject", "run", "cohort")
UNUSABLE = b"unusable"
ROWS_OF_A_CHUNK = 1024

Format = Literal["parquet", "zarr"]
Singles = NDArray[np.float32]


class Embeddings(NamedTuple):
    """Embeddings of subjects: pseudonymous keys, sorted; (subjects, columns) float32; and the columns' names."""

    subjects: tuple[str, ...]
    matrix: Singles
    columns: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Shard:
    """Embeddings of the clips of some runs.

    Attributes:
        keys: subject and run (pseudonymous) and cohort of each clip, by name.
        start: first frame of each clip in its run.
        tr: seconds between the frames of each clip.
        stages: (clips, channels) of each stage by its number, 1 for the first.
        unusable: clips that were left out.
    """

    keys: Mapping[str, Sequence[str]]
    start: NDArray[np.int64]
    tr: Singles
    stages: Mapping[int, Singles]
    unusable: int


def columns(stages: Mapping[int, int]) -> list[str]:
    """Names of the columns of stages of these widths: `stage4_0`, `stage4_1`, and so on."""
    return [f"stage{stage}_{channel}" for stage, width in stages.items() for channel in range(width)]


def shard_path(folder: Path, number: int) -> Path:
    """Where the shard of that number lies while embeddings are made, and afterwards with format=parquet."""
    return folder / f"clips-{number:05d}.parquet"


def tokens_path(folder: Path, number: int) -> Path:
    """Where the tokens of that shard's clips lie."""
    return folder / f"tokens-{number:05d}.zarr"


def write_shard(folder: Path, number: int, shard: Shard) -> None:
    """Write a shard; from then on it is not made again."""
    arrays = {name: pa.array(list(shard.keys[name]), pa.string()) for name in KEYS}
    arrays |= {"start": pa.array(shard.start), "tr": pa.array(shard.tr)}
    values = [found[:, channel] for found in shard.stages.values() for channel in range(found.shape[1])]
    names = columns({stage: found.shape[1] for stage, found in shard.stages.items()})
    arrays |= dict(zip(names, map(pa.array, values), strict=True))
    table = pa.table(arrays).replace_schema_metadata({UNUSABLE: str(shard.unusable).encode()})
    _write_table(shard_path(folder, number), table)


def _write_table(path: Path, table: pa.Table) -> None:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd")
    write_file(path, stream.getvalue().to_pybytes())


def read_shard(path: Path, stages: Mapping[int, int]) -> Shard:
    """Read a shard.

    Args:
        path: of the shard.
        stages: width of each stage by its number.

    Raises:
        SwiftError: it is missing or damaged.
    """
    try:
        table = pq.read_table(path)
        found = {
            stage: np.stack([table[name].to_numpy() for name in columns({stage: width})], axis=1)
            for stage, width in stages.items()
        }
        keys = {name: table[name].to_pylist() for name in KEYS}
        unusable = int((table.schema.metadata or {}).get(UNUSABLE, b"0"))
        return Shard(keys, table["start"].to_numpy(), table["tr"].to_numpy(), found, unusable)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise SwiftError(f"{path}: cannot be read as a shard of embeddings ({error}): delete it, and embed again") from error


class SubjectMeans:
    """Means over the runs of each subject of the means over their clips, gathered shard by shard; a run is in one shard."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, tuple[str, int, int]] = {}

    def add(self, shard: Shard) -> None:
        """Take in the runs of a shard."""
        values = np.concatenate([found.astype(np.float64) for found in shard.stages.values()], axis=1)
        runs = np.asarray(shard.keys["run"])
        for run in np.unique(runs):
            own = np.flatnonzero(runs == run)
            subject, cohort = shard.keys["subject"][own[0]], shard.keys["cohort"][own[0]]
            mean = values[own].mean(axis=0)
            self._sums[subject] = self._sums.get(subject, 0.0) + mean
            _, before, clips = self._counts.get(subject, (cohort, 0, 0))
            self._counts[subject] = cohort, before + 1, clips + len(own)

    @property
    def subjects(self) -> list[str]:
        """Keys, sorted."""
        return sorted(self._sums)

    @property
    def clips(self) -> int:
        """Clips of all subjects."""
        return sum(clips for _, _, clips in self._counts.values())

    @property
    def runs(self) -> int:
        """Runs of all subjects."""
        return sum(runs for _, runs, _ in self._counts.values())

    def counted(self) -> tuple[list[str], list[int], list[int]]:
        """Cohort, runs and clips of each subject, in the order of `subjects`."""
        rows = [self._counts[subject] for subject in self.subjects]
        return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def matrix(self) -> Singles:
        """(subjects, columns), in the order of `subjects`."""
        return np.stack([self._sums[key] / self._counts[key][1] for key in self.subjects]).astype(np.float32)


def finish_parquet(folder: Path, means: SubjectMeans, stages: Mapping[int, int]) -> None:
    """Write `subjects.parquet` beside the shards of clips."""
    cohort, runs, clips = means.counted()
    arrays = {"subject": pa.array(means.subjects), "cohort": pa.array(cohort), "runs": pa.array(runs), "clips": pa.array(clips)}
    matrix = means.matrix()
    arrays |= {name: pa.array(matrix[:, place]) for place, name in enumerate(columns(stages))}
    _write_table(folder / "subjects.parquet", pa.table(arrays))


def finish_zarr(folder: Path, shards: Sequence[Path], means: SubjectMeans, stages: Mapping[int, int]) -> None:
    """Write `clips.zarr` and `subjects.zarr`: an array a stage, (rows, channels), and whose the rows are."""
    with _NewGroup(folder / "subjects.zarr") as group:
        cohort, runs, clips = means.counted()
        _put_names(group, "subject", means.subjects)
        _put_names(group, "cohort", cohort)
        for name, counts in (("runs", runs), ("clips", clips)):
            group.create_array(name, data=np.array(counts, dtype=np.int64))
        matrix, first = means.matrix(), 0
        for stage, width in stages.items():
            array = _stage_array(group, stage, len(matrix), width)
            array[:] = matrix[:, first : first + width]
            first += width
    with _NewGroup(folder / "clips.zarr") as group:
        keys: dict[str, list[str]] = {name: [] for name in KEYS}
        arrays = {stage: _stage_array(group, stage, means.clips, width) for stage, width in stages.items()}
        start, tr = np.zeros(means.clips, dtype=np.int64), np.zeros(means.clips, dtype=np.float32)
        done = 0
        for path in shards:
            shard = read_shard(path, stages)
            here = slice(done, done + len(shard.start))
            start[here], tr[here] = shard.start, shard.tr
            for stage, found in shard.stages.items():
                arrays[stage][here] = found
            for name in KEYS:
                keys[name] += shard.keys[name]
            done = here.stop
        for name in KEYS:
            _put_names(group, name, keys[name])
        group.create_array("start", data=start)
        group.create_array("tr", data=tr)


class _NewGroup:
    """A Zarr group in a new folder that appears whole at the end, or not at all."""

    def __init__(self, path: Path) -> None:
        self._path, self._beside = path, path.with_name(f".{path.name}.partial")

    def __enter__(self) -> zarr.Group:
        shutil.rmtree(self._beside, ignore_errors=True)
        return zarr.open_group(self._beside, mode="w", zarr_format=3)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._beside.rename(self._path)
        else:
            shutil.rmtree(self._beside, ignore_errors=True)


def _stage_array(group: zarr.Group, stage: int, rows: int, width: int) -> Any:
    chunks = (min(ROWS_OF_A_CHUNK, rows), width)
    return group.create_array(f"stage{stage}", shape=(rows, width), chunks=chunks, dtype="float32")


def _put_names(group: zarr.Group, name: str, values: Sequence[str]) -> None:
    """Names as numbers, with the names in the attribute `names`: strings have no settled place in Zarr v3."""
    names, places = np.unique(np.asarray(values), return_inverse=True)
    group.create_array(name, data=places.astype(np.int64)).attrs["names"] = names.tolist()


class TokenWriter:
    """Tokens of the clips of a shard: `stage4` (clips, h, w, d, t, channels) float32 and `counted4` (clips, h, w, d) bool.

    Used as a context; the folder appears at its end.
    """

    def __init__(self, path: Path, clips: int, grids: Mapping[int, tuple[int, ...]], widths: Mapping[int, int]) -> None:
        self._new, self._clips, self._done = _NewGroup(path), clips, 0
        self._grids, self._widths = grids, widths

    def __enter__(self) -> "TokenWriter":
        group = self._new.__enter__()
        names = ("clip", "h", "w", "d", "t", "channel")
        self._arrays = {}
        for stage, grid in self._grids.items():
            row = (*grid, self._widths[stage])
            tokens = group.create_array(
                f"stage{stage}", shape=(self._clips, *row), chunks=(1, *row), dtype="float32", dimension_names=names
            )
            held = group.create_array(
                f"counted{stage}",
                shape=(self._clips, *grid[:3]),
                chunks=(1, *grid[:3]),
                dtype="bool",
                dimension_names=names[:4],
            )
            self._arrays[stage] = tokens, held
        return self

    def add(self, stage: int, tokens: Singles, counted: NDArray[np.bool_]) -> None:
        """Take in (B, h, w, d, t, C) and (B, h, w, d) of one stage; `step` follows when all stages of a batch are in."""
        here = slice(self._done, self._done + len(tokens))
        for array, values in zip(self._arrays[stage], (tokens, counted), strict=True):
            array[here] = values

    def step(self, clips: int) -> None:
        """Go on to the next batch."""
        self._done += clips

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            for pair in self._arrays.values():
                for array in pair:
                    array.resize((self._done, *array.shape[1:]))
        self._new.__exit__(kind, *rest)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON."""
    write_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_embeddings(folder: Path) -> Embeddings:
    """Embeddings of subjects, whichever format they are in.

    Raises:
        SwiftError: the folder holds none, or unfinished ones.
    """
    if not (folder / CARD).is_file():
        raise SwiftError(f"{folder}: no finished embeddings (no {CARD}): give the same `swiftv2 embed` command again")
    stages = {one["stage"]: one["width"] for one in read_json(folder / CARD)["stages"]}
    try:
        if (folder / "subjects.parquet").exists():
            table = pq.read_table(folder / "subjects.parquet")
            found = [table[name].to_numpy() for name in columns(stages)]
            return Embeddings(tuple(table["subject"].to_pylist()), np.stack(found, axis=1), tuple(columns(stages)))
        group: Any = zarr.open_group(folder / "subjects.zarr", mode="r")
        names = group["subject"].attrs["names"]
        matrix = np.concatenate([group[f"stage{stage}"][:] for stage in stages], axis=1)
        return Embeddings(tuple(names[place] for place in group["subject"][:]), matrix, tuple(columns(stages)))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise SwiftError(f"{folder}: damaged embeddings ({error}): embed again into another folder") from error


def read_clips(folder: Path) -> Iterator[Shard]:
    """Embeddings of clips, shard by shard; format=parquet only.

    Raises:
        SwiftError: the folder holds none, unfinished ones, or those of format=zarr.
    """
    if not (folder / CARD).is_file():
        raise SwiftError(f"{folder}: no finished embeddings (no {CARD}): give the same `swiftv2 embed` command again")
    card = read_json(folder / CARD)
    if card["format"] != "parquet":
        raise SwiftError(f"{folder}: embeddings of format=zarr: open {folder / 'clips.zarr'} by zarr")
    stages = {one["stage"]: one["width"] for one in card["stages"]}
    for path in sorted(folder.glob("clips-*.parquet")):
        yield read_shard(path, stages)
