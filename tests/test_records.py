"""Whether the process that holds a run lives, as far as this host can tell."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from swiftv2.engine.lease import this_process
from swiftv2.records import lives, process_start


def test_a_process_of_this_host_lives_or_does_not() -> None:
    mine = this_process(1)
    assert mine.started == process_start(os.getpid())
    assert lives(mine) is True
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = replace(mine, pid=child.pid, started=process_start(child.pid) or "")
    assert lives(theirs) is True
    child.kill()
    child.communicate()
    assert lives(theirs) is False
    assert process_start(child.pid) is None


def test_a_number_that_is_used_again_is_another_process() -> None:
    mine = this_process(1)
    prefix, _, ticks = mine.started.partition("/")
    assert lives(replace(mine, started=f"{prefix}/{int(ticks) - 1}")) is False


@pytest.mark.parametrize("change", ["host", "boot", "namespace"])
def test_of_others_it_cannot_be_told(change: str) -> None:
    """A container has numbers of its own: those of another one mean nothing in it."""
    mine = this_process(1)
    boot, _, rest = mine.started.partition(" ")
    others = {
        "host": replace(mine, host="nid000123"),
        "boot": replace(mine, started=f"another-boot {rest}"),
        "namespace": replace(mine, started=f"{boot} pid:[1]/{rest.partition('/')[2]}"),
    }
    assert lives(others[change]) is None
