"""Tables are read whole, or refused in one line that says where and what."""

import json
from pathlib import Path

import numpy as np
import pytest
from known_laws import COLUMNS, grid, losses, write_csv

from swiftv2.errors import UsageError
from swiftv2.scaling.table import Columns, read_table

GOOD = "name,N,D,L\nsmall,1e7,1e9,3.5\nlarge,2e7,4e9,3.1\n"


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    comma = tmp_path / "table.csv"
    comma.write_text("\ufeff" + GOOD.replace("\n", "\r\n") + "\r\n", encoding="utf-8")
    runs = [{"name": "small", "N": 1e7, "D": 1e9, "L": 3.5}, {"name": "large", "N": 20_000_000, "D": "4e9", "L": 3.1}]
    for tree in (runs, {"rows": runs}):
        (tmp_path / "table.json").write_text(json.dumps(tree))
        for path in (comma, tmp_path / "table.json"):
            table = read_table(path, COLUMNS)
            assert table.names == ("small", "large")
            assert table.rows == (1, 2)
            assert table.parameters.tolist() == [1e7, 2e7]
            assert table.tokens.tolist() == [1e9, 4e9]
            assert table.loss.tolist() == [3.5, 3.1]
            assert table.flops == pytest.approx([6e16, 4.8e17])


def test_tokens_follow_from_flops_and_flops_from_tokens(tmp_path: Path) -> None:
    n, d = grid()
    path = write_csv(tmp_path / "table.csv", n, 6.0 * n * d, losses(n, d))
    table = read_table(path, Columns(parameters="N", loss="L", flops="D"))
    assert np.allclose(table.tokens, d, rtol=1e-12)
    both = read_table(path, Columns(parameters="N", loss="L", tokens="N", flops="D"))
    assert np.array_equal(both.tokens, n)
    assert np.allclose(both.flops, 6.0 * n * d)


def test_one_column_is_not_taken_for_losses_and_for_something_else(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(GOOD)
    with pytest.raises(UsageError, match="'L' is named for losses and for something else"):
        read_table(tmp_path / "table.csv", Columns(parameters="L", loss="L", tokens="D"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("\n \n,,\n", "empty"),
        (GOOD.replace(",", ";"), "cells are separated by ';'"),
        (GOOD.replace("4e9", "4_000"), "row 2, column 'D': '4_000' is not a number"),
        (GOOD.replace("1e7", "1e-320"), "row 1, column 'N': 1e-320 is no size"),
        ("name,N,D,L\n", "no runs"),
        (GOOD.replace("D", "tokens"), "no column 'D'; there are 'name', 'N', 'tokens', 'L'"),
        (GOOD.replace("name,N", "L,N"), "column 'L' is there 2 times"),
        (GOOD.replace("3.5", "nan"), "row 1, column 'L': nan is not a finite number"),
        (GOOD.replace("3.5", "1e999"), "row 1, column 'L': 1e999 is not a finite number"),
        (GOOD.replace("3.1", "-3.1"), "row 2, column 'L': -3.1 is not above zero"),
        (GOOD.replace("4e9", "0"), "row 2, column 'D': 0 is not above zero"),
        (GOOD.replace("2e7", "20M"), "row 2, column 'N': '20M' is not a number"),
        (GOOD.replace("4e9", ""), "row 2, column 'D': empty"),
        (GOOD.replace("4e9,3.1", "4e"), "line 3 has 3 cells, the titles are 4"),
        (GOOD.replace("small", '"small'), "damaged"),
        (GOOD.replace("small", "sm\0all"), "not a text file"),
    ],
)
def test_damaged_tables_are_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_table(path, COLUMNS)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "not valid JSON"),
        ("{}", "expected a list"),
        ('{"rows": [1]}', "expected a list"),
        ("[]", "no runs"),
        ('[{"N": 1, "N": 2, "D": 1, "L": 1}]', "'N' is twice"),
        ('[{"N": 1, "D": 1, "L": NaN}]', "nan is not a finite number"),
        ('[{"N": 1, "D": 1, "L": true}]', "'True' is not a number"),
        ('[{"N": 1, "D": 1, "L": 1}, {"N": 1, "D": 1}]', "row 2, column 'L': empty"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said):
        read_table(path, COLUMNS)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder"):
        read_table(tmp_path, COLUMNS)
    with pytest.raises(UsageError, match="No such file"):
        read_table(tmp_path / "nothing.csv", COLUMNS)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="not a text file"):
        read_table(tmp_path / "binary.csv", COLUMNS)
