"""Reading a store: which runs it holds, and their frames as packed source numbers."""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from swiftv2.data.grid import Grid
from swiftv2.data.keys import subject_key
from swiftv2.data.labels import LabelRow, RunName, join_labels
from swiftv2.data.store import absence, layout
from swiftv2.data.store.absence import AWAY, AwayError
from swiftv2.data.store.shards import ChunkError, OpenShards, ShardedArray
from swiftv2.errors import DamagedError, SwiftError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One run of a store: a line of runs.jsonl.

    Attributes:
        key, subject: pseudonymous keys of the run and of its subject.
        cohort, session, task, run: what tells the run apart; empty where the source names none.
        row: the run's row in every array of the store.
        dtype: number type, and so the bold array that holds it.
        slope, intercept: value in source units = stored x slope + intercept.
        frames: volumes.
        tr: repetition time in seconds.
        space: template space.
        statistics: mean, std, min, max, median, iqr over brain voxels and frames, in source units.
        brain_voxels: brain voxels among the kept ones.
        brain_rule: `mask` (the desc-brain_mask file) or `nonzero` (a voxel that is not 0 at some time).
        coverage: share of the kept voxels that the file's field of view holds.
        values: `exact`, `scaled` (to 16 bits) or `float32`.
        max_error: largest |stored - source| in source units that the number type cost.
        resampled: whether the voxels were interpolated onto the grid.
        cleaned: whether the voxels' means are about zero, as cleaned data have them.
        confounds: names of the per-frame arrays that tell anything of the run.
        source_orientation, source_shape, source_affine, source_sha256: of the BOLD file.
        bytes: on disk, of the bold shards.
        steady_from: first volume after the leading non-steady ones, where confounds tell of any; statistics and clips
            begin there.
        cleaning: settings of the cleaning that the build did; empty where it did none.
        since: version of the store in which the run came.
        withdrawn: version of the store in which consent was withdrawn, 0 while it holds: the row is kept, its data are
            not, and what was computed from them is zero or empty.
    """

    key: str
    subject: str
    cohort: str
    session: str
    task: str
    run: str
    row: int
    dtype: str
    slope: float
    intercept: float
    frames: int
    tr: float
    space: str
    statistics: tuple[float, ...]
    brain_voxels: int
    brain_rule: str
    coverage: float
    values: str
    max_error: float
    resampled: bool
    cleaned: bool
    confounds: tuple[str, ...]
    source_orientation: str
    source_shape: tuple[int, ...]
    source_affine: tuple[tuple[float, ...], ...]
    source_sha256: str
    bytes: int
    steady_from: int = 0
    cleaning: dict[str, Any] = field(default_factory=dict)
    since: int = 1
    withdrawn: int = 0

    @property
    def present(self) -> bool:
        """Whether the run's data are there."""
        return not self.withdrawn

    def to_json(self) -> dict[str, Any]:
        """Plain values, as runs.jsonl holds them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        known = {name: value[name] for name in _FIELDS & value.keys()}
        known["confounds"] = tuple(known["confounds"])
        known["statistics"] = tuple(map(float, known["statistics"]))
        known["source_shape"] = tuple(map(int, known["source_shape"]))
        known["source_affine"] = tuple(tuple(map(float, row)) for row in known["source_affine"])
        return cls(**known)


_FIELDS = frozenset(one.name for one in fields(Run))


class Store:
    """A store that is open for reading; its methods may be called from several threads, never in a forked child.

    A file that is missing or damaged in a store that is there raises `DamagedError`. Where the store itself cannot be
    reached, all that reads raises `AwayError`, and reads again once it is back: nothing needs to be opened anew.

    Attributes:
        path: the folder.
        grid: the window that all runs share.
        voxels: (V,) int64, flat C-order voxel numbers in the grid, ascending.
        runs: all runs, in the order of their rows.
        version: counts the changes of the store, from 1.
        fingerprint: hex digest of the run index: equal for equal content.
        generated: whether the data are swiftv2's own generated cohort.
        attributes: all attributes of the store.
    """

    def __init__(self, path: Path, attributes: dict[str, Any], runs: tuple[Run, ...]) -> None:
        """Use `Store.open`."""
        self.path = path
        self.attributes = attributes
        self.grid = Grid.from_json(attributes["grid"])
        self.runs = runs
        self.version = int(attributes["version"])
        self.fingerprint = str(attributes["runs_sha256"])
        self.generated = bool(attributes["generated"])
        self._arrays = self._open_arrays()
        self._pid = os.getpid()
        self._away, self._lock = False, threading.Lock()
        self.voxels: npt.NDArray[np.int64] = self._checked("its voxels", self._read_voxels).astype(np.int64)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the newest version of a store, wherever it lies.

        Raises:
            SwiftError: no store, an unfinished one, another format, or a damaged index.
        """
        folder = Path(path)
        return cls(folder, *read_index(folder))

    def _open_arrays(self) -> dict[str, ShardedArray]:
        names = ["voxels", *(small.name for small in layout.SMALL_ARRAYS)]
        names += [f"bold/{dtype}" for dtype in sorted({run.dtype for run in self.runs if run.present})]
        # Clips of a large cohort come from another run each time; what runs share is few files, and stays open.
        own, shared = OpenShards(), OpenShards(shared=True)
        try:
            return {name: ShardedArray(self.path / name, own if name.startswith("bold") else shared) for name in names}
        except SwiftError as error:
            raise SwiftError(f"store {self.path}: {error}") from error

    def _read_voxels(self) -> npt.NDArray[Any]:
        voxels = self._arrays["voxels"].read_row(0)
        if len(voxels) > 1 and not voxels.any():
            raise ChunkError("voxels is missing")
        return voxels

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return type(self).open, (str(self.path),)

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def subject_keys(self) -> tuple[str, ...]:
        """Pseudonymous keys of all subjects whose data are there, sorted."""
        return tuple(sorted({run.subject for run in self.runs if run.present}))

    @property
    def cohorts(self) -> tuple[str, ...]:
        """Names of the cohorts, sorted."""
        return tuple(sorted({run.cohort for run in self.runs}))

    def read_bold(
        self, run_index: int, start: int, frames: int, stride: int = 1, *, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Frames start, start + stride, ... of a run as stored numbers, (frames, V), in the run's number type.

        Args:
            run_index: place of the run in `runs`.
            start: first frame.
            frames: how many.
            stride: every how many frames of the run one is taken.
            out: C-contiguous (frames, V) of the run's number type that takes the frames; a new array when None.

        Raises:
            DamagedError: bytes are missing or fail their checksum; names run and frames.
            AwayError: the store cannot be reached now.
            SwiftError: beyond the run's end, or a withdrawn run.
        """
        run = self.runs[run_index]
        stop = start + (frames - 1) * stride + 1
        what = f"run {run.key}, frames {start} to {stop - 1}"
        if start < 0 or frames < 1 or stride < 1 or stop > run.frames:
            raise SwiftError(f"store {self.path}: {what} asked for, but the run has {run.frames}: rebuild the clip index")
        if run.withdrawn:
            raise SwiftError(f"store {self.path}: run {run.key} was withdrawn: exclude it")
        direct = out if out is not None and stride == 1 else None
        whole = np.empty((stop - start, len(self.voxels)), dtype=run.dtype) if direct is None else direct

        def read() -> None:
            array = self._arrays[f"bold/{run.dtype}"]
            # Few calls to the file system: a run of one shard tells its size by the index.
            size = run.bytes if run.frames <= array.shard_length else None
            array.read_frames(run.row, start, stop, whole, size)

        self._checked(what, read, run)
        if out is None or stride == 1:
            return whole[::stride]
        out[...] = whole[::stride]
        return out

    def brain(self, run_index: int) -> npt.NDArray[np.bool_]:
        """The run's brain among the kept voxels, (V,) bool."""
        return self._present(run_index, "brain")

    def voxel_mean(self, run_index: int) -> npt.NDArray[np.float32]:
        """Mean of each voxel over the run in source units, (V,) float32; 0 outside the brain."""
        return self._present(run_index, "voxel_mean")

    def voxel_std(self, run_index: int) -> npt.NDArray[np.float32]:
        """Population standard deviation of each voxel over the run in source units, (V,) float32; 0 outside the brain."""
        return self._present(run_index, "voxel_std")

    def _present(self, run_index: int, name: str) -> npt.NDArray[Any]:
        """A row that cannot be all fill value: an absent chunk or file reads as that, and would go unseen."""
        run = self.runs[run_index]

        def read() -> npt.NDArray[Any]:
            row = self._arrays[name].read_row(run.row)
            if not row.any() and run.present:
                about_zero = run.cleaned and name == "voxel_mean"
                if not (about_zero and self._has_files(name, run.row, len(row))):
                    raise ChunkError(f"{name} is missing")
            return row

        return self._checked(f"run {run.key}, {name}", read, run)

    def _has_files(self, name: str, row: int, width: int) -> bool:
        """Whether all files are there that hold the first `width` values of a row."""
        folder = self.path / name
        metadata = json.loads((folder / "zarr.json").read_bytes())
        rows, columns = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        return all((folder / f"c.{row // rows}.{column}").is_file() for column in range(-(-width // columns)))

    def frame_values(self, name: str, run_index: int) -> npt.NDArray[Any] | None:
        """`framewise_displacement` (mm), `censored` or `non_steady_state` (0, 1) of a run, (frames,); None if not known.

        Raises:
            DamagedError: it is known, and its file is damaged or gone.
            AwayError: the store cannot be reached now.
        """
        run = self.runs[run_index]
        if name not in run.confounds:
            return None

        def read() -> npt.NDArray[Any]:
            row = self._arrays[name].read_row(run.row)[: run.frames]
            unknown = np.isnan(row) if row.dtype.kind == "f" else row == layout.UNKNOWN
            # The first frame has no displacement; where more is unknown, a file of several may be gone.
            if unknown.all() or (unknown[1:].any() and not self._has_files(name, run.row, run.frames)):
                raise ChunkError(f"{name} is missing")
            return row

        return self._checked(f"run {run.key}, {name}", read, run)

    def censored(self, run_index: int, displacement_mm: float | None = None) -> npt.NDArray[np.bool_] | None:
        """Frames of a run that its confounds censor, or call non-steady, (frames,) bool; None if not known.

        Args:
            run_index: place of the run in `runs`.
            displacement_mm: framewise displacement above which a frame counts as censored too; not looked at when None.
        """
        flags = [self.frame_values(name, run_index) for name in ("censored", "non_steady_state")]
        found = np.zeros(self.runs[run_index].frames, dtype=np.bool_)
        for one in flags:
            if one is None:
                return None
            found |= one == 1
        if displacement_mm is not None:
            moved = self.frame_values("framewise_displacement", run_index)
            if moved is None:
                return None
            found |= moved > displacement_mm  # The first frame has no displacement: NaN is above nothing.
        return found

    def labels(self) -> tuple[dict[str, str | None], ...]:
        """Columns of the label tables for each run, joined on the keys that they have; read from the file of ids."""
        rows = [
            LabelRow(row["subject"], row["session"], row["task"], row["run"], "", tuple(row["values"].items()))
            for row in self._subjects()["labels"]
        ]
        return tuple(join_labels(rows, [RunName(run.subject, run.session, run.task, run.run) for run in self.runs]))

    def subject_ids(self) -> dict[str, str]:
        """Pseudonymous key by every name that a split file may use: id, sub-id, cohort/id (an id of one cohort only)."""
        subjects = self._subjects()["subjects"]
        names: dict[str, str] = {}
        for key, subject in subjects.items():
            names[f"{subject['cohort']}/{subject['id']}"] = key
        plain = Counter(subject["id"] for subject in subjects.values())
        for key, subject in subjects.items():
            if plain[subject["id"]] == 1:
                names[subject["id"]] = names[f"sub-{subject['id']}"] = key
        return names

    def subject_key(self, cohort: str, subject: str) -> str:
        """Pseudonymous key of a subject id; the subject need not be in the store."""
        return subject_key(str(self._subjects()["salt"]), cohort, subject)

    def _subjects(self) -> dict[str, Any]:
        path = self.path / layout.SUBJECTS_FILE
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SwiftError(f"{path} cannot be read: it holds ids and labels, readable by the store's owner only") from error
        return content

    def _checked(self, what: str, read: Callable[[], Result], run: Run | None = None) -> Result:
        """Read, and say in one line what is wrong: damage, a withdrawal, or a store that cannot be reached now."""
        if os.getpid() != self._pid:
            raise SwiftError(f"store {self.path} was opened before a fork: open it in the child, or spawn workers")
        try:
            return self._read_surely(what, read, run)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            told = f"store {self.path}: {what} cannot be read now ({reason}): mend that and start again"
            if error.errno not in AWAY:
                raise SwiftError(told) from error
            self._away = True
            raise AwayError(told, reason) from error

    def _read_surely(self, what: str, read: Callable[[], Result], run: Run | None) -> Result:
        """Read; what is missing or wrong counts as damage only where it is so in a store that is there."""
        if self._away:
            self._come_back()
        try:
            return read()
        except ChunkError:
            # It may have been away for this one moment: then the bytes are whole in the next.
            self._look()
        try:
            return read()
        except ChunkError as error:
            self._look()
            if run is not None:
                self._refuse_withdrawn(what, run)
            where = f", in frames {error.first} to {error.stop - 1}" if "frames" in what and error.stop else ""
            raise DamagedError(
                f"store {self.path}: {what} cannot be read ({error}{where}): restore the file from a copy or build again; "
                "`swiftv2 store verify` lists all that is damaged"
            ) from error

    def _look(self) -> None:
        absence.look(self.path, str(self.attributes["store_id"]), self.version, self.fingerprint)

    def _come_back(self) -> None:
        """Take up a store again that was away; what was open of it may be of no use any more.

        Raises:
            OSError: it is still away.
            SwiftError: it came back as another one, or damaged.
        """
        with self._lock:
            if not self._away:
                return
            self._look()
            try:
                self._arrays = self._open_arrays()
            except SwiftError:
                self._look()  # Gone again in between: that is no damage.
                raise
            self._away = False

    def _refuse_withdrawn(self, what: str, run: Run) -> None:
        """Tell what is gone because it was withdrawn from what is damaged.

        Raises:
            SwiftError: the store has another version by now, in which this run is withdrawn.
        """
        try:
            history = layout.read_attributes(self.path)["history"]
            if not any(one["version"] > self.version and one["change"] == "drop" for one in history):
                return  # The index of a large cohort takes seconds: it is read only where it can tell anything new.
            now = next((one for one in read_index(self.path)[1] if one.key == run.key), run)
        except SwiftError:
            self._look()  # Gone in between: that is no damage.
            raise
        if now.withdrawn:
            raise SwiftError(
                f"store {self.path}: {what}: gone, since its subject was withdrawn in version {now.withdrawn} of the store: "
                "give the same command again, it goes on without it"
            )


def read_index(folder: Path) -> tuple[dict[str, Any], tuple[Run, ...]]:
    """Attributes and runs of the newest version; read again where the store got another version in between."""
    attributes = layout.read_attributes(folder)
    while True:
        try:
            return attributes, _read_runs(folder / attributes["index"], str(attributes["runs_sha256"]))
        except SwiftError:
            again = layout.read_attributes(folder)
            if again["version"] == attributes["version"]:
                raise
            attributes = again


def _read_runs(path: Path, expected: str) -> tuple[Run, ...]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SwiftError(f"{path} is missing: restore it from a copy or build the store again") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise SwiftError(f"{path} does not match its checksum: restore it from a copy or build the store again")
    # One document of all lines is parsed in half the time of a document each.
    lines = json.loads(b"[" + b",".join(data.splitlines()) + b"]")
    return tuple(Run.from_json(line) for line in lines)
