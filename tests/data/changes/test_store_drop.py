import json
import shutil
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_changes import (
    BOX,
    SALT,
    TINY,
    Killed,
    append_tiny,
    assert_same,
    build_tiny,
    dies_at,
    drop_tiny,
    everything,
    save_cohort,
)
from store_files import bold_values, contents, mni_affine, save_nifti, save_run

from swiftv2 import cli, weights
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.drop import drop, read_withdrawals
from swiftv2.data.keys import subject_key
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Run, Store
from swiftv2.data.store.verify import verify
from swiftv2.errors import DamagedError, SwiftError, UsageError

KEPT = {"key", "subject", "cohort", "session", "task", "run", "row", "dtype", "frames", "tr", "space", "steady_from", "since"}
IDS = ("alpha77", "beta88", "gamma99")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subjects with telling ids, one with two runs, one whose only run is refused; and one id in two cohorts."""
    root = tmp_path_factory.mktemp("withdrawal")
    for number, name in enumerate(IDS):
        save_cohort(root / "one", [name], first=number)
    save_run(root / "one", "alpha77", bold_values(7, 15, TINY), run="2")
    save_run(root / "one", "omega00", np.full((*TINY, 6), 700, dtype=np.int16))
    lines = ["participant_id\tage", *(f"sub-{name}\t4{number}" for number, name in enumerate(IDS))]
    (root / "one" / "participants.tsv").write_text("\n".join(lines) + "\n")
    save_cohort(root / "two", ["beta88", "delta11"], first=11, frames=20)
    build_tiny(root / "one", root / "store")
    append_tiny(root / "two", root / "store")
    return root / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


def encoded_chunks(store: Path, run: Run) -> Iterator[bytes]:
    """The bytes of a run's chunks as they lie in its files and in those that it shares."""
    for path in layout.bold_shards(store, run.dtype, run.row):
        yield path.read_bytes()
    for small in layout.SMALL_ARRAYS:
        for path in (store / small.name).glob(f"c.{run.row // layout.ROWS_PER_SHARD}.*"):
            data = path.read_bytes()
            table = struct.unpack(f"<{2 * layout.ROWS_PER_SHARD}Q", data[-16 * layout.ROWS_PER_SHARD - 4 : -4])
            offset, length = table[2 * (run.row % layout.ROWS_PER_SHARD) :][:2]
            if offset != 2**64 - 1:
                yield data[offset : offset + length]


def traces(store: Path, run: Run, subject: str) -> list[bytes]:
    """All that would betray that the run's data are still there."""
    found = [data[start : start + 24] for data in encoded_chunks(store, run) for start in range(0, len(data) - 24, 97)]
    opened = Store.open(store)
    index = opened.runs.index(run)
    for rows in (opened.read_bold(index, 0, run.frames), opened.voxel_mean(index)[None], opened.voxel_std(index)[None]):
        found += [row.tobytes()[:24] for row in rows]
    telling = [trace for trace in found if len(set(trace)) > 14]  # Not padding, nor headers and tables.
    telling.append(json.dumps(run.statistics[:2])[1:-1].encode())
    return [*telling, subject.encode(), run.source_sha256.encode()]


def test_no_byte_stays_and_the_others_stay_as_they_are(store: Path) -> None:
    opened, before, files = Store.open(store), everything(store), contents(store)
    key = subject_key(SALT, "one", "alpha77")
    gone = [run for run in opened.runs if run.subject == key]
    assert len(gone) == 2
    wanted = [trace for run in gone for trace in traces(store, run, "alpha77")]
    assert len(wanted) > 100
    assert all(
        any(trace in data for data in files.values()) for trace in (wanted[0], b"alpha77", gone[0].source_sha256.encode())
    )
    report = drop_tiny(store, "sub-alpha77")
    assert (report.version, report.subjects, set(report.runs)) == (3, (key,), {run.key for run in gone})
    assert report.bytes == sum(run.bytes for run in gone)
    for name, data in contents(store).items():
        assert not [trace for trace in wanted if trace in data], name
        assert "alpha77" not in name
    assert_same(everything(store), {run: parts for run, parts in before.items() if run not in report.runs})
    left = {name: data for name, data in contents(store).items() if name.startswith("bold/") and "/c." in name}
    assert left == {name: files[name] for name in left}
    rows = {run.row for run in opened.runs} - {run.row for run in gone}
    assert {int(name.split("/c.")[1].split(".")[0]) for name in left} == rows
    after = Store.open(store)
    assert [run.key for run in after.runs] == [run.key for run in opened.runs]
    for index, run in enumerate(after.runs):
        line = run.to_json()
        assert {name: line[name] for name in KEPT} == {name: opened.runs[index].to_json()[name] for name in KEPT}
        if run.subject != key:
            assert run == opened.runs[index]
            continue
        assert (run.withdrawn, run.present) == (3, False)
        assert not any(np.any(line[name]) for name in line.keys() - KEPT - {"withdrawn"})
        with pytest.raises(SwiftError, match="withdrawn"):
            after.read_bold(index, 0, 1)
        assert not after.brain(index).any()
    assert verify(store).ok
    assert "alpha77" not in after.subject_ids()
    private = [layout.SUBJECTS_FILE, layout.REPORT_FILE, layout.WITHDRAWALS_FILE]
    assert [stat.S_IMODE((store / name).stat().st_mode) for name in private] == [0o600] * 3
    assert sorted(path.name for path in store.glob("runs*")) == ["runs.3.jsonl"]
    assert not list(store.glob(".*"))


def test_a_reader_of_the_former_version_meets_an_error_not_zeros(store: Path) -> None:
    reader = Store.open(store)
    key = subject_key(SALT, "one", "gamma99")
    index = next(i for i, run in enumerate(reader.runs) if run.subject == key)
    drop_tiny(store, "gamma99")
    with pytest.raises(SwiftError, match="withdrawn in version"):
        reader.read_bold(index, 0, 5)
    other = next(i for i, run in enumerate(reader.runs) if run.subject != key)
    reader.read_bold(other, 0, 5)


def test_damage_of_another_run_is_not_told_as_withdrawal(store: Path) -> None:
    """A reader that opened the store before the drop meets a damaged, a lost and a withdrawn run."""
    reader = Store.open(store)
    names = ("gamma99", "alpha77", "delta11")
    keys = [subject_key(SALT, cohort, name) for cohort, name in zip(("one", "one", "two"), names, strict=True)]
    gone, damaged, lost = (next(i for i, run in enumerate(reader.runs) if run.subject == key) for key in keys)
    drop_tiny(store, "gamma99")
    for index in (damaged, lost):
        shard, *_ = layout.bold_shards(store, reader.runs[index].dtype, reader.runs[index].row)
        if index == lost:
            shard.unlink()
        else:
            shard.write_bytes(bytes(200) + shard.read_bytes()[200:])
        with pytest.raises(DamagedError, match=f"run {reader.runs[index].key}.*restore the file"):
            reader.read_bold(index, 0, 5)
    with pytest.raises(SwiftError, match="withdrawn in version 3") as told:
        reader.read_bold(gone, 0, 5)
    assert not isinstance(told.value, DamagedError)


def test_the_list_may_name_subjects_in_many_ways(store: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list"
    key = subject_key(SALT, "two", "delta11")
    listed.write_text(
        f"\ufeffeid\n# those who called\n\n alpha77 # by phone\nsub-gamma99\ntwo/beta88\n{key}\nalpha77\n", "utf-8"
    )
    found = read_withdrawals(store, listed).subjects
    assert {(one.cohort, one.id) for one in found} == {
        ("one", "alpha77"),
        ("one", "gamma99"),
        ("two", "beta88"),
        ("two", "delta11"),
    }
    listed.write_text("beta88\n")
    with pytest.raises(UsageError, match=r"line 1: several cohorts .* --cohort"):
        read_withdrawals(store, listed)
    assert [one.cohort for one in read_withdrawals(store, listed, "two").subjects] == ["two"]
    with pytest.raises(UsageError, match="no cohort three"):
        read_withdrawals(store, listed, "three")
    listed.write_text("delta11\nnobody1\nnobody2\n")
    with pytest.raises(UsageError, match="lines 2, 3: not in") as error:
        read_withdrawals(store, listed)
    assert "nobody" not in str(error.value)
    found_too = read_withdrawals(store, listed, ignore_unknown=True)
    assert (len(found_too.subjects), found_too.unknown) == (1, 2)
    with pytest.raises(UsageError, match="cannot be read"):
        read_withdrawals(store, tmp_path / "none")


def test_several_drops_and_appends(store: Path, tmp_path: Path) -> None:
    first = drop_tiny(store, "alpha77")
    second = drop_tiny(store, "gamma99", "alpha77")
    assert (first.version, second.version, second.already, len(second.subjects)) == (3, 4, 1, 1)
    before = contents(store)
    third = drop_tiny(store, "gamma99", "alpha77")
    assert (third.version, third.already, third.subjects) == (4, 2, ())
    assert contents(store) == before
    save_run(tmp_path / "in", "alpha77", bold_values(30, 9, TINY), run="3")
    save_run(tmp_path / "in", "new", bold_values(31, 9, TINY))
    report = append_tiny(tmp_path / "in", store, cohort="one")
    assert (report.version, report.taken) == (5, 1)
    assert [reason for _, reason in report.refused] == ["its subject's consent was withdrawn"]
    assert not any(b"alpha77" in data for data in contents(store).values())
    opened = Store.open(store)
    assert [(run.since, run.withdrawn) for run in opened.runs].count((1, 3)) == 2
    assert [one["change"] for one in opened.attributes["history"]] == ["build", "append", "drop", "drop", "append"]
    lines = [json.loads(line) for line in (store / layout.WITHDRAWALS_FILE).read_text().splitlines()]
    assert [(line["version"], len(line["subjects"]), len(line["runs"])) for line in lines] == [(3, 1, 2), (4, 1, 1)]
    assert verify(store).ok


def test_all_subjects_may_go(store: Path) -> None:
    drop_tiny(store, "alpha77", "one/beta88", "gamma99", "two/beta88", "delta11")
    opened = Store.open(store)
    assert not any(run.present for run in opened.runs)
    assert not list(store.glob("*/c.*.*"))
    assert not list(store.glob("bold/*/c.*"))
    assert verify(store).ok


def test_subjects_whose_runs_were_all_refused_are_forgotten(store: Path) -> None:
    assert b"omega00" in (store / layout.REPORT_FILE).read_bytes()
    assert drop_tiny(store, "omega00").version == 2
    assert not any(b"omega00" in data for data in contents(store).values())


def test_damage_elsewhere_does_not_hinder_it(store: Path) -> None:
    opened = Store.open(store)
    key = subject_key(SALT, "one", "gamma99")
    index = next(i for i, run in enumerate(opened.runs) if run.subject == key)
    other = opened.runs[0 if index else 1]
    shard = store / "voxel_mean" / "c.0.0"
    data = bytearray(shard.read_bytes())
    table = struct.unpack(f"<{2 * layout.ROWS_PER_SHARD}Q", data[-16 * layout.ROWS_PER_SHARD - 4 : -4])
    data[table[2 * other.row] + 30] ^= 1
    shard.write_bytes(bytes(data))
    index_damaged = store / "voxel_std" / "c.0.0"
    index_damaged.write_bytes(index_damaged.read_bytes()[:-1] + b"?")
    former = index_damaged.read_bytes()
    with pytest.raises(SwiftError, match=r"voxel_std/c\.0\.0 is damaged"):
        drop_tiny(store, "gamma99")
    now = Store.open(store)
    assert now.runs[index].withdrawn == 3
    assert not layout.bold_shards(store, "int16", now.runs[index].row)
    assert layout.unfinished(store) == "drop"
    assert index_damaged.read_bytes() == former
    index_damaged.unlink()
    assert drop_tiny(store, "gamma99").already == 1
    assert layout.unfinished(store) is None
    assert verify(store).bad  # The other damage is still told, not hidden.


def test_an_unfinished_append_is_not_dropped_into(store: Path, tmp_path: Path) -> None:
    save_run(tmp_path / "in", "x", np.full((*TINY, 30), 700, dtype=np.int16))
    save_run(tmp_path / "in", "y", bold_values(3, 30, TINY))
    with pytest.raises(SwiftError, match="refused"):
        append_tiny(tmp_path / "in", store, strict=True)
    with pytest.raises(UsageError, match="append is unfinished"):
        drop_tiny(store, "gamma99")
    shutil.rmtree(store / layout.STAGING)
    drop_tiny(store, "gamma99")
    assert verify(store).ok


def test_a_dry_run_changes_nothing(store: Path) -> None:
    before = contents(store)
    report = drop_tiny(store, "alpha77", dry_run=True)
    assert (report.version, len(report.subjects), len(report.runs)) == (2, 1, 2)
    assert contents(store) == before


def test_what_used_them_is_listed(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened, runs = Store.open(store), tmp_path / "runs"

    def card(folder: str, name: str, content: dict[str, Any]) -> None:
        (runs / folder).mkdir(parents=True, exist_ok=True)
        (runs / folder / name).write_text(json.dumps(content))

    def hashes(*names: str) -> dict[str, Any]:
        return weights.hash_subjects(names, "ab" * 16).model_dump(mode="json")

    own = {"id": opened.attributes["store_id"], "version": 2}
    key, other, kept = (subject_key(SALT, "one", name) for name in ("alpha77", "gamma99", "beta88"))
    clips = {run.key: 3 for run in opened.runs if run.subject in (kept, other)}
    nobody: dict[str, Any] = {"train": [kept], "val": [], "test": [], "unassigned": []}
    card("a", "contract.json", {"store": own, "subjects": hashes("one/alpha77", "one/gamma99")})
    card("b", "contract.json", {"store": own, "subjects": hashes("one/beta88")})
    card("c", "contract.json", {"store": own, "subjects": None, "splits": nobody | {"train": [key]}, "clips": clips})
    card("d/exported", "weights.json", {"subjects": hashes("one/gamma99"), "provenance": {"store": own}})
    card("e", "weights.json", {"subjects": None, "provenance": {"store": {"id": "another"}}})
    card("f", "embedding.json", {"subjects": hashes("one/alpha77")})
    card("g", "other.json", {"unrelated": 1})
    # Of val and test, a run evaluates the part whose runs it cut into clips.
    parts = nobody | {"val": [other], "test": [key]}
    card("h", "contract.json", {"store": own, "subjects": hashes("one/beta88"), "splits": parts, "clips": clips})
    card("i", "contract.json", {"store": {"id": "another"}, "subjects": hashes("one/x"), "splits": parts, "clips": clips})
    card("j", "contract.json", {"store": own, "subjects": {"salt": 3}})
    (runs / "g" / "broken.json").write_text("{")
    listed = tmp_path / "list.txt"
    listed.write_text("alpha77\ngamma99\nstranger\n")
    words = ["store", "drop", str(store), "--subjects", str(listed), "--ignore-unknown", "--used-by", str(runs), "--json"]
    expected = [
        (str(runs / "a"), "run", 2, None, True),
        (str(runs / "c"), "run", 1, 0, True),
        (str(runs / "d/exported"), "weights", 1, None, True),
        (str(runs / "e"), "weights", None, None, False),
        (str(runs / "f/embedding.json"), "other", 1, None, None),
        (str(runs / "h"), "run", 0, 1, True),
        (str(runs / "j"), "run", None, None, True),
    ]
    for more in (["--dry-run"], [], []):  # Later, too: the list has the ids that the store no longer has.
        assert cli.main([*words, *more]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert [tuple(user.values()) for user in answer["users"]] == expected
        assert answer["unknown"] == 1
        assert answer["cards"] == 9
    first = json.loads((store / layout.WITHDRAWALS_FILE).read_text().splitlines()[0])
    assert [user["path"] for user in first["users"]] == [path for path, *_ in expected]
    assert cli.main([*words[:-1]]) == 0
    text = capsys.readouterr().out
    assert "withdrawn before: 2 subjects\nnot known to the store: 1 line of the list\n" in text
    assert f"used by {runs / 'a'} (run): trained on 2 of the subjects\n" in text
    assert f"used by {runs / 'h'} (run): evaluated on 1 of the subjects\n" in text
    assert f"cannot tell of {runs / 'j'}" in text
    listed.write_text(f"{key}\n")
    assert cli.main(words) == 2
    assert "list their ids" in capsys.readouterr().err


def test_that_nothing_used_them_is_said(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed, runs = tmp_path / "list.txt", tmp_path / "runs"
    listed.write_text("gamma99\n")
    runs.mkdir()
    words = ["store", "drop", str(store), "--subjects", str(listed)]
    assert cli.main([*words, "--dry-run", "--used-by", str(runs)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{store} would lose 1 subject, 1 run, 0.")
    assert second == f"used by nothing in {runs}, where 0 cards of runs, weights and others were looked at"
    assert cli.main(words) == 0
    (only,) = capsys.readouterr().out.splitlines()
    assert only.startswith(f"{store} version 3: it lost 1 subject, 1 run, 0.")


def test_who_was_named_does_not_come_later(store: Path, tmp_path: Path) -> None:
    """Subjects who are not in the store (passed over, or all refused) and subjects who come under another cohort's name."""
    drop_tiny(store, "omega00", "alpha77")
    listed = tmp_path / "more.txt"
    listed.write_text("stranger1\none/stranger2\n")
    for _ in range(2):
        report = drop(store, read_withdrawals(store, listed, ignore_unknown=True))
        assert (report.version, report.unknown) == (3, 2)
    assert read_withdrawals(store, listed).unknown == 2  # The store has heard of them.
    assert len((store / layout.WITHDRAWALS_FILE).read_text().splitlines()) == 2
    assert stat.S_IMODE((store / layout.WITHDRAWALS_FILE).stat().st_mode) == 0o600
    names = ("omega00", "stranger1", "stranger2", "alpha77")
    for number, name in enumerate((*names, "beta88", "delta11")):
        save_run(tmp_path / "in", name, bold_values(40 + number, 9, TINY), run="9")
    for cohort, elsewhere in (("one", 0), ("two", 4), ("three", 4)):
        appended = append_tiny(tmp_path / "in", store, cohort=cohort)
        assert (appended.taken, len(appended.refused)) == (2, 4), cohort
        found = [reason for _, reason in appended.refused]
        assert sum("in another cohort" in reason for reason in found) <= elsewhere
        assert all("withdrawn" in reason for reason in found)
    assert not any(name.encode() in data for data in contents(store).values() for name in names)
    assert verify(store).ok


def test_one_of_two_subjects_of_an_id_may_stay(store: Path, tmp_path: Path) -> None:
    drop_tiny(store, "one/beta88")
    save_run(tmp_path / "in", "beta88", bold_values(50, 9, TINY), run="9")
    assert append_tiny(tmp_path / "in", store, cohort="two").taken == 1
    with pytest.raises(SwiftError, match="withdrawn"):
        append_tiny(tmp_path / "in", store, cohort="one")


def test_what_an_append_left_that_was_given_up_goes(store: Path, tmp_path: Path) -> None:
    before = contents(store)
    save_run(tmp_path / "in", "gone55", bold_values(60, 9, TINY))
    save_run(tmp_path / "in", "flat", np.full((*TINY, 6), 700, dtype=np.int16))
    with pytest.raises(SwiftError, match="refused"):
        append_tiny(tmp_path / "in", store, strict=True)
    shutil.rmtree(store / layout.STAGING)
    left = contents(store)
    assert any(b"gone55" in data for data in left.values())
    report = drop_tiny(store, "gone55")
    assert (report.version, report.leftovers, report.runs) == (2, 1, ())
    after = contents(store)
    assert not any(b"gone55" in data for data in after.values())
    assert {name: data for name, data in after.items() if "/c." in name} == {n: d for n, d in before.items() if "/c." in n}


def test_foreign_files_neither_hinder_it_nor_stay_unseen(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = ["bold/int16/c.old", "bold/int16/c.0.0.0.bak", "brain/c.0.0~", "voxel_mean/c.0.0.bak"]
    for name in foreign:
        (store / name).write_bytes(b"copy")
    listed = tmp_path / "list.txt"
    listed.write_text("gamma99\n")
    assert cli.main(["store", "drop", str(store), "--subjects", str(listed), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["foreign"] == sorted(foreign)
    assert "4 files" in said.err
    assert "may hold copies of withdrawn data" in said.err
    assert len(said.err.splitlines()) == 1
    assert all((store / name).read_bytes() == b"copy" for name in foreign)


def test_a_list_without_names_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("participant_id\n\n# none yet\n")
    with pytest.raises(UsageError, match="names no subject"):
        read_withdrawals(store, tmp_path / "list")


def test_lines_of_files_without_subject_go_by_their_names(store: Path, tmp_path: Path) -> None:
    for name in ("scan_zeta44_bold", "scan_zeta441_bold"):
        save_nifti(tmp_path / "plain" / f"{name}.nii.gz", bold_values(1, 9, TINY), mni_affine())
    save_run(tmp_path / "plain", "new", bold_values(2, 9, TINY))
    space = GridConfig(space=BOX.space)
    report = append_tiny(str(tmp_path / "plain" / "**" / "*bold.nii.gz"), store, grid=space)
    assert len(report.refused) == 2
    assert b"zeta44_" in (store / layout.REPORT_FILE).read_bytes()
    drop_tiny(store, "zeta44")
    text = (store / layout.REPORT_FILE).read_text()
    assert "zeta44_" not in text
    assert "zeta441_" in text


def test_a_killed_drop_that_is_finished_is_told(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed), dies_at(6, monkeypatch):
        drop_tiny(store, "gamma99")
    assert layout.unfinished(store) == "drop"
    words = ["store", "drop", str(store), "--subjects", str(store.with_name("withdrawn.txt"))]
    assert cli.main(words) == 0
    assert "a drop that was killed was finished first" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert "finished first" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (layout.REPORT_FILE, "{}\n", "line 1 is damaged"),
        (layout.REPORT_FILE, '{"version": 1}\n{"ver', "line 2 is damaged"),
        (layout.WITHDRAWALS_FILE, "[]\n", "line 1 is damaged"),
        (layout.SUBJECTS_FILE, "[]", "restore it from a copy, or ask the store's owner"),
        (layout.SUBJECTS_FILE, "", "restore it from a copy, or ask the store's owner"),
        (f"{layout.STAGING}/{layout.PLAN_FILE}", "{}", "damaged"),
        (f"{layout.DROPPING}/{layout.PLAN_FILE}", "{}", "damaged"),
        (f"{layout.DROPPING}/{layout.PLAN_FILE}", "[]", "damaged"),
    ],
)
def test_damaged_small_files_are_one_line(name: str, content: str, message: str, store: Path, tmp_path: Path) -> None:
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text(content)
    with pytest.raises(SwiftError, match=message) as error:
        drop_tiny(store, "gamma99")
    assert "build it again" not in str(error.value)
    save_run(tmp_path / "in", "new", bold_values(2, 9, TINY))
    with pytest.raises(SwiftError, match=message) as error:
        append_tiny(tmp_path / "in", store)
    assert "build it again" not in str(error.value)


def test_no_store(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("a\n")
    with pytest.raises(SwiftError, match="is no store"):
        drop(tmp_path / "none", read_withdrawals(tmp_path / "none", tmp_path / "list"))
