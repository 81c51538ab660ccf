from pathlib import Path

import pytest

from swiftv2.data.labels import LabelTable, RunName, check_labels, join_labels, merge, read_labels, read_sessions
from swiftv2.errors import UsageError


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("header", "line", "key"),
    [
        ("participant_id\tage", "sub-01\t30", ("01", "")),
        ("src_subject_id,eventname,age", "NDARINV1,baseline_year_1_arm_1,10", ("NDARINV1", "baseline_year_1_arm_1")),
        ("subjectkey,visit,src_subject_id,age", "guid,x,NDAR_INV1,10", ("NDAR_INV1", "")),
        ("Subject,Gender,age", "100307,F,26", ("100307", "")),
        ("eid;age", "1000011;61", ("1000011", "")),
        ("age,Session_ID,SUBJECT_ID", "30,ses-2,sub-7", ("7", "2")),
    ],
)
def test_columns_of_many_cohorts_are_known(header: str, line: str, key: tuple[str, str], tmp_path: Path) -> None:
    path = table(tmp_path / ("t.tsv" if "\t" in header else "t.csv"), header, line)
    (row,) = read_labels([path]).rows
    assert (row.subject, row.session) == key
    assert dict(row.values)["age"] in ("30", "10", "26", "61")
    assert not {"eventname", "Session_ID"} & set(dict(row.values))


def test_words_for_missing_values(tmp_path: Path) -> None:
    words = ["", "n/a", "NA", "NaN", "None", "null", "#N/A"]
    path = table(tmp_path / "t.csv", "subject,x", *(f"s{i},{word}" for i, word in enumerate(words)), "n/a,5", "s9, 0 ")
    rows = read_labels([path]).rows
    assert [dict(row.values)["x"] for row in rows] == [None] * len(words) + ["0"]


BAD: dict[str, tuple[bytes, str]] = {
    "no subject": (b"name,age\na,1\n", "no subject column"),
    "empty": (b"", "no line below its header"),
    "header only": (b"subject,age\n", "no line below its header"),
    "ragged": (b"subject,age\na,1\nb,2,3\n", "line 3: 3 cells where the header has 2"),
    "short": (b"subject,age\na,1\n\nb\n", "line 4: 1 cells"),
    "twins": (b"subject,age,age\na,1,2\n", "several columns age"),
    "latin": ("subject,site\na,Köln\n".encode("latin-1"), "line 2: no UTF-8 text"),
    "binary": (b"subject\0,age\n", "no text"),
    "quotes": (b'subject,site\na,"K"oln\nb,c\n', "line 2: .*mend the quotes"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables_are_refused_with_line_and_reason(kind: str, tmp_path: Path) -> None:
    content, reason = BAD[kind]
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as refusal:
        read_labels([path])
    assert "Error" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_labels([tmp_path / "none.csv"])


def test_several_tables_and_sessions_merge(tmp_path: Path) -> None:
    first = table(tmp_path / "participants.tsv", "participant_id\tsex\tage", "sub-1\tF\tn/a", "sub-2\tM\t40")
    second = table(tmp_path / "more.csv", "subject,age,site", "1,30,A", "2,40,B")
    visits = table(tmp_path / "sub-1_sessions.tsv", "session_id\tscore", "ses-a\t1", "ses-b\t2")
    rows = merge([*read_labels([first, second]).rows, *read_sessions([("1", visits)])])
    runs = [RunName("1", "a", "rest", "1"), RunName("1", "b", "rest", ""), RunName("2", "", "", ""), RunName("3", "", "", "")]
    assert join_labels(rows, runs) == [
        {"sex": "F", "age": "30", "site": "A", "score": "1"},
        {"sex": "F", "age": "30", "site": "A", "score": "2"},
        {"sex": "M", "age": "40", "site": "B"},
        {},
    ]


def test_the_line_that_names_more_wins(tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.csv", "subject,session,task,run,y", "1,2,rest,1,exact", "1,2,,,visit", "1,,,,all", "1,,nback,,task"
    )
    rows = merge(read_labels([path]).rows)
    runs = [
        RunName("1", "2", "rest", "1"),
        RunName("1", "2", "rest", "2"),
        RunName("1", "1", "rest", "1"),
        RunName("1", "", "nback", ""),
    ]
    assert [values["y"] for values in join_labels(rows, runs)] == ["exact", "visit", "all", "task"]


def test_lines_of_one_key_that_differ_are_refused_without_ids(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "subject,age,sex", "secret,10,F", "secret,12,F", "other,9,M", "other,9,n/a")
    with pytest.raises(UsageError, match=r"for 1 of these in the column\(s\) age: ") as refusal:
        merge(read_labels([path]).rows)
    assert "secret" not in str(refusal.value)
    constant = table(tmp_path / "c.csv", "subject,session,age,site", "s,1,10,X", "s,2,12,X")
    assert len(merge(read_labels([constant]).rows)) == 2


def runs_of(*names: tuple[str, str]) -> list[RunName]:
    return [RunName(subject, session, "rest", "") for subject, session in names]


def test_ids_that_match_nobody_are_refused_by_their_shape(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "src_subject_id,age", "NDAR_INVAB12,10", "NDAR_INVCD34,11")
    with pytest.raises(UsageError) as refusal:
        check_labels(read_labels([path]), runs_of(("NDARINVAB12", ""), ("NDARINVEF56", "")))
    text = str(refusal.value)
    assert "none of the 2 subject ids" in text
    assert "Table: 12 characters, letters and digits and '_'; files: 11 characters, letters and digits" in text
    assert "AB12" not in text
    zeros = table(tmp_path / "z.csv", "subject,age", "1,10")
    with pytest.raises(UsageError, match="Table: 1 characters, digits; files: 3 characters, digits, beginning with 0"):
        check_labels(read_labels([zeros]), runs_of(("001", "")))


def test_some_ids_are_enough(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "subject,age", "sub-1,10", "2,11")
    labels = read_labels([path])
    runs = runs_of(("1", ""), ("3", ""), ("", ""))
    check_labels(labels, runs)
    assert [values.get("age") for values in join_labels(labels.rows, runs)] == ["10", None, None]


def test_sessions_that_no_run_has_are_refused(tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.csv", "src_subject_id,eventname,age", "a,baseline_year_1_arm_1,10", "a,2_year_follow_up_y_arm_1,12"
    )
    with pytest.raises(UsageError, match="the files name none: keep the lines of the visit"):
        check_labels(read_labels([path]), runs_of(("a", "")))
    with pytest.raises(UsageError, match=r"baseline_year_1_arm_1\) is one of the files' \(baselineYear1Arm1\)"):
        check_labels(read_labels([path]), runs_of(("a", "baselineYear1Arm1")))
    check_labels(read_labels([path]), runs_of(("a", "baseline_year_1_arm_1"), ("a", "another")))


def test_several_visits_need_a_column_that_tells_them(tmp_path: Path) -> None:
    path = table(tmp_path / "labels.tsv", "participant_id\tage", "a\t10")
    visits = runs_of(("a", "1"), ("a", "2"), ("b", "1"))
    with pytest.raises(UsageError, match="1 subjects have files of several sessions and the label table has no session column"):
        check_labels(read_labels([path]), visits)
    check_labels(read_labels([path]), runs_of(("a", "1"), ("b", "2")))
    check_labels(read_labels([table(tmp_path / "said.csv", "subject,session,sex", "a,n/a,F")]), visits)
    # BIDS says of this table that it holds for a participant at every visit.
    check_labels(read_labels([table(tmp_path / "participants.tsv", "participant_id\tsex", "a\tF")]), visits)


def test_a_table_of_visits_needs_their_column(tmp_path: Path) -> None:
    path = table(tmp_path / "sub-secret_sessions.tsv", "visit\tage", "1\t3")
    with pytest.raises(UsageError, match="table 1 of the 1 sub-") as refusal:
        read_sessions([("secret", path)])
    assert "secret" not in str(refusal.value)


def test_nothing_to_join_is_nothing_to_refuse() -> None:
    check_labels(LabelTable(), runs_of(("a", "1"), ("a", "2")))
    assert join_labels((), runs_of(("a", ""))) == [{}]
