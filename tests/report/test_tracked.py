"""Neptune's offline files, as far as they are whole."""

import json
from pathlib import Path

from swiftv2.report.tracked import missing, read_neptune


def _line(key: str, step: int, value: float, at: float) -> str:
    operation = {
        "type": "LogFloats",
        "path": ["metrics", *key.split("/")],
        "values": [{"value": value, "step": step, "ts": at}],
    }
    return json.dumps({"obj": operation, "version": 1, "at": at}) + "\n"


def test_attempts_are_joined_damage_is_named_and_gaps_are_counted(tmp_path: Path) -> None:
    for name, text in {
        "run__b__1": _line("loss", 1, 3.0, 10.0) + _line("loss", 2, 2.0, 11.0) + '{"obj": {"ty',
        "run__a__2": _line("loss", 2, 2.5, 20.0) + _line("heldout/all/r2/model", 2, 0.1, 21.0),
    }.items():
        folder = tmp_path / "neptune" / ".neptune" / "offline" / name
        folder.mkdir(parents=True)
        (folder / "data-1.log").write_text(text)
    offline = read_neptune(tmp_path / "neptune")
    assert offline.series == {"loss": {1: 3.0, 2: 2.5}, "heldout/all/r2/model": {2: 0.1}}
    assert [line.partition("run__b__1/")[2] for line in offline.damaged] == ["data-1.log: line 3 is damaged"]
    rows = [{"step": 1, "attempt": 1, "time": 0.0, "loss": 3.0}, {"step": 3, "attempt": 2, "time": 0.0, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert missing(offline, tmp_path) == {"loss": 1}
    assert read_neptune(tmp_path / "nothing").series == {}
