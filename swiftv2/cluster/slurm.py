"""Slurm's own commands, each with a time limit, and what they say as plain values."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swiftv2.errors import SwiftError

PATIENCE_SECONDS = 30.0
"""How long a Slurm command may take: a busy controller answers slowly, a dead one never."""
_FIELDS = ("%i", "%A", "%T", "%r", "%N", "%L", "%S", "%D", "%j")
_SUBMITTED = re.compile(r"^(\d+)(?:;.*)?$")


@dataclass(frozen=True)
class Job:
    """A job, or an element of an array, as `squeue` shows it."""

    name: str
    """As Slurm writes it: 117, or 117_3 for an element of an array."""
    number: str
    """The number that is this element's alone, its SLURM_JOB_ID."""
    state: str
    """Such as PENDING, RUNNING, COMPLETING, COMPLETED, FAILED."""
    reason: str
    """Why it is pending, or `None`."""
    nodes: str
    """Nodes that it runs on, in Slurm's short form; empty while pending."""
    time_left: str
    """Of its limit, as days-hours:minutes:seconds."""
    start: str
    """When it began, or is expected to; `N/A` where that is not known."""
    node_count: int
    title: str
    """Its job name."""


def available() -> bool:
    """Whether this host has Slurm's commands."""
    return shutil.which("squeue") is not None


def ask(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a Slurm command and give what it prints.

    Args:
        words: the command and its arguments.
        environment: variables that are set besides the process's own.

    Raises:
        SwiftError: it is not there, fails, or does not answer in time; its own first complaint is in the message.
    """
    program = shutil.which(words[0])
    if program is None:
        raise SwiftError(f"{words[0]} is not found: this host has no Slurm, or its module is not loaded")
    try:
        done = subprocess.run(  # noqa: S603 (no shell; the words are ours)
            [program, *words[1:]],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard", **(environment or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise SwiftError(f"{words[0]} has not answered for {PATIENCE_SECONDS:g} s: is Slurm's controller up?") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        raise SwiftError(f"{words[0]}: {said[:300]}")
    return done.stdout


def jobs(numbers: Sequence[str]) -> dict[str, Job]:
    """Jobs that Slurm still knows, by their own number and by the name of an array's element.

    Args:
        numbers: SLURM_JOB_IDs, or array elements such as 117_3; those that Slurm has forgotten are left out.

    Raises:
        SwiftError: `squeue` fails for another reason than that.
    """
    wanted = set(numbers)
    if not wanted:
        return {}
    # Asking for a job that is forgotten is an error to squeue: ask for all of the user's own instead.
    text = ask("squeue", "--me", "--noheader", "--array", "--states=all", f"--format={'|'.join(_FIELDS)}")
    found = {}
    for line in text.splitlines():
        job = _read(line)
        for key in (job.number, job.name):
            if key in wanted:
                found[key] = job
    return found


def submit(
    script: Path, words: Sequence[str], options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> str:
    """Queue a batch script; the number of the job.

    Args:
        script: the launcher.
        words: what it is given.
        options: of `sbatch`, such as `--array=0-3`.
        environment: variables that are set besides the process's own.

    Raises:
        SwiftError: Slurm refuses it.
    """
    said = ask("sbatch", "--parsable", *options, str(script), *words, environment=environment).strip()
    number = _SUBMITTED.match(said)
    if number is None:
        raise SwiftError(f"sbatch said {said[:120]!r}, where the number of a job was to be")
    return number.group(1)


def _read(line: str) -> Job:
    name, number, state, reason, nodes, left, start, count, title = line.strip().split("|", len(_FIELDS) - 1)
    return Job(name, number, state, reason, nodes, left, start, int(count), title)
