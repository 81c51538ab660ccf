"""One NIfTI file as a store of its own, for as long as it is needed."""

import contextlib
import csv
import glob
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swiftv2 import weights
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build
from swiftv2.data.grid import CUBE_MM
from swiftv2.data.ingest.sidecars import entities_of, stem_of
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sha256

COHORT = "file"
"""Cohort of a file of which nobody says where it comes from."""


def grid_of(contract: weights.InputContract, space: str | None, *, resample: bool) -> GridConfig:
    """The grid that weights want, for a file.

    Args:
        contract: of the weights.
        space: template space of the file; None where its name or side-cars tell.
        resample: whether a file on another grid is interpolated.

    Raises:
        UsageError: such a grid cannot be made for a single file.
    """
    edge = contract.voxel_mm[0]
    cube = all(abs(mm - edge) < weights.TOLERANCE for mm in contract.voxel_mm)
    cube = cube and all(abs(count * edge - CUBE_MM) < weights.TOLERANCE for count in contract.grid)
    if cube and contract.space is not None and contract.space.startswith("MNI152"):
        mask = contract.mask or "template"
        return GridConfig(
            kind="mni152", voxel_mm=edge, orientation=contract.orientation, space=space, resample=resample, mask=mask
        )
    if contract.mask == "template":
        raise UsageError(
            f"the weights take a grid of {list(contract.grid)} voxels of {edge:g} mm in {contract.space}, which cannot be made "
            "for a single file: build a store as they were trained on, and embed that"
        )
    return GridConfig(kind="source", orientation=contract.orientation, space=space, resample=resample, mask="box")


@contextlib.contextmanager
def store_of_file(
    file: Path, contract: weights.InputContract, cohort: str | None, space: str | None, *, resample: bool
) -> Iterator[Path]:
    """A store that holds one file on the grid of weights; it is gone afterwards.

    The subject is that of the name (`sub-`), else the name itself. Equal files give equal keys.

    Args:
        file: `*.nii` or `*.nii.gz`.
        contract: of the weights.
        cohort: that the subject belongs to.
        space: see `grid_of`.
        resample: see `grid_of`.

    Raises:
        UsageError: the grid does not suit a file, or nothing tells the file's space.
        SwiftError: the file is in another space than the weights, or cannot be taken: damaged, of unknown repetition time,
            on another grid.
    """
    file = file.resolve()
    stated = space or entities_of(stem_of(file.name)).get("space")
    if None not in (stated, contract.space) and stated != contract.space:
        raise SwiftError(
            f"{file} is in {stated}, and the weights were made for {contract.space}: bring it to that template first"
        )
    grid = grid_of(contract, space, resample=resample)
    # Readable by this user alone, and gone on every way out but a kill.
    with tempfile.TemporaryDirectory(prefix="swiftv2-embed-") as scratch:
        labels = None
        if "sub" not in entities_of(stem_of(file.name)):
            labels = Path(scratch) / "names.tsv"
            with labels.open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream, delimiter="\t").writerows([("participant_id", "file"), (stem_of(file.name), file.name)])
        salt = hashlib.sha256(sha256(file).encode()).hexdigest()[:32]
        store = Path(scratch) / "one.zarr"
        report = build(_only(file), store, grid, cohort or COHORT, labels=labels, salt=salt)
        if report.refused:
            raise SwiftError(f"{file} cannot be embedded: {report.refused[0][1]}")
        yield store


def _only(file: Path) -> str:
    """A glob that finds this file and no other."""
    name = glob.escape(file.name)
    return f"{glob.escape(str(file.parent))}/{name if name != file.name else f'[{name[0]}]{name[1:]}'}"
