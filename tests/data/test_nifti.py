import contextlib
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_files import SHAPE, bold_values, mni_affine, nifti, save_nifti

from swiftv2.data.grid import kept_voxels, place, source_grid
from swiftv2.data.nifti import Header, RefusedError, background_number, read_bold, read_header, repetition_time


def read_all(path: Path) -> np.ndarray:
    header = read_header(path)
    grid = source_grid(header.shape, header.affine, "RAS", "scanner")
    voxels = kept_voxels(grid, "box")
    return read_bold(path, header, place(grid, voxels, header.shape, header.affine)).numbers


def good(path: Path) -> Path:
    return save_nifti(path, bold_values(0, frames=5), mni_affine())


def cut(path: Path) -> Path:
    data = good(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def flip_a_bit(path: Path) -> Path:
    data = bytearray(good(path).read_bytes())
    data[-6] ^= 1  # in gzip's own checksum
    path.write_bytes(bytes(data))
    return path


def short(path: Path) -> Path:
    data = gzip.decompress(good(path).read_bytes())
    path.write_bytes(gzip.compress(data[:-1000]))
    return path


def noise(path: Path) -> Path:
    path.write_bytes(b"not a NIfTI file" * 100)
    return path


def left_or_right(path: Path) -> Path:
    image = nifti.Nifti1Image(bold_values(0, frames=3), mni_affine())
    image.set_sform(mni_affine(), code=4)
    image.set_qform(np.diag([-1.0, 1, 1, 1]) @ mni_affine(), code=1)
    nifti.save(image, path)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "half a file": (cut, "truncated or damaged"),
    "a flipped bit": (flip_a_bit, "truncated or damaged"),
    "fewer volumes": (short, "fewer volumes"),
    "something else": (noise, "truncated or damaged"),
    "3-D": (lambda path: save_nifti(path, bold_values(0)[..., 0], mni_affine()), "3-D, not 4-D"),
    "5-D": (lambda path: save_nifti(path, bold_values(0)[..., None, :], mni_affine()), "5-D, not 4-D"),
    "one frame": (lambda path: save_nifti(path, bold_values(0, frames=1), mni_affine()), "one frame"),
    "no orientation": (lambda path: save_nifti(path, bold_values(0), mni_affine(), codes=(0, 0)), "no orientation"),
    "complex": (lambda path: save_nifti(path, bold_values(0).astype(np.complex64), mni_affine()), "number type"),
    "contradiction": (left_or_right, "disagree on left and right"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_by_reason(kind: str, tmp_path: Path) -> None:
    make, reason = BAD[kind]
    path = make(tmp_path / "sub-secret_bold.nii.gz")
    with pytest.raises(RefusedError, match=reason) as refusal:
        read_all(path)
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="missing"):
        read_header(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">u1"])
def test_stored_numbers_come_out_as_they_are(suffix: str, dtype: str, tmp_path: Path) -> None:
    data = (bold_values(1, frames=4) % 200).astype(dtype)
    path = tmp_path / f"run{suffix}"
    image = nifti.Nifti1Image(data, mni_affine())
    image.set_data_dtype(dtype)
    image.header.set_slope_inter(0.5, 3.0)
    image.set_sform(mni_affine(), code=4)
    nifti.save(image, path)
    header = read_header(path)
    assert (header.slope, header.intercept, header.orientation) == (0.5, 3.0, "RAS")
    np.testing.assert_array_equal(read_all(path), data.transpose(3, 0, 1, 2).reshape(4, -1))


def header_with(tr: float | None) -> Header:
    return Header(SHAPE, 10, np.dtype("int16"), 1.0, 0.0, mni_affine(), "RAS", tr)


@pytest.mark.parametrize(
    ("stated", "in_header", "expected", "result"),
    [
        (2.0, 2.0, None, 2.0),
        (0.72, 1.0, None, 0.72),  # tools write 1 where they do not know
        (0.72, None, 0.72, 0.72),
        (None, 1.35, None, 1.35),
    ],
)
def test_repetition_time(stated: float | None, in_header: float | None, expected: float | None, result: float) -> None:
    assert repetition_time(stated, header_with(in_header), expected) == result


@pytest.mark.parametrize(
    ("stated", "in_header", "expected", "reason"),
    [
        (None, None, None, "TR missing"),
        (0.0, None, None, "implausible"),
        (None, 2000.0, None, "implausible"),
        (float("nan"), None, None, "implausible"),
        (2.0, 3.0, None, "in its header"),
        (2.0, None, 0.8, "is expected"),
    ],
)
def test_repetition_time_refused(stated: float | None, in_header: float | None, expected: float | None, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        repetition_time(stated, header_with(in_header), expected)


def test_header_time_follows_its_unit(tmp_path: Path) -> None:
    path = good(tmp_path / "run.nii")
    image = nifti.load(path)
    image.header.set_xyzt_units("mm", "msec")
    image.header["pixdim"][4] = 720.0
    nifti.save(image, tmp_path / "msec.nii")
    assert read_header(tmp_path / "msec.nii").tr == pytest.approx(0.72)
    image.header.set_xyzt_units("mm", "unknown")
    nifti.save(image, tmp_path / "unknown.nii")
    assert read_header(tmp_path / "unknown.nii").tr is None


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (70, b"\x53\x00"),  # a number type that does not exist
        (108, np.float32(100).tobytes()),  # voxels that begin inside the header
        (112, np.float32(2).tobytes() + np.float32(np.inf).tobytes()),  # a slope whose intercept is no number
        (123, b"\x58"),  # units that do not exist
        (288, np.float32(1e30).tobytes()),  # an axis that swallows another
    ],
)
def test_a_header_without_sense_is_a_refusal_of_this_file(offset: int, data: bytes, tmp_path: Path) -> None:
    path = good(tmp_path / "run.nii")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))
    with pytest.raises(RefusedError):
        read_header(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 347), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_header_is_read_or_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    path = good(tmp_path / "run.nii")
    content = bytearray(path.read_bytes())
    for place_, value in changes:
        content[place_] = value
    path.write_bytes(bytes(content))
    with contextlib.suppress(RefusedError):
        assert len(read_header(path).orientation) == 3


def test_background_is_the_number_nearest_to_zero() -> None:
    assert background_number(np.dtype("int16"), 0.5, 10.0) == -20
    assert background_number(np.dtype("uint8"), 1.0, 10.0) == 0
    assert background_number(np.dtype("float32"), 2.0, 1.0) == -0.5
