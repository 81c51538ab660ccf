"""What all tests share: deterministic property tests, a small store made of real BOLD, GPU tests that skip themselves."""

from pathlib import Path

import nitime
import pytest
import torch
from hypothesis import settings

from swiftv2.config.data import GridConfig
from swiftv2.data.changes.build import build

settings.register_profile("swiftv2", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("swiftv2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip themselves where PyTorch finds none."""
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
