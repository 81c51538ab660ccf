import shutil
from pathlib import Path

import nilearn
import numpy as np
import pandas as pd
import pytest

from swiftv2.data.ingest.confounds import leading_non_steady, read_confounds
from swiftv2.data.ingest.nifti import RefusedError

PACKAGE = Path(nilearn.__file__).parent
FMRIPREP = PACKAGE / "interfaces" / "fmriprep" / "data"
FRAMES = 30


@pytest.mark.parametrize(
    ("name", "leading", "marked"),
    [
        ("test-v21_desc-confounds_timeseries.tsv", 3, True),
        ("test_desc-confounds_regressors.tsv", 1, False),
        ("no_nonsteady_desc-confounds_regressors.tsv", 0, False),
    ],
)
def test_real_tables_of_fmriprep(name: str, leading: int, marked: bool) -> None:
    confounds = read_confounds(FMRIPREP / name, FRAMES)
    table = pd.read_csv(FMRIPREP / name, sep="\t")
    np.testing.assert_allclose(confounds.framewise_displacement, table["framewise_displacement"], rtol=1e-6)
    assert np.isnan(confounds.framewise_displacement[0])
    np.testing.assert_array_equal(confounds.censored, table.filter(regex="^motion_outlier").sum(axis=1) > 0)
    assert confounds.censored.any() == marked
    np.testing.assert_array_equal(confounds.non_steady_state, np.arange(FRAMES) < leading)
    assert leading_non_steady(confounds.non_steady_state) == leading


def write(path: Path, columns: dict[str, list[object]]) -> Path:
    lines = ["\t".join(columns), *("\t".join(str(cell) for cell in line) for line in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_table_without_displacement_tells_nothing_of_motion(tmp_path: Path) -> None:
    path = tmp_path / "confounds.tsv"
    path.write_text((PACKAGE / "datasets/data/confounds_with_header.csv").read_text())
    confounds = read_confounds(path, 20)
    assert np.isnan(confounds.framewise_displacement).all()
    assert (confounds.censored == 255).all()
    assert (confounds.non_steady_state == 255).all()
    assert leading_non_steady(confounds.non_steady_state) == 0


@pytest.mark.parametrize(
    ("columns", "censored"),
    [
        ({"framewise_displacement": ["n/a", 0.1, 0.5]}, 0),
        ({"framewise_displacement": ["n/a", 0.1, 0.6]}, 255),  # fMRIPrep would have marked it, had it marked any
        ({"framewise_displacement": ["n/a", 0.1, 0.2], "std_dvars": ["n/a", 1.0, 1.6]}, 255),
        ({"framewise_displacement": ["n/a", 0.1, 0.6], "motion_outlier00": [0.0, 0.0, 0.0]}, 0),
        ({"motion_outlier00": [0, 0, 0]}, 0),
    ],
)
def test_no_column_of_outliers_means_none_only_where_there_can_be_none(
    columns: dict[str, list[object]], censored: int, tmp_path: Path
) -> None:
    assert (read_confounds(write(tmp_path / "t.tsv", columns), 3).censored == censored).all()


DISPLACEMENT = "framewise_displacement"
NONSENSE: dict[str, tuple[dict[str, list[object]] | str, str]] = {
    "negative": ({DISPLACEMENT: ["n/a", -0.1, 0.2]}, "negative in line 3"),
    "text": ({DISPLACEMENT: ["n/a", 0.1, "much"]}, "no number in line 4"),
    "infinite": ({DISPLACEMENT: ["n/a", "inf", 0.2]}, "infinite in line 3"),
    "half marked": ({DISPLACEMENT: [0, 0, 0], "motion_outlier00": [0, 0.5, 0]}, "neither 0 nor 1 in line 3"),
    "gap in marks": ({DISPLACEMENT: [0, 0, 0], "non_steady_state_outlier00": [1, "n/a", 0]}, "neither 0 nor 1"),
    "short": ({DISPLACEMENT: ["n/a", 0.1]}, "2 lines for 3 frames"),
    "long": ({DISPLACEMENT: ["n/a", 0.1, 0.1, 0.1]}, "4 lines for 3 frames"),
    "twins": (f"{DISPLACEMENT}\t{DISPLACEMENT}\n0\t0\n0\t0\n0\t0\n", "two columns of one name"),
    "ragged": (f"{DISPLACEMENT}\tcsf\n0\t0\n0\n0\t0\n", "line 3 of the confound table has 1 cells for 2"),
    "commas": (f"{DISPLACEMENT},csf\n0,0\n0,0\n0,0\n", "commas"),
    "empty": ("", "no header"),
    "zeros": ("a\0b\n" * 4, "confound table"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_by_reason(kind: str, tmp_path: Path) -> None:
    content, reason = NONSENSE[kind]
    path = tmp_path / "sub-secret_desc-confounds_timeseries.tsv"
    if isinstance(content, str):
        path.write_text(content)
    else:
        write(path, content)
    with pytest.raises(RefusedError, match=reason) as refusal:
        read_confounds(path, 3)
    assert "secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_other_tables_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "confounds.tsv"
    shutil.copy(PACKAGE / "datasets/data/spm_confounds.txt", path)
    with pytest.raises(RefusedError, match="no header"):
        read_confounds(path, 20)
    path.write_bytes(b"\xff\xfe\x00 not text \x81")
    with pytest.raises(RefusedError, match="UTF-8"):
        read_confounds(path, 20)
    with pytest.raises(RefusedError, match="cannot be read: No such file"):
        read_confounds(tmp_path / "none.tsv", 20)


def test_only_leading_volumes_count_as_a_run_in(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {
        DISPLACEMENT: [0.1] * 4,
        "non_steady_state_outlier00": [1, 0, 0, 0],
        "non_steady_state_outlier01": [0, 0, 1, 0],
    }
    confounds = read_confounds(write(tmp_path / "t.tsv", columns), 4)
    assert confounds.non_steady_state.tolist() == [1, 0, 1, 0]
    assert leading_non_steady(confounds.non_steady_state) == 1
    with pytest.raises(RefusedError, match="all its frames"):
        leading_non_steady(np.asarray([1, 1, 1, 0], dtype=np.uint8))
