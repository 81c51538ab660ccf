"""What all tests share: deterministic property tests, a small store made of real BOLD, GPU tests that skip themselves."""

from pathlib import Path

import nitime
import pytest
import torch
from hypothesis import settings

from swiftv2.config.data import GridConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes.build import build
from swiftv2.data.synth import generate

settings.register_profile("swiftv2", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("swiftv2")


ALONE = {
    *("faults", "slurm", "test_cli_failures.py", "test_cli_lost_ranks.py"),
    *(f"test_engine_{noun}.py" for noun in ("checkup", "launch", "loop", "pace", "rundir", "sentinel", "signals", "syncs")),
}
"""What kills, waits or measures by the clock."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip themselves where PyTorch finds none; what goes by the clock is marked `alone`."""
    for item in items:
        if set(item.path.relative_to(Path(__file__).parent).parts) & ALONE:
            item.add_marker("alone")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no GPU"))


@pytest.fixture(scope="session")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of nitime's two real runs (10 x 10 x 18 voxels, 40 volumes, TR 1.35 s), as of two subjects."""
    folder = tmp_path_factory.mktemp("real")
    files = folder / "files"
    files.mkdir()
    for index in (1, 2):
        (files / f"sub-{index}_bold.nii.gz").symlink_to(Path(nitime.__file__).parent / "data" / f"fmri{index}.nii.gz")
    grid = GridConfig(kind="source", mask="box", space="native-nitime")
    build(str(files / "*.nii.gz"), folder / "real.zarr", grid, "nitime", expect_tr=1.35, salt="0" * 32)
    return folder / "real.zarr"


@pytest.fixture(scope="session")
def generated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 generated subjects with labels, families and sites (6 mm: 32^3 voxels, 40 volumes, TR 2 s)."""
    folder = tmp_path_factory.mktemp("generated")
    generate(SynthConfig(subjects=24, voxel_mm=6, frames=40, withdrawn_share=0.0, seed=3), folder / "bids")
    grid = GridConfig(voxel_mm=6)
    build(folder / "bids", folder / "cohort.zarr", grid, "generated", salt="1" * 32)
    return folder / "cohort.zarr"
