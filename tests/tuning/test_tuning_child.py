"""How a fine-tuning run is judged by what it has left: real processes that end in every way."""

import sys
from pathlib import Path

import pytest

from swiftv2.tuning.child import Child

RUN = """
import json, os, pathlib, signal, sys
run = pathlib.Path(sys.argv[-1].removesuffix(".yaml"))
run.mkdir(exist_ok=True)
with (run / "events.jsonl").open("a") as stream:
    for event in {events}:
        stream.write(json.dumps({{"step": None, "attempt": 1, "event": event}}) + "\\n")
{end}
"""


@pytest.mark.parametrize(
    ("events", "end", "state"),
    [
        (["start", "stopped"], "sys.exit(75)", "stopped"),
        # A signal that comes between the last step and the result: nothing is lost, the same command goes on.
        (["start", "finished"], "sys.exit(75)", "stopped"),
        ([], "sys.exit(75)", "stopped"),
        (["start", "finished"], "os.kill(os.getpid(), signal.SIGUSR1)", "stopped"),
        (["start", "finished"], "os.kill(os.getpid(), signal.SIGKILL)", "lost"),
        (["start"], "sys.exit(1)", "lost"),
        ([], "sys.exit(2)", "failed"),
        (["start", "failed"], "sys.exit(1)", "failed"),
        (["start", "finished"], "sys.exit(0)", "failed"),  # without a result
    ],
)
def test_a_run_is_judged_by_its_status_and_its_events(tmp_path: Path, events: list[str], end: str, state: str) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN.format(events=events, end=end))
    child = Child(tmp_path / "trial_0000", "run: {}\n", tmp_path / "log", command=[sys.executable, str(script)])
    assert child.follow(lambda _: None, 0.02).state == state
