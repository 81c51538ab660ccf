import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nilearn
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from nilearn import signal
from pydantic import ValidationError
from store_files import SPACE, bold_values, mni_affine, save_run

from swiftv2.config.clean import CleanConfig
from swiftv2.data.grid import kept_voxels, mni152_grid
from swiftv2.data.ingest.clean import clean_run
from swiftv2.data.ingest.discover import discover
from swiftv2.data.ingest.nifti import Bold, RefusedError, read_header
from swiftv2.data.ingest.run import Candidate, Taken, take_run

FMRIPREP = Path(nilearn.__file__).parent / "interfaces" / "fmriprep" / "data"
FRAMES, TR = 240, 2.0
SECONDS = np.arange(FRAMES) * TR
Floats = npt.NDArray[np.floating]


def run_of(values: Floats) -> Bold:
    return Bold(values.astype(np.float64), 1.0, 0.0, np.asarray((values != 0).any(axis=0)))


def cleaned(values: Floats, config: CleanConfig, **options: object) -> Floats:
    bold = run_of(values)
    out, _ = clean_run(bold, bold.nonzero, config, TR, int(str(options.get("steady_from", 0))), None)
    return out.numbers.astype(np.float64)


def wave(hertz: float, height: float = 10.0) -> Floats:
    course: Floats = 1000.0 + height * np.sin(2 * np.pi * hertz * SECONDS)[:, None]
    return course


def height_of(values: Floats, hertz: float) -> float:
    """Amplitude of a frequency, away from the ends, where filters ring."""
    middle = slice(40, 200)
    window = np.hanning(160)
    turns = np.exp(-2j * np.pi * hertz * SECONDS[middle])
    return float(2 * np.abs((values[middle, 0] - values[middle, 0].mean()) * window @ turns) / window.sum())


BAND = CleanConfig(high_pass_hz=0.01, low_pass_hz=0.1)


@pytest.mark.parametrize(("hertz", "share"), [(0.004, 0.0), (0.03, 1.0), (0.07, 1.0), (0.16, 0.0)])
def test_waves_outside_the_band_go_and_those_inside_stay(hertz: float, share: float) -> None:
    out = cleaned(wave(hertz), BAND)
    assert height_of(out, hertz) / 10 == pytest.approx(share, abs=0.03)
    assert out.mean() == pytest.approx(wave(hertz).mean(), abs=1e-3)


def test_a_trend_goes_and_the_mean_stays_or_goes_as_asked() -> None:
    noise = np.random.default_rng(0).normal(0, 3, (FRAMES, 5))
    values = 500.0 + np.arange(5) * 100 + noise + 0.5 * np.arange(FRAMES)[:, None]
    kept = cleaned(values, CleanConfig(detrend=True))
    np.testing.assert_allclose(kept.mean(axis=0), values.mean(axis=0), rtol=1e-6)
    slope = np.polyfit(np.arange(FRAMES), kept, 1)[0]
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    bare = cleaned(values, CleanConfig(detrend=True, keep_mean=False))
    np.testing.assert_allclose(bare.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(bare, kept - values.mean(axis=0), atol=1e-3)


def confound_table(path: Path, seed: int = 0, leading: int = 0) -> pd.DataFrame:
    """A table with all that fMRIPrep writes and the strategy `simple` takes."""
    rng = np.random.default_rng(seed)
    table: dict[str, Floats] = {
        f"cosine{n:02d}": np.cos(np.pi * (n + 1) * (np.arange(FRAMES) + 0.5) / FRAMES) for n in range(3)
    }
    for name in ("csf", "white_matter", *(f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz")):
        course = np.cumsum(rng.normal(0, 0.05, FRAMES))
        step = np.diff(course, prepend=np.nan)
        table |= {
            name: course,
            f"{name}_derivative1": step,
            f"{name}_power2": course**2,
            f"{name}_derivative1_power2": step**2,
        }
    table["framewise_displacement"] = np.abs(table["trans_x_derivative1"])
    for number in range(leading):
        table[f"non_steady_state_outlier{number:02d}"] = (np.arange(FRAMES) == number).astype(float)
    frame = pd.DataFrame(table)
    frame.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return frame


@pytest.mark.parametrize("leading", [0, 4])
def test_confounds_are_regressed_out(leading: int, tmp_path: Path) -> None:
    path = tmp_path / "sub-secret_task-rest_desc-confounds_regressors.tsv"
    table = confound_table(path, leading=leading)
    rng = np.random.default_rng(1)
    weights = rng.normal(0, 30, (2, 50))
    values = 800.0 + rng.normal(0, 5, (FRAMES, 50)) + table[["trans_x", "csf"]].to_numpy() @ weights
    bold = run_of(values)
    out, done = clean_run(bold, bold.nonzero, CleanConfig(strategy="simple"), TR, leading, path)
    assert (done["strategy"], done["confounds"], done["from_frame"]) == ("simple", 24 + 2 + 3, leading)
    assert done["nilearn"] == nilearn.__version__
    json.dumps(done)
    steady = out.numbers[leading:].astype(np.float64)
    for name in ("trans_x", "rot_z_derivative1_power2", "csf", "cosine01"):
        column = table[name].to_numpy()[leading:]
        known = np.isfinite(column)  # the first derivative is nobody's
        corrected = np.where(known, column, column[np.flatnonzero(known)[0]])
        for voxel in range(0, 50, 7):
            assert abs(np.corrcoef(corrected, steady[:, voxel])[0, 1]) < 1e-6
    # Volumes that are not steady take no part, and stay.
    np.testing.assert_allclose(out.numbers[:leading], values[:leading], rtol=1e-6)


def test_compcor_takes_the_components_that_the_json_names(tmp_path: Path) -> None:
    path = tmp_path / "sub-secret_desc-confounds_timeseries.tsv"
    table = confound_table(path)
    rng = np.random.default_rng(4)
    names = [f"a_comp_cor_{number:02d}" for number in range(4)]
    for name in names:
        table[name] = rng.normal(size=FRAMES)
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    masks = ["combined", "combined", "WM", "CSF"]
    described = {name: {"Mask": mask, "Method": "aCompCor"} for name, mask in zip(names, masks, strict=True)}
    path.with_suffix(".json").write_text(json.dumps(described))
    values = 800.0 + rng.normal(0, 5, (FRAMES, 3)) + 20 * table[names].to_numpy() @ np.ones((4, 3))
    bold = run_of(values)
    out, done = clean_run(bold, bold.nonzero, CleanConfig(strategy="compcor"), TR, 0, path)
    assert done["confounds"] == 24 + 3 + 2
    left = [abs(np.corrcoef(table[name], out.numbers[:, 0].astype(np.float64))[0, 1]) for name in names]
    assert max(left[:2]) < 1e-6
    assert min(left[2:]) > 0.5


def test_the_result_is_nilearns_own(tmp_path: Path) -> None:
    table = confound_table(tmp_path / "t.tsv")
    rng = np.random.default_rng(2)
    values = 800.0 + rng.normal(0, 5, (FRAMES, 7))
    config = CleanConfig(strategy="simple", detrend=True, low_pass_hz=0.12, keep_mean=False)
    bold = run_of(values)
    out, _ = clean_run(bold, bold.nonzero, config, TR, 0, tmp_path / "t.tsv")
    names = [name for name in table if "displacement" not in name and ("power2" not in name or "t_" in name or "trans" in name)]
    names = [name for name in names if not (name.startswith(("csf_", "white_matter_")))]
    confounds = table[names].bfill().to_numpy()
    expected = signal.clean(values, detrend=True, standardize=None, confounds=confounds, low_pass=0.12, t_r=TR)
    np.testing.assert_allclose(out.numbers, expected - expected.mean(axis=0), atol=1e-4)


def test_blocks_change_nothing_and_bound_memory() -> None:
    rng = np.random.default_rng(3)
    numbers = (1000 + rng.normal(0, 20, (FRAMES, 3000))).astype(np.int16)
    numbers[:, ::5] = 0
    bold = Bold(numbers, 0.5, 3.0, np.asarray(numbers.any(axis=0)))
    results, peaks = [], []
    for size in (1 << 18, 1 << 20, 1 << 30):
        tracemalloc.start()
        out, _ = clean_run(bold, bold.nonzero, BAND, TR, 2, None, block_bytes=size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        results.append(out.numbers)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-6)
    result, matrices = results[0].nbytes, 4 * 8 * FRAMES**2
    # Statistics of 16 volumes and the operator come before the result; then there is the result and some blocks.
    assert peaks[0] < result + matrices + 6 * (1 << 18)
    assert peaks[0] < peaks[2] / 3


def test_background_stays_what_it_is() -> None:
    values = np.repeat(wave(0.03), 4, axis=1)
    values[:, 1], values[:, 2] = 0.0, 7.0
    for keep in (True, False):
        out = cleaned(values, CleanConfig(high_pass_hz=0.01, keep_mean=keep))
        assert (out[:, 1] == 0).all()
        assert (out[:, 2] == 7).all()


def test_volumes_that_are_left_out_lose_the_mean_that_others_lose() -> None:
    values = wave(0.03)
    values[:3] += 900.0
    out = cleaned(values, CleanConfig(detrend=True, keep_mean=False), steady_from=3)
    np.testing.assert_allclose(out[:3], values[:3] - values[3:].mean(), rtol=1e-6)
    assert out[3:].mean() == pytest.approx(0, abs=1e-5)


def test_what_cannot_be_cleaned_is_refused() -> None:
    values = np.random.default_rng(0).normal(900, 9, (FRAMES, 4))
    with pytest.raises(RefusedError, match="cleaned already"):
        cleaned(values - values.mean(axis=0), BAND)
    with pytest.raises(RefusedError, match=r"0\.25 Hz, the highest frequency that TR 2 s holds"):
        cleaned(values, CleanConfig(low_pass_hz=0.25))
    with pytest.raises(RefusedError, match=r"20 frames are too few for clean.high_pass_hz=0.01: 40 s"):
        cleaned(values[:20], CleanConfig(high_pass_hz=0.01))
    with pytest.raises(RefusedError, match="12 steady frames are too few for the filter"):
        cleaned(values[:12], CleanConfig(low_pass_hz=0.1))
    with pytest.raises(RefusedError, match="no confound table beside it"):
        cleaned(values, CleanConfig(strategy="simple"))
    with pytest.raises(ValidationError, match="must lie below"):
        CleanConfig(high_pass_hz=0.1, low_pass_hz=0.1)


def test_tables_that_do_not_serve_are_refused_in_one_line(tmp_path: Path) -> None:
    bold = run_of(np.random.default_rng(0).normal(900, 9, (30, 4)))
    folder = tmp_path / "sub-secret"
    folder.mkdir()
    table = folder / "sub-secret_desc-confounds_timeseries.tsv"

    def refusal(strategy: str) -> str:
        with pytest.raises(RefusedError) as refused:
            clean_run(bold, bold.nonzero, CleanConfig.model_validate({"strategy": strategy}), TR, 0, table)
        text = str(refused.value)
        assert "secret" not in text
        assert "\n" not in text
        return text

    shutil.copy(FMRIPREP / "test-v21_desc-confounds_timeseries.tsv", table)
    assert "30 frames are too few for 27 confounds: 2 degrees" in refusal("simple")
    assert "no JSON beside" in refusal("compcor")
    shutil.copy(FMRIPREP / "test-v21_desc-confounds_timeseries.json", table.with_suffix(".json"))
    assert "30 frames are too few for 30 confounds" in refusal("compcor")
    table.with_suffix(".json").write_text("{")
    assert "do not serve clean.strategy=compcor" in refusal("compcor")
    table.with_suffix(".json").unlink()
    pd.DataFrame({"trans_x": np.zeros(30)}).to_csv(table, sep="\t", index=False)
    assert "do not serve clean.strategy=simple" in refusal("simple")
    assert "rot_z" in refusal("simple")
    assert refusal("simple").endswith("', ..."), "a long message ends after a word"


def taken(root: Path, clean: CleanConfig | None, *, keep_float: bool = False) -> Taken:
    (source,) = discover(root).sources
    grid = mni152_grid(6.0, "RAS", SPACE)
    candidate = Candidate(0, "rkey", "skey", "demo", source, read_header(source.path), TR, SPACE)
    return take_run(candidate, grid, kept_voxels(grid, "template"), keep_float=keep_float, clean=clean)


def test_a_run_that_memory_cannot_hold_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path, "1", bold_values(0), tr=TR)
    (source,) = discover(tmp_path).sources
    grid = mni152_grid(6.0, "RAS", SPACE)
    header = replace(read_header(source.path), frames=10**12)
    candidate = Candidate(0, "rkey", "skey", "demo", source, header, TR, SPACE)
    with pytest.raises(RefusedError, match="no memory for its 1000000000000 frames"):
        take_run(candidate, grid, kept_voxels(grid, "template"))


def test_a_run_is_cleaned_on_its_way_into_the_store(tmp_path: Path) -> None:
    data = bold_values(0, frames=60)
    data[:12] = 0
    save_run(tmp_path, "1", data, affine=mni_affine())
    plain = taken(tmp_path, None)
    assert (plain.run.cleaning, plain.run.values) == ({}, "exact")
    config = CleanConfig(detrend=True, low_pass_hz=0.1)
    result = taken(tmp_path, config)
    assert result.run.cleaning == {
        **config.model_dump(mode="json"),
        "nilearn": nilearn.__version__,
        "confounds": 0,
        "from_frame": 0,
    }
    assert (result.run.values, result.run.dtype, result.run.cleaned) == ("scaled", "int16", False)
    np.testing.assert_array_equal(result.rows["brain"], plain.rows["brain"])
    assert 0 < result.rows["brain"].mean() < 1
    with pytest.raises(RefusedError, match="no confound table beside it"):
        taken(tmp_path, CleanConfig(strategy="simple"))
    exact = taken(tmp_path, config, keep_float=True)
    assert exact.run.dtype == "float32"
    values = result.bold * result.run.slope + result.run.intercept
    assert np.abs(values - exact.bold).max() <= result.run.max_error * (1 + 1e-6)
    np.testing.assert_allclose(exact.rows["voxel_mean"], plain.rows["voxel_mean"], rtol=1e-5, atol=1e-3)
    assert exact.rows["voxel_std"].mean() < 0.8 * plain.rows["voxel_std"].mean()
    assert not exact.bold[:, ~exact.rows["brain"]].any()
    bare = taken(tmp_path, CleanConfig(detrend=True, keep_mean=False))
    assert bare.run.cleaned


def test_a_run_that_was_cleaned_elsewhere_is_taken_and_marked_but_not_cleaned_again(tmp_path: Path) -> None:
    data = bold_values(0, frames=40).astype(np.float32)
    data -= data.mean(axis=-1, keepdims=True)
    data[:12] = 0
    save_run(tmp_path, "1", data)
    run = taken(tmp_path, None)
    assert run.run.cleaned
    assert (run.run.cleaning, run.run.brain_rule) == ({}, "nonzero")
    assert 0 < run.rows["brain"].mean() < 1
    with pytest.raises(RefusedError, match="cleaned already"):
        taken(tmp_path, CleanConfig(detrend=True))
