"""A judged step waits for the device no more often than DeepSpeed's own step does."""

import json
import subprocess
from typing import Any

import pytest
from ranks import environment, worker


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 1}, {"zero_stage": 2, "precision": "fp32"}])
def test_judging_a_step_reads_nothing_more_from_the_device(settings: dict[str, Any]) -> None:
    words = worker(1, "syncs.py", json.dumps(settings))
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert 0 < counts["judged"] <= counts["deepspeed"], counts
