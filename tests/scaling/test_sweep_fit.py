"""`swiftv2 sweep fit`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from known_laws import grid, losses, noisy, write_csv

from swiftv2 import cli

WORDS = ("--parameters", "N", "--tokens", "D", "--loss", "L", "--bootstraps", "50")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    n, d = grid(4, 4)
    return write_csv(tmp_path / "table.csv", n, d, noisy(losses(n, d), 0.003))


def test_json_is_the_tree_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "fit", str(path), *WORDS, "--json"]) == 0
    said = capsys.readouterr()
    tree = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    asked = {"E", "A", "alpha", "B", "beta", "objective", "starts", "starts_in_best_basin", "intervals"}
    assert asked <= tree.keys()
    assert tree["used"] == 16


def test_text_names_constants_intervals_and_doubts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = path.read_text().splitlines()
    n, d, loss = lines[6].split(",")
    lines[6] = f"{n},{d},{float(loss) * 1.5!r}"
    path.write_text("\n".join(lines))
    assert cli.main(["sweep", "fit", str(path), *WORDS]) == 0
    said = capsys.readouterr().out
    for word in ("alpha", "beta", "90% interval", "standard error", "isoFLOP", "envelope", "largest run left out"):
        assert word in said
    assert "warning: 1 run off the law: row 6" in said


def test_a_folder_gets_everything(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "law"
    assert cli.main(["sweep", "fit", str(path), *WORDS, "--json", "--out", str(out)]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert json.loads((out / "fit.json").read_text()) == tree
    assert (out / "points.csv").read_text().count("\n") == 17
    assert "alpha" in (out / "index.html").read_text()
    assert any(one.suffix == ".svg" for one in out.rglob("*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--parameters", "N", "--loss", "L"), "one of the two: none is given"),
        (("--parameters", "N", "--loss", "L", "--tokens", "D", "--flops", "D"), "one of the two: both are given"),
        (("--parameters", "N", "--loss", "L", "--flops", "D", "--compute", "D"), "--compute goes with --tokens"),
        (("--parameters", "n", "--loss", "L", "--tokens", "D"), "no column 'n'; there are 'N', 'D', 'L'"),
        ((*WORDS, "--drop-highest-losses", "11"), "5 runs"),
        ((*WORDS, "--level", "90"), "--level 90.0"),
        ((*WORDS, "--seed", "x"), "--seed"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert cli.main(["sweep", "fit", str(path), *words, "--out", str(tmp_path / "law")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "law").exists()


def test_a_file_where_the_folder_should_be_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_text()
    assert cli.main(["sweep", "fit", str(path), *WORDS, "--out", str(path)]) == 2
    assert "a file is there" in capsys.readouterr().err
    assert path.read_text() == before
