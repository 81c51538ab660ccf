import builtins
import contextlib
import errno
import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from store_files import SHAPE, bold_values, mni_affine, nifti, save_nifti

from swiftv2.data.grid import Placement, kept_voxels, place, source_grid
from swiftv2.data.ingest.nifti import (
    Bold,
    Header,
    RefusedError,
    background_number,
    read_bold,
    read_header,
    read_mask,
    repetition_time,
)


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


def states(frames: int, *, version: int = 1) -> Callable[[Path], Path]:
    """A file of three volumes whose header states others."""

    def make(path: Path) -> Path:
        form = nifti.Nifti1Image if version == 1 else nifti.Nifti2Image
        image = form(bold_values(0, frames=3), mni_affine())
        image.set_sform(mni_affine(), code=4)
        nifti.save(image, path)
        packed = path.name.endswith(".gz")
        data = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        struct.pack_into("<h" if version == 1 else "<q", data, 48, frames)
        path.write_bytes(gzip.compress(data) if packed else data)
        return path

    return make


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


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("frames", "version", "reason"),
    [(32767, 1, "cannot hold"), (99_999, 2, "cannot hold"), (10**12, 2, "more than 100000"), (-5, 1, "one frame")],
)
def test_headers_that_state_more_than_the_file_holds_are_refused_unread(
    suffix: str, frames: int, version: int, reason: str, tmp_path: Path
) -> None:
    path = states(frames, version=version)(tmp_path / f"run{suffix}")
    with pytest.raises(RefusedError, match=reason):
        read_header(path)


def test_a_file_of_zeros_is_no_damage(tmp_path: Path) -> None:
    save_nifti(tmp_path / "run.nii.gz", np.zeros((*SHAPE, 300), np.int16), mni_affine())
    assert read_header(tmp_path / "run.nii.gz").frames == 300


def test_files_that_may_not_be_read_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = good(tmp_path / "sub-secret_bold.nii.gz")
    real: Any = io.open

    def denying(file: object, *arguments: Any, **options: Any) -> Any:
        """What the system does where the user is not root, whom these tests may run as."""
        if str(file) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(file, *arguments, **options)

    monkeypatch.setattr(io, "open", denying)
    monkeypatch.setattr(builtins, "open", denying)
    with pytest.raises(RefusedError, match=r"^the file cannot be read \(Permission denied\)$"):
        read_header(path)


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


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", ">i4", ">f8", "float64"])
def test_every_real_number_type_is_read(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 120, size=(3, 4, 5, 6)).astype(dtype)
    image = nifti.Nifti1Image(data, mni_affine(), dtype=np.dtype(dtype))
    image.set_sform(mni_affine(), code=4)
    nifti.save(image, tmp_path / "run.nii.gz")
    assert read_header(tmp_path / "run.nii.gz").dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(read_all(tmp_path / "run.nii.gz"), data.transpose(3, 0, 1, 2).reshape(6, -1))


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [(0.0, 7.0, (1.0, 0.0)), (np.nan, np.nan, (1.0, 0.0)), (2.0, 7.0, (2.0, 7.0)), (-0.5, 0.0, (-0.5, 0.0))],
)
def test_a_slope_of_zero_or_none_means_no_scale(
    slope: float, intercept: float, expected: tuple[float, float], tmp_path: Path
) -> None:
    path = good(tmp_path / "run.nii")
    content = bytearray(path.read_bytes())
    content[112:120] = np.asarray([slope, intercept], dtype="<f4").tobytes()
    path.write_bytes(bytes(content))
    header = read_header(path)
    assert (header.slope, header.intercept) == expected


def test_a_header_is_read_without_the_volumes(tmp_path: Path) -> None:
    path = good(tmp_path / "run.nii.gz")
    whole = read_header(path)
    path.write_bytes(path.read_bytes()[:40_000])  # of 120,000
    again = read_header(path)
    assert (again.shape, again.frames, again.dtype, again.tr) == (whole.shape, whole.frames, whole.dtype, whole.tr)
    with pytest.raises(RefusedError, match="truncated"):
        read_all(path)


def test_what_follows_the_volumes(tmp_path: Path) -> None:
    path = good(tmp_path / "run.nii.gz")
    data, whole = read_all(path), path.read_bytes()
    content = gzip.decompress(whole)
    split = 352 + 1001
    path.write_bytes(gzip.compress(content[:split]) + gzip.compress(content[split:]))  # two members: one stream, says gzip
    np.testing.assert_array_equal(read_all(path), data)
    path.write_bytes(whole + b"\0" * 512)  # padding, as tapes leave it
    np.testing.assert_array_equal(read_all(path), data)
    path.write_bytes(whole + b"something else")
    with pytest.raises(RefusedError, match="truncated or damaged"):
        read_all(path)
    volume = data[0].nbytes
    path.write_bytes(gzip.compress(content + b"\1" * (volume - 1)))
    np.testing.assert_array_equal(read_all(path), data)
    path.write_bytes(whole + gzip.compress(b"\1" * volume))
    with pytest.raises(RefusedError, match="more volumes than its header states"):
        read_all(path)
    plain = tmp_path / "run.nii"
    plain.write_bytes(content + b"\1" * volume)
    with pytest.raises(RefusedError, match="more volumes"):
        read_all(plain)


FINE_MM, FINE_SHAPE = 3.0, (30, 32, 28)


def resampled(volume: np.ndarray, coarse_mm: float, path: Path) -> tuple[Bold, Placement, np.ndarray]:
    """A volume at 3 mm, twice, brought to another grid; where its voxels lie in the file, and in world coordinates."""
    affine = np.diag([FINE_MM, FINE_MM, FINE_MM, 1.0])
    save_nifti(path, np.stack([volume, volume], axis=-1), affine)
    coarse = np.diag([coarse_mm, coarse_mm, coarse_mm, 1.0])
    coarse[:3, 3] = 12.0
    shape = tuple(int((size - 8) * FINE_MM / coarse_mm) for size in FINE_SHAPE)
    grid = source_grid((shape[0], shape[1], shape[2]), coarse, "RAS", "scanner")
    voxels = kept_voxels(grid, "box")
    header = read_header(path)
    placement = place(grid, voxels, header.shape, header.affine)
    return read_bold(path, header, placement), placement, grid.world(voxels)


def unsmoothed(volume: np.ndarray, placement: Placement) -> np.ndarray:
    return np.asarray(ndimage.map_coordinates(volume, placement.coordinates.T, order=1))


@pytest.mark.parametrize(("axes", "left"), [(1, 0.15), (2, 0.03), (3, 0.01)])
def test_detail_that_the_grid_cannot_hold_does_not_come_back_as_another(axes: int, left: float, tmp_path: Path) -> None:
    steps = sum(np.meshgrid(*(np.arange(size) * (axis < axes) for axis, size in enumerate(FINE_SHAPE)), indexing="ij"))
    board = (1000 + 100 * (-1.0) ** np.asarray(steps)).astype(np.float32)
    bold, placement, _ = resampled(board, 6.0, tmp_path / "board.nii")
    # At every other voxel the board looks constant, at 1100: pure false signal.
    assert np.ptp(unsmoothed(board, placement)) == 0
    assert unsmoothed(board, placement)[0] == pytest.approx(1100)
    np.testing.assert_allclose(bold.numbers, 1000, atol=100 * left)


def test_detail_just_beyond_the_grid_is_weakened_for_any_ratio(tmp_path: Path) -> None:
    x = np.arange(FINE_SHAPE[0])[:, None, None] * FINE_MM
    wave = 1000 + 100 * np.cos(2 * np.pi * x / 6.5) * np.ones(FINE_SHAPE)  # a period of 6.5 mm; 4.5 mm voxels hold 9
    bold, placement, _ = resampled(wave.astype(np.float32), 4.5, tmp_path / "wave.nii")
    assert bold.numbers.std() < 0.7 * unsmoothed(wave, placement).std()


@pytest.mark.parametrize("coarse_mm", [4.0, 6.0])
def test_a_smooth_image_is_kept(coarse_mm: float, tmp_path: Path) -> None:
    x, y, z = np.meshgrid(*(np.arange(size) * FINE_MM for size in FINE_SHAPE), indexing="ij")
    smooth = 1000 + 100 * np.exp(-((x - 45) ** 2 + (y - 48) ** 2 + (z - 42) ** 2) / (2 * 15.0**2)) + 2 * y
    bold, placement, world = resampled(smooth.astype(np.float32), coarse_mm, tmp_path / "smooth.nii")
    there = np.exp(-((world - (45, 48, 42)) ** 2).sum(axis=1) / (2 * 15.0**2))
    # A blob of 35 mm full width loses 5 % of its height at most, a gradient nothing.
    assert placement.inside.all()
    np.testing.assert_allclose(bold.numbers[0], 1000 + 100 * there + 2 * world[:, 1], atol=5.0)


def test_coarse_files_are_not_smoothed(tmp_path: Path) -> None:
    rough = np.random.default_rng(0).normal(1000, 50, FINE_SHAPE).astype(np.float32)
    for edge in (2.0, 3.0):
        bold, placement, _ = resampled(rough, edge, tmp_path / "rough.nii")
        if placement.exact:
            np.testing.assert_array_equal(bold.numbers[0], unsmoothed(rough, placement).astype(np.float32))
        assert placement.sigma == (0.0, 0.0, 0.0)
        np.testing.assert_allclose(bold.numbers[0], unsmoothed(rough, placement), rtol=1e-6)


def test_masks_follow_from_one_half_on(tmp_path: Path) -> None:
    brain = np.zeros(FINE_SHAPE, dtype=np.int16)
    brain[8:22, 8:22, 8:22] = 1
    bold, placement, world = resampled((brain * 900).astype(np.int16), 6.0, tmp_path / "bold.nii")
    save_nifti(tmp_path / "mask.nii", brain.astype(np.uint8), np.diag([FINE_MM, FINE_MM, FINE_MM, 1.0]))
    mask = read_mask(tmp_path / "mask.nii", read_header(tmp_path / "bold.nii"), placement)
    np.testing.assert_array_equal(mask, bold.nonzero)
    # Its faces lie at 22.5 and 64.5 mm: nothing beyond them counts; all within them does, but for rounded corners.
    assert mask[((world > 25.5) & (world < 61.5)).all(axis=1)].all()
    assert not mask[((world < 22.5) | (world > 64.5)).any(axis=1)].any()
    # What interpolation smears beyond the brain is no brain.
    assert (bold.numbers[0] > 0).sum() > mask.sum()


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
