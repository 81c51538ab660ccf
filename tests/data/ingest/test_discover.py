import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from store_files import bold_values, mni_affine, save_nifti, save_run

from swiftv2.data.ingest.discover import Source, discover
from swiftv2.data.ingest.nifti import RefusedError, read_header
from swiftv2.data.ingest.sidecars import sidecar_facts
from swiftv2.data.labels import join_labels
from swiftv2.errors import UsageError

NAME = "sub-1_ses-a_task-rest_space-MNI152NLin6Asym_desc-preproc_bold"


def touch(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def state(path: Path, **facts: object) -> Path:
    return touch(path, json.dumps(facts))


def only(root: Path) -> Source:
    (source,) = discover(root).sources
    return source


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    touch(tmp_path / "sub-1" / "ses-a" / "func" / f"{NAME}.nii.gz")
    return tmp_path


def test_side_cars_are_inherited_and_the_nearest_wins(tree: Path) -> None:
    assert sidecar_facts(only(tree).sidecars) == (None, None)
    state(tree / "task-rest_bold.json", RepetitionTime=3.0, Space="MNI152NLin6Asym")
    assert sidecar_facts(only(tree).sidecars) == (3.0, "MNI152NLin6Asym")
    state(tree / "sub-1" / "sub-1_task-rest_bold.json", RepetitionTime=2.0)
    assert sidecar_facts(only(tree).sidecars) == (2.0, "MNI152NLin6Asym")
    state(tree / "sub-1" / "ses-a" / "func" / f"{NAME}.json", RepetitionTime=0.8)
    assert sidecar_facts(only(tree).sidecars) == (0.8, "MNI152NLin6Asym")


@pytest.mark.parametrize(
    "name",
    [
        "task-nback_bold.json",  # another task
        "task-rest_acq-fast_bold.json",  # an entity that the file has not
        "task-rest_boldref.json",  # another suffix
        "task-rest_desc-confounds_timeseries.json",
        "notes_bold.json",
        "sub-1/sub-2_bold.json",
        "sub-2/task-rest_bold.json",  # another branch of the tree
    ],
)
def test_side_cars_of_others_do_not_hold(name: str, tree: Path) -> None:
    state(tree / name, RepetitionTime=9.0)
    assert only(tree).sidecars == ()


def test_side_cars_above_the_source_do_not_hold(tree: Path) -> None:
    state(tree / "task-rest_bold.json", RepetitionTime=3.0)
    (source,) = discover(tree / "sub-1").sources
    assert source.sidecars == ()
    (globbed,) = discover(str(tree / "sub-*" / "*" / "func" / "*_bold.nii.gz")).sources
    assert sidecar_facts(globbed.sidecars) == (3.0, None)


def test_side_cars_of_one_level_must_agree(tree: Path) -> None:
    state(tree / "task-rest_bold.json", RepetitionTime=2.0)
    state(tree / "bold.json", RepetitionTime=2.0, Space="MNI152NLin6Asym")
    assert sidecar_facts(only(tree).sidecars) == (2.0, "MNI152NLin6Asym")
    state(tree / "bold.json", RepetitionTime=2.5)
    with pytest.raises(RefusedError, match=r"different RepetitionTime for it \(2.0 and 2.5\)"):
        sidecar_facts(only(tree).sidecars)
    # A nearer one decides; so does the file's own beside that of another space, as fMRIPrep writes them.
    func = tree / "sub-1" / "ses-a" / "func"
    state(func / "sub-1_ses-a_task-rest_desc-preproc_bold.json", RepetitionTime=1.0)
    assert sidecar_facts(only(tree).sidecars)[0] == 1.0
    state(func / f"{NAME}.json", RepetitionTime=0.72)
    assert sidecar_facts(only(tree).sidecars)[0] == 0.72


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not valid JSON .line 1"),
        ("[2.0]", "no JSON object"),
        ('{"RepetitionTime": "2"}', "no number"),
        ('{"RepetitionTime": true}', "no number"),
        ('{"VolumeTiming": [0, 2, 9]}', "VolumeTiming"),
    ],
)
def test_side_cars_without_sense_are_refused(content: str, reason: str, tree: Path) -> None:
    touch(tree / "task-rest_bold.json", content)
    with pytest.raises(RefusedError, match=reason):
        sidecar_facts(only(tree).sidecars)


def test_a_link_that_leads_nowhere_is_found_and_refused(tree: Path) -> None:
    path = tree / "sub-2" / "func" / "sub-2_task-rest_desc-preproc_bold.nii.gz"
    path.parent.mkdir(parents=True)
    path.symlink_to(tree / "annex" / "not-fetched")
    source = next(one for one in discover(tree).sources if one.subject == "2")
    assert source.size == 0
    with pytest.raises(RefusedError, match="missing"):
        read_header(source.path)


@pytest.mark.parametrize("source", ["", "sub-*/*/func/*_bold.nii.gz", "**/*_bold.nii.gz"])
@pytest.mark.parametrize("right", ["scandir", "access"])
def test_folders_that_cannot_be_read_stop_the_build(
    source: str, right: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subject in "234":
        touch(tree / f"sub-{subject}" / "ses-a" / "func" / f"{NAME.replace('sub-1', f'sub-{subject}')}.nii.gz")
    assert len(discover(str(tree / source)).sources) == 4
    closed = [str(tree / f"sub-{subject}" / "ses-a" / "func") for subject in "23"]
    real = getattr(os, right)

    def denying(path: object = ".", *arguments: object, **options: object) -> object:
        """What the system does where the user is not root, whom these tests may run as."""
        if str(path) in closed:
            if right == "access":
                return False
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, right, denying)
    with pytest.raises(UsageError, match=r"2 folders of .* cannot be read") as stopped:
        discover(str(tree / source))
    assert "\n" not in str(stopped.value)
    assert "sub-2" not in str(stopped.value)


def test_sessions_tables_join(tree: Path) -> None:
    touch(tree / "participants.tsv", "participant_id\tsex\nsub-1\tF\n")
    touch(tree / "sub-1" / "sub-1_sessions.tsv", "session_id\tage\nses-a\t10\nses-b\t12\n")
    found = discover(tree)
    assert join_labels(found.labels, [one.name for one in found.sources]) == [{"sex": "F", "age": "10"}]
    touch(tree / "sub-1" / "sub-1_sessions.tsv", "session_id\tage\nses-x\t10\n")
    with pytest.raises(UsageError, match="no session of the label table"):
        discover(tree)
    given = touch(tree / "labels.tsv", "participant_id\tage\nsub-1\t44\n")
    assert join_labels(discover(tree, given).labels, [found.sources[0].name]) == [{"age": "44"}]


def test_lines_with_a_file_hold_for_that_file_only(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        touch(tmp_path / f"{name}.nii.gz")
    lines = ["subject,file,task,score,tr", "p,one.nii.gz,a,1,0.8", f"p,{tmp_path / 'two.nii.gz'},b,2,x", "p,gone.nii.gz,c,3,2"]
    found = discover(str(tmp_path / "*.nii.gz"), [touch(tmp_path / "t.csv", "\n".join(lines))])
    assert [one.subject for one in found.sources] == ["p", "", "p"]
    joined = join_labels(found.labels, [one.name for one in found.sources])
    assert [values.get("score") for values in joined] == ["1", None, "2"]
    assert found.sources[0].tr == 0.8
    assert found.sources[1].tr is None
    assert np.isnan(found.sources[2].tr or 0)


def test_one_file_is_one_run(tmp_path: Path) -> None:
    touch(tmp_path / "one.nii.gz")
    given = touch(tmp_path / "t.csv", "subject,file,score\np,one.nii.gz,1\nq,one.nii.gz,1\n")
    with pytest.raises(UsageError, match="one file to several subjects"):
        discover(str(tmp_path / "*.nii.gz"), given)


def test_repetition_time_of_a_subject_joins(tree: Path) -> None:
    found = discover(tree, touch(tree / "t.csv", "subject,TR\n1,0.72\n"))
    assert found.sources[0].tr == 0.72


def test_masks_and_tables_beside_a_run_are_found(tmp_path: Path) -> None:
    path = save_run(tmp_path, "1", bold_values(0, frames=3), mask=np.ones((34, 40, 36), dtype=bool))
    stem = path.name.partition("_space")[0]
    table = touch(path.parent / f"{stem}_desc-confounds_regressors.tsv")
    assert only(tmp_path).confounds == table
    newer = touch(path.parent / f"{stem}_desc-confounds_timeseries.tsv")
    source = only(tmp_path)
    assert source.confounds == newer
    assert source.mask is not None
    assert source.mask.name.endswith("_desc-brain_mask.nii.gz")
    save_nifti(tmp_path / "other" / "scan_bold.nii", bold_values(0, frames=3), mni_affine())
    (plain,) = discover(str(tmp_path / "other" / "*.nii")).sources
    assert (plain.mask, plain.confounds, plain.sidecars, plain.subject) == (None, None, (), "")
