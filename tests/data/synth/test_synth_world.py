"""The generated cohort in the world and in time: sides, voxel sizes, sites, motion, and the numbers that are frozen."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from swiftv2.config.data import GridConfig
from swiftv2.config.load import build as configured
from swiftv2.config.synth import SynthConfig
from swiftv2.data import keyed
from swiftv2.data.changes.build import build
from swiftv2.data.store.reader import Store
from swiftv2.data.synth.anatomy import Atlas, Lattice, load_atlas
from swiftv2.data.synth.cohort import VERSION
from swiftv2.data.synth.files import field_of_view, write_person
from swiftv2.data.synth.people import Person, draw_people
from swiftv2.data.synth.volumes import SLOPE, SOURCES, Anatomy, components, make_anatomy, make_run, spike
from swiftv2.errors import UsageError

# nibabel's images carry no precise annotations.
nifti: Any = nib
CONFIG = SynthConfig(subjects=8, voxel_mm=6, frames=40, session_share=0.0)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return load_atlas(6.0)


@pytest.fixture(scope="module")
def lattice(atlas: Atlas) -> Lattice:
    return field_of_view(atlas, 6.0)


def _anatomy(person: Person, atlas: Atlas, lattice: Lattice) -> Anatomy:
    return make_anatomy(person, atlas, lattice, keyed.generator(0, "anatomy", person.index))


def _written(folder: Path, config: SynthConfig, person: Person, atlas: Atlas) -> Path:
    folder.mkdir(exist_ok=True)
    write_person(config, person, atlas, folder)
    return folder


def test_one_person_in_las_and_in_ras_gives_equal_stores(atlas: Atlas, tmp_path: Path) -> None:
    stores = []
    for name, share in (("las", 1.0), ("ras", 0.0)):
        config = CONFIG.model_copy(update={"las_share": share})
        files = _written(tmp_path / name, config, draw_people(config, 1)[0], atlas)
        build(files, tmp_path / f"{name}.zarr", GridConfig(voxel_mm=6), "generated", salt="0" * 32)
        stores.append(Store.open(tmp_path / f"{name}.zarr"))
    las, ras = stores
    assert [store.runs[0].source_orientation for store in stores] == ["LAS", "RAS"]
    np.testing.assert_array_equal(las.read_bold(0, 0, CONFIG.frames), ras.read_bold(0, 0, CONFIG.frames))
    np.testing.assert_array_equal(las.brain(0), ras.brain(0))
    np.testing.assert_array_equal(las.voxel_mean(0), ras.voxel_mean(0))
    assert las.runs[0].statistics == ras.runs[0].statistics


def test_another_voxel_size_needs_resampling(atlas: Atlas, tmp_path: Path) -> None:
    people = draw_people(CONFIG, 2)
    files = _written(tmp_path / "files", CONFIG, people[0], atlas)
    other = CONFIG.model_copy(update={"other_voxel_share": 1.0, "other_voxel_mm": 8.0})
    _written(files, other, people[1], atlas)
    report = build(files, tmp_path / "exact.zarr", GridConfig(voxel_mm=6), "generated")
    assert report.taken == 1
    assert "8x8x8 mm" in report.refused[0][1]
    assert "grid.resample=true" in report.refused[0][1]
    assert build(files, tmp_path / "resampled.zarr", GridConfig(voxel_mm=6, resample=True), "generated").taken == 2
    assert sorted(run.resampled for run in Store.open(tmp_path / "resampled.zarr").runs) == [False, True]


def test_sites_have_their_repetition_times(atlas: Atlas, tmp_path: Path) -> None:
    times = (0.72, 0.8, 2.0, 3.0)
    config = configured(SynthConfig, {"voxel_mm": 6, "frames": 20, "sites": 4, "repetition_times": list(times)}, "test")
    for person in {person.site: person for person in reversed(draw_people(config, 8))}.values():
        files = _written(tmp_path / f"{person.site}", config, person, atlas)
        assert person.tr == times[person.site]
        side = next(files.rglob("*_bold.json"))
        assert json.loads(side.read_text())["RepetitionTime"] == person.tr
        header = nifti.load(side.with_suffix(".nii.gz")).header
        assert header.get_zooms()[3] == pytest.approx(person.tr)
        assert header.get_xyzt_units() == ("mm", "sec")
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(UsageError, match="unused"):
        configured(SynthConfig, {"sites": 3, "repetition_times": list(times)}, "test")


def test_large_ventricles_show_more_on_the_left_and_a_flip_shows(atlas: Atlas, lattice: Lattice) -> None:
    person = draw_people(CONFIG, 1)[0]
    small, large = (
        _anatomy(dataclasses.replace(person, ventricle_growth=growth), atlas, lattice).static for growth in (0.1, 0.9)
    )
    x = np.broadcast_to(lattice.axes()[2], lattice.shape)
    changed = np.abs(large - small)
    assert changed[x < 0].sum() > 1.2 * changed[x > 0].sum()
    mirrored = changed[..., ::-1]
    assert mirrored[x > 0].sum() > 1.2 * mirrored[x < 0].sum()
    assert np.abs(large - large[..., ::-1]).max() > 50


def test_heads_lie_up_to_two_millimetres_apart(atlas: Atlas, lattice: Lattice) -> None:
    world = np.stack(np.broadcast_arrays(*reversed(lattice.axes())))
    centres = []
    for person in draw_people(CONFIG, 12):
        head = _anatomy(person, atlas, lattice).static > 500
        centres.append(world[:, head].mean(axis=1))
    apart = np.array(centres) - np.mean(centres, axis=0)
    assert np.all(np.abs(apart) < 3.0)
    assert np.all(apart.std(axis=0) > 0.5)


def test_networks_fluctuate_by_half_to_one_and_a_half_per_cent_of_grey_matter(atlas: Atlas, lattice: Lattice) -> None:
    asked, found = [], []
    for person in draw_people(CONFIG, 12):
        anatomy = _anatomy(person, atlas, lattice)
        courses, maps = components(person, anatomy, 120, keyed.generator(0, "run", person.index))
        signal = courses[SOURCES["networks"]].T @ maps[SOURCES["networks"]]
        asked.append(person.fluctuation)
        found.append(float(np.sqrt(signal[:, anatomy.grey[anatomy.head] > 0.5].var(axis=0).mean())))
    assert min(found) > 0.5
    assert max(found) < 1.5
    np.testing.assert_allclose(np.mean(found), np.mean(asked), rtol=0.1)


def test_frames_jump_where_the_head_moves(atlas: Atlas, lattice: Lattice) -> None:
    restless = dataclasses.replace(draw_people(CONFIG, 1)[0], restlessness=1.0)
    anatomy = _anatomy(restless, atlas, lattice)
    run = make_run(restless, anatomy, 200, 0, keyed.generator(0, "run", 0))
    displacement = run.confounds["framewise_displacement"]
    assert np.isnan(displacement[0])
    spikes = np.flatnonzero(displacement > 0.5 + np.nanmedian(displacement))
    assert 3 < len(spikes) < 60
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    steps = np.diff(np.stack([run.confounds[name] for name in names], axis=1), axis=0, prepend=0.0)
    values = run.stored[:, anatomy.head].astype(np.float64) * SLOPE
    deviations = values - values.mean(axis=0)

    def seen(frame: int, step: int) -> float:
        """How much of the change that this step makes is in this frame: 1 is all of it."""
        pattern = spike(anatomy, steps[step]).astype(np.float64)
        return float(deviations[frame] @ pattern / (pattern @ pattern))

    moved = spikes.tolist()
    after = [frame for frame in moved if frame + 1 < len(values) and frame + 1 not in moved]
    assert np.mean([seen(frame, frame) for frame in moved]) == pytest.approx(1.0, abs=0.3)
    assert np.mean([seen(frame + 1, frame) for frame in after]) == pytest.approx(0.0, abs=0.3)


def test_version_3_is_frozen(atlas: Atlas, lattice: Lattice) -> None:
    """The numbers of one run, to a step; where they change, so do all results: raise `VERSION` and write the new ones here."""
    assert VERSION == 3
    person = draw_people(CONFIG, 1)[0]
    run = make_run(person, _anatomy(person, atlas, lattice), 40, 0, keyed.generator(0, "run", 0))
    assert run.stored.shape == (40, *lattice.shape)
    found = run.stored[13, 8:24:5, 8:24:5, 8:20:4]
    expected = [
        [[609, 656, 658], [632, 698, 730], [781, 0, 491], [146, 120, 0]],
        [[573, 719, 729], [698, 828, 827], [773, 787, 753], [845, 821, 856]],
        [[551, 642, 736], [607, 726, 805], [642, 825, 833], [697, 809, 760]],
        [[605, 656, 684], [577, 669, 685], [670, 687, 689], [545, 730, 780]],
    ]
    np.testing.assert_allclose(found, expected, atol=1)
    assert int(run.stored.astype(np.int64).sum()) == pytest.approx(271_831_760, rel=1e-6)
