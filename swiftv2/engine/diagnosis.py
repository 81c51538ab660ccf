"""Which rank others most likely wait for, from what ranks last said of themselves."""

from collections import Counter
from collections.abc import Collection, Sequence

from swiftv2.engine.beats import LEFT, Beat

_ALONE = ("data",)  # phases in which a rank waits for no other


def find_suspects(beats: Sequence[Beat], silent: Collection[int]) -> list[int]:
    """Ranks most likely at fault where a run no longer goes on.

    Silent ones; else those that left by an error; else those that wait for data while others wait for them; else those that
    stand elsewhere than most; of two halves the one that has stood longer. None where all stand at the same place.

    Args:
        beats: what each rank last said, but for ranks that left as they should.
        silent: ranks that say nothing.
    """
    if silent:
        return sorted(silent)
    failed = sorted(beat.rank for beat in beats if beat.state == "failed")
    if failed:
        return failed
    alone = sorted(beat.rank for beat in beats if beat.phase in _ALONE)
    if 0 < len(alone) < len(beats):
        return alone
    places = Counter((beat.step, beat.phase) for beat in beats)
    longest = {place: max(beat.seconds for beat in beats if (beat.step, beat.phase) == place) for place in places}
    usual = max(places, key=lambda place: (places[place], -longest[place]))
    return sorted(beat.rank for beat in beats if (beat.step, beat.phase) != usual)


def describe_fault(beats: Sequence[Beat], silent: Collection[int], suspects: Sequence[int]) -> str:
    """One clause that names the ranks most likely at fault."""
    if not suspects:
        return "all ranks stand at the same place"
    known = {beat.rank: beat for beat in beats}
    first = known.get(suspects[0])
    where = f" on {first.host}" if first else ""
    others = f" and {len(suspects) - 1} more" if len(suspects) > 1 else ""
    if first is not None and first.state in LEFT:
        what = "which left by an error"
    elif first is None or first.rank in silent:
        what = "which is silent"
    else:
        what = f"in {first.phase} of step {first.step} for {first.seconds:.0f} s"
    return f"most likely at fault: rank {suspects[0]}{where}{others}, {what}"
