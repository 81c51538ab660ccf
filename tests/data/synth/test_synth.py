"""The generated cohort as files: what a store, a scanner and fMRIPrep would agree on."""

import csv
import hashlib
import json
from itertools import pairwise
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
from swiftv2.data.ingest.confounds import read_confounds
from swiftv2.data.ingest.discover import discover
from swiftv2.data.ingest.sidecars import sidecar_facts
from swiftv2.data.synth import generate
from swiftv2.data.synth.anatomy import NETWORKS, TISSUES, Atlas, load_atlas
from swiftv2.data.synth.files import FAULTS, field_of_view, write_person
from swiftv2.data.synth.latents import LATERAL
from swiftv2.data.synth.people import TRAITS, Person, draw_people, table, withdrawn
from swiftv2.data.synth.volumes import SLOPE, Anatomy, Run, components, make_anatomy, make_run, shared_signal
from swiftv2.errors import UsageError

# nibabel's images carry no precise annotations.
nifti: Any = nib
CONFIG = SynthConfig(
    subjects=8, voxel_mm=6, frames=40, bad_files=len(FAULTS), session_share=0.3, non_steady_frames=2, missing_share=0.2
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight good subjects at 6 mm, and one bad file of each kind."""
    folder = tmp_path_factory.mktemp("synth") / "cohort"
    report = generate(CONFIG, folder)
    assert (report.subjects, report.bad_files) == (8, 5)
    return folder


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return load_atlas(6.0)


def _bold_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*_desc-preproc_bold.nii.gz"))


def _good_files(folder: Path) -> list[Path]:
    return [path for path in _bold_files(folder) if int(path.name[4:8]) <= CONFIG.subjects]


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_files_do_not_depend_on_the_workers(cohort: Path, tmp_path: Path) -> None:
    generate(CONFIG, tmp_path / "again", workers=2)
    assert _hashes(tmp_path / "again") == _hashes(cohort)


def test_the_same_configuration_again_is_nothing_to_do_and_another_is_refused(cohort: Path, tmp_path: Path) -> None:
    assert generate(CONFIG, cohort).nothing_to_do
    with pytest.raises(UsageError, match="another configuration"):
        generate(CONFIG.model_copy(update={"seed": 1}), cohort)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        generate(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_files_are_integers_with_a_slope_and_both_voxel_orders_occur(cohort: Path) -> None:
    orders = set()
    for path in _good_files(cohort):
        image = nifti.load(path)
        orders.add("".join(nifti.aff2axcodes(image.affine)))
        assert image.get_data_dtype() == np.int16
        assert image.dataobj.slope == SLOPE
        assert image.header.get_zooms() == (6.0, 6.0, 6.0, 2.0)
        assert image.shape[3] == CONFIG.frames
    assert orders == {"RAS", "LAS"}


def test_most_of_the_variance_is_the_static_image(cohort: Path) -> None:
    for path in _good_files(cohort):
        brain = np.asarray(nifti.load(str(path).replace("preproc_bold", "brain_mask")).dataobj) > 0
        values = nifti.load(path).get_fdata()[brain][:, 2:]
        assert 0.95 <= values.mean(axis=1).var() / values.var() < 0.9995


@pytest.mark.parametrize("index", range(4))
def test_fluctuation_and_temporal_snr_of_grey_matter(atlas: Atlas, index: int) -> None:
    config = CONFIG.model_copy(update={"frames": 120})
    anatomy, run, share = _simulated(config, atlas, index)
    person = draw_people(config, index + 1)[index]
    assert 0.5 <= person.fluctuation <= 1.5
    grey = (anatomy.grey > 0.5) & anatomy.brain
    values = run.stored[:, grey].astype(np.float64)
    assert 40 <= np.median(values.mean(axis=0) / values.std(axis=0)) <= 80
    # Neither all noise nor all signal: about 0.4 of a grey voxel's fluctuation is shared.
    assert 0.1 <= share <= 0.85


def _simulated(config: SynthConfig, atlas: Atlas, index: int) -> tuple[Anatomy, Run, float]:
    person = draw_people(config, index + 1)[index]
    lattice = field_of_view(atlas, config.voxel_mm)
    anatomy = make_anatomy(person, atlas, lattice, keyed.generator(config.seed, "anatomy", index))
    signal = shared_signal(*components(person, anatomy, config.frames, keyed.generator(config.seed, "test", index)))
    run = make_run(person, anatomy, config.frames, 0, keyed.generator(config.seed, "test", index))
    grey = (anatomy.grey[anatomy.head] > 0.5) & anatomy.brain[anatomy.head]
    whole = run.stored[:, anatomy.head][:, grey] * (100 * SLOPE / anatomy.static[anatomy.head][grey])
    return anatomy, run, float(signal[:, grey].var(axis=0).sum() / whole.var(axis=0).sum())


def test_las_and_ras_hold_the_same_brain(atlas: Atlas, tmp_path: Path) -> None:
    images = []
    for name, share in (("las", 1.0), ("ras", 0.0)):
        config = CONFIG.model_copy(update={"las_share": share})
        (tmp_path / name).mkdir()
        write_person(config, draw_people(config, 1)[0], atlas, tmp_path / name)
        images.append(nifti.load(_bold_files(tmp_path / name)[0]))
    assert ["".join(nifti.aff2axcodes(image.affine)) for image in images] == ["LAS", "RAS"]
    las, ras = (nifti.as_closest_canonical(image) for image in images)
    np.testing.assert_array_equal(las.affine, ras.affine)
    np.testing.assert_array_equal(np.asarray(las.dataobj), np.asarray(ras.dataobj))
    assert not np.array_equal(np.asarray(images[0].dataobj), np.asarray(images[1].dataobj))


def test_a_flip_turns_the_asymmetry_round(atlas: Atlas) -> None:
    people = draw_people(CONFIG, 12)
    truth = np.array([person.laterality for person in people])
    readings = np.array([_lateralities(person, atlas) for person in people])
    assert np.corrcoef(readings[:, 0], truth)[0, 1] > 0.8
    assert np.corrcoef(readings[:, 1], truth)[0, 1] < -0.8


def _lateralities(person: Person, atlas: Atlas) -> tuple[float, float]:
    """Left over right amplitude (log) of the network by regression on the template's maps: as it is, and mirrored."""
    lattice = field_of_view(atlas, CONFIG.voxel_mm)
    anatomy = make_anatomy(person, atlas, lattice, keyed.generator(CONFIG.seed, "anatomy", person.index))
    run = make_run(person, anatomy, 120, 0, keyed.generator(CONFIG.seed, "test", person.index))
    tissue, networks = np.split(atlas.sample(lattice, np.zeros(3), 1.0).astype(np.float64), [len(TISSUES)])
    lateral = networks[NETWORKS.index(LATERAL)]
    left = lattice.axes()[2] < 0
    others = np.delete(networks, NETWORKS.index(LATERAL), axis=0)
    brain = tissue[0] > 0.9
    maps = np.concatenate([np.stack([lateral * left, lateral * ~left, tissue[0]]), others])[:, brain]
    reader = np.linalg.solve(maps @ maps.T, maps)[:2]
    found = []
    for stored in (run.stored, run.stored[..., ::-1]):
        values = stored[:, brain].astype(np.float64)
        left_course, right_course = reader @ (values / values.mean(axis=0).clip(1.0)).T
        found.append(float(np.log(left_course.std() / right_course.std())))
    return found[0], found[1]


def test_sidecars_masks_and_confounds_are_read_by_the_store(cohort: Path) -> None:
    found = discover(cohort)
    assert found.generated
    assert len(found.labels) == CONFIG.subjects + CONFIG.bad_files
    sessions = {source.session for source in found.sources}
    assert sessions == {"", "1", "2"}
    marked = 0
    for source in found.sources:
        assert source.mask is not None
        assert source.confounds is not None
        assert sidecar_facts(source.sidecars) == (2.0, "MNI152NLin2009cAsym")
        confounds = read_confounds(source.confounds, CONFIG.frames)
        assert np.isnan(confounds.framewise_displacement[0])
        assert 0 < np.nanmedian(confounds.framewise_displacement) < 1
        np.testing.assert_array_equal(confounds.censored > 0, confounds.framewise_displacement > 0.5)
        marked += int(confounds.non_steady_state.sum())
    assert marked > 0


def test_confounds_follow_the_images(cohort: Path) -> None:
    path = _good_files(cohort)[0]
    brain = np.asarray(nifti.load(str(path).replace("preproc_bold", "brain_mask")).dataobj) > 0
    with Path(str(path).partition("_space-")[0] + "_desc-confounds_timeseries.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    said = [float(row["global_signal"]) for row in rows]
    np.testing.assert_allclose(said, nifti.load(path).get_fdata()[brain].mean(axis=0), rtol=1e-4)
    assert {"csf", "white_matter"} <= set(rows[0])
    moves = np.array(
        [[float(row[name]) for name in ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")] for row in rows]
    )
    displacement = (np.abs(np.diff(moves, axis=0)) @ np.array([1, 1, 1, 50, 50, 50])).tolist()
    np.testing.assert_allclose([float(row["framewise_displacement"]) for row in rows[1:]], displacement, atol=2e-3)


def test_bad_files_are_bad_as_said(cohort: Path) -> None:
    bad = {int(path.name[4:8]) - CONFIG.subjects - 1: path for path in reversed(_bold_files(cohort))}
    files = {fault: bad[index] for index, fault in enumerate(FAULTS)}
    with pytest.raises((EOFError, OSError)):
        nifti.load(files["truncated"]).get_fdata()
    assert np.isnan(nifti.load(files["nan"]).get_fdata()).any()
    assert np.ptp(nifti.load(files["constant"]).get_fdata()) == 0
    assert nifti.load(files["three_dimensional"]).ndim == 3
    header = nifti.load(files["no_orientation"]).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 0)


def test_a_store_takes_the_good_runs_and_says_what_is_wrong_with_the_bad(cohort: Path, tmp_path: Path) -> None:
    report = build(cohort, tmp_path / "cohort.zarr", GridConfig(voxel_mm=6), "generated")
    assert report.taken == len(_bold_files(cohort)) - len(FAULTS)
    lines = [json.loads(line) for line in report.report.read_text().splitlines()]
    refused = {line["file"].partition("/")[0]: line["reason"] for line in lines if line["status"] == "refused"}
    reasons = [refused[f"sub-{CONFIG.subjects + 1 + number:04d}"] for number in range(len(FAULTS))]
    expected = ("truncated or damaged", "NaN or infinity", "constant", "3-D, not 4-D", "no orientation")
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True)), reasons


def test_labels_families_and_withdrawals(cohort: Path) -> None:
    with (cohort / "participants.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert set(rows[0]) == {"participant_id", "site", "family_id", *TRAITS}
    assert any(row[name] == "n/a" for row in rows for name in TRAITS)
    assert set(json.loads((cohort / "traits.json").read_text())) == set(TRAITS)
    many = draw_people(CONFIG, 600)
    config = CONFIG.model_copy(update={"withdrawn_share": 0.1})
    assert 30 <= len(withdrawn(config, many)) <= 90
    assert set(withdrawn(config, many)) <= {row["participant_id"] for row in table(config, many)}
    pairs = [(a, b) for a, b in pairwise(many) if a.family == b.family]
    assert 0.12 <= 2 * len(pairs) / len(many) <= 0.28
    assert all(a.site == b.site for a, b in pairs)
    alike = [a.labels["coupling_strong"] == b.labels["coupling_strong"] for a, b in pairs]
    assert np.mean(alike) > 0.55


def test_minutes_and_other_voxel_sizes(atlas: Atlas, tmp_path: Path) -> None:
    config = configured(
        SynthConfig, {"minutes": 1, "repetition_times": [2.0, 0.8], "voxel_mm": 6, "other_voxel_share": 1.0}, where="test"
    )
    assert [config.run_frames(tr) for tr in config.repetition_times] == [30, 75]
    write_person(config.model_copy(update={"other_voxel_mm": 4.0}), draw_people(config, 1)[0], atlas, tmp_path)
    assert nifti.load(_bold_files(tmp_path)[0]).header.get_zooms()[:3] == (4.0, 4.0, 4.0)
    with pytest.raises(UsageError, match="must divide 192"):
        configured(SynthConfig, {"voxel_mm": 5}, where="test")
