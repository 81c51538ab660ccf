"""One run killed a hundred times, against one that nothing disturbed: what every kill cost, and that nothing was lost.

    python benchmarks/soak.py --folder FOLDER --kills 100 --seed 1 --out benchmarks/results/2026-11-22-soak.md

Two ranks of a toy train through the same loop, saver and backends as a real run: four kills of five under plain PyTorch, the
fifth under ZeRO-2, each of the two runs with one comparison at its end, to the last bit. Ranks are forked from a process that
has imported PyTorch and DeepSpeed, so that kills, not imports, take the time.
"""

import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import ROOT, page, parser, prose, table, write_page

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests" / "faults"))
from chain import STEPS_A_KILL, WHEN, WHO, Cost, Kill, Killed, cost, plan, run_chain, settings
from crew import HANG_SECONDS, PLAIN, ZERO2, complete, events, job, options
from endings import assert_same_end

PACKAGES = ("torch", "deepspeed", "safetensors")
RANKS = 2
ENGINES: dict[str, Mapping[str, Any]] = {"plain PyTorch": PLAIN, "ZeRO-2": ZERO2}
ZERO_SHARE = 0.2


class Soaked(NamedTuple):
    """A run that was killed again and again, and was in the end the run that was not."""

    engine: str
    steps: int
    attempts: int
    seconds: float
    kills: list[tuple[Killed, Cost]]


def soak(folder: Path, engine: str, kills: int, seed: int, until: float) -> Soaked:
    """Kill a run so many times, or until the time is over, and compare its end with an undisturbed run's.

    Raises:
        AssertionError: a rank hung or ended in another way than it should, or the ends differ.
    """
    draw = random.Random(f"{seed} {engine}")  # noqa: S311 (kills are to be the same for the same seed)
    steps, began = STEPS_A_KILL * kills, time.monotonic()
    run, undisturbed = (folder / f"{engine} {name}" for name in ("killed", "undisturbed"))

    def in_time() -> Iterator[Kill]:
        for kill in plan(kills, draw):
            if time.monotonic() > until:
                return
            yield kill

    told: list[Killed] = []
    for killed in run_chain(run, ENGINES[engine], steps, in_time(), draw, RANKS):
        told.append(killed)
        where = f"{killed.kill.who} in {killed.kill.when}"
        print(f"{engine} {len(told)}/{kills}: {where}, step {killed.step}, over in {killed.ending:.2f} s", file=sys.stderr)
    seconds = time.monotonic() - began
    complete(undisturbed, settings(ENGINES[engine], steps), RANKS)
    assert_same_end(run, undisturbed, steps)
    return Soaked(engine, steps, len(events(run, "start")), seconds, [(one, cost(run, one)) for one in told])


def starting(folder: Path) -> float:
    """Seconds from the start of two fresh processes under ZeRO-2 until their run begins."""
    began = time.time()
    with job(folder / "fresh", options(ZERO2, 1), RANKS, fresh=True) as one:
        one.wait()
    return float(events(folder / "fresh", "start")[0]["time"]) - began


def write(soaked: Sequence[Soaked], seed: int, fresh: float) -> list[str]:
    """Lines of the page."""
    count = sum(len(one.kills) for one in soaked)
    lines = prose(
        f"{count} kills, seed {seed}. Each of the {len(soaked)} runs ended with weights, optimizer state and every step's "
        "numbers equal, to the last bit, to those of a run that nothing disturbed. Ranks that were not killed always ended by "
        "themselves, with status 75; the checkpoints that were left matched their hashes, no other file was left over, every "
        "line of metrics and events could be read."
    )
    lines += table(
        ("run", "kills", "attempts", "steps", "seconds with all kills"),
        [(one.engine, f"{len(one.kills)}", f"{one.attempts}", f"{one.steps}", f"{one.seconds:.0f}") for one in soaked],
    )
    lines += prose(
        "Saved every 25 steps, and in two attempts of three every 30 or 120 ms; evaluated every 10 steps; a step takes some "
        f"12 ms; faults.hang_seconds={HANG_SECONDS:g}, a quarter of which ranks that are left wait for word of the one that is "
        "gone. Lost: from the kill until the run stood again at the last step that had been written down. It holds the start "
        f"of ranks that were forked with everything imported; two fresh ones under ZeRO-2 take {fresh:.1f} s to begin."
    )
    return lines + table(("killed", "in", "kills", "steps redone", "seconds lost", "others over after, s"), _rows(soaked))


def _rows(soaked: Sequence[Soaked]) -> Iterator[tuple[str, ...]]:
    by_kind: dict[Kill, list[tuple[Killed, Cost]]] = defaultdict(list)
    for one in soaked:
        for killed, price in one.kills:
            by_kind[killed.kill].append((killed, price))
    for who in WHO:
        for when in WHEN:
            found = by_kind.get(Kill(who, when))
            if found:
                yield _row(who, when, found, alone=who == "all ranks")
    yield _row("any", "any", [one for found in by_kind.values() for one in found], alone=False)


def _row(who: str, when: str, found: Sequence[tuple[Killed, Cost]], *, alone: bool) -> tuple[str, ...]:
    redone, lost = [price.redone for _, price in found], [price.seconds for _, price in found]
    ending = [killed.ending for killed, _ in found]
    return (who, when, f"{len(found)}", _spread(redone, "g"), _spread(lost, ".2f"), "" if alone else _spread(ending, ".2f"))


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}}, at most {max(values):{form}}"


def main() -> None:
    """Soak both engines and write the page."""
    reader = parser(__doc__)
    reader.add_argument("--kills", type=int, default=100, help="how many; a fifth of them under ZeRO-2")
    reader.add_argument("--seed", type=int, default=None, help="of kinds and moments; drawn and printed when not given")
    reader.add_argument("--minutes", type=float, default=60.0, help="after which no more kills are begun")
    asked = reader.parse_args()
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    print(f"seed {seed}", file=sys.stderr)
    asked.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=asked.folder))
    fresh = starting(folder)
    until = time.monotonic() + 60 * asked.minutes
    of_zero = round(ZERO_SHARE * asked.kills)
    # What is left of the time after the first run is the other's.
    parts = {"ZeRO-2": (of_zero, until - 45 * asked.minutes), "plain PyTorch": (asked.kills - of_zero, until)}
    soaked = [soak(folder, engine, kills, seed, end) for engine, (kills, end) in parts.items()]
    write_page(page("Kills", PACKAGES, write(soaked, seed, fresh)), asked.out)


if __name__ == "__main__":
    main()
