"""Sweeps of pretraining runs as Slurm arrays: what an element runs, which are queued and behind which others."""

import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swiftv2.cluster import slurm
from swiftv2.cluster.book import OTHER_JOB, Entry, alone_in, note, now, read_book
from swiftv2.cluster.elements import ACTIVE, ElementState, ask_slurm, element_states
from swiftv2.config.engine import split_batch
from swiftv2.config.load import dump, find_preset, load, presets_root
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.sweep import Resources, SweepConfig
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import write_file

ROOT_VARIABLE = "SWIFTV2_ROOT"
_JOB = re.compile(r"\d+(_\d+)?")
Queue = Callable[[Sequence[str], Sequence[str]], str]
"""Takes options of `sbatch` and the words of the launcher, gives the number of the job."""


@dataclass(frozen=True)
class Array:
    """Elements that one `sbatch` queues."""

    job: str
    """Its number; JOB1, JOB2 and so on where nothing was queued."""
    names: tuple[str, ...]
    indices: tuple[int, ...]
    after: Mapping[str, str]
    """Jobs that it waits for, by the name of the element (OTHER_JOB for one that is none)."""
    command: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """What was queued, or would be."""

    arrays: tuple[Array, ...]
    passed_over: Mapping[str, str]
    """Elements that were not, with the reason."""


@dataclass(frozen=True)
class Request:
    """What is to be queued of a sweep."""

    words: tuple[str, ...] = ()
    """`section.key=value` words for all elements."""
    only: tuple[str, ...] = ()
    """Names of elements; all when empty."""
    failed: bool = False
    """Whether only those that failed are queued."""
    after: str | None = None
    """Job that must have ended well before any element starts."""


def element(sweep: SweepConfig, index: int, words: Iterable[str] = ()) -> tuple[Path, tuple[str, ...]]:
    """What `swiftv2 pretrain` is given for an element.

    Args:
        sweep: the sweep.
        index: of the element, the job's SLURM_ARRAY_TASK_ID.
        words: `section.key=value` words that all elements are given.

    Returns:
        (configuration file, words): the words set `run.dir`, too.

    Raises:
        UsageError: there is no such element, no such configuration, or a word is none.
    """
    return find_preset("pretrain", sweep.config), sweep.words(index, words)


def resolve(sweep: SweepConfig, words: Iterable[str] = ()) -> tuple[PretrainConfig, ...]:
    """The checked configuration of every element, in order.

    Raises:
        UsageError: one is wrong; the message names element and key.
    """
    said, resolved = tuple(words), []
    for index, name in enumerate(sweep.names()):
        path, own = element(sweep, index, said)
        try:
            config = load(PretrainConfig, path, own)
            given = sweep.resources(name)
            if given.nodes is not None and given.tasks_per_node is not None:
                split_batch(config.train.global_batch, given.nodes * given.tasks_per_node, config.train.micro_batch)
        except UsageError as error:
            raise UsageError(f"element {name}: {error}") from error
        resolved.append(config)
    return tuple(resolved)


def submit(sweep: SweepConfig, title: str, request: Request) -> Submission:
    """Queue the elements of a sweep that are neither finished nor queued, and note their jobs in `sweep.json`.

    Args:
        sweep: the sweep.
        title: name of the jobs.
        request: which elements, and with what.

    Raises:
        UsageError: a configuration, a name or a word is wrong; nothing is queued then.
        SwiftError: Slurm refuses, or another submission is at work; what was queued before is noted.
    """
    script = launcher()
    _check(sweep, request)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with alone_in(sweep.folder):
        states = element_states(sweep, read_book(sweep.folder), ask_slurm)
        chosen, passed_over = choose(states, request)
        groups = group(sweep, chosen, states)
        copy = _copy_path(sweep)
        if chosen:
            write_file(copy, dump(sweep))
        environment = {ROOT_VARIABLE: str(script.parent.parent)}
        for state in states:
            # Slurm ends by itself what waits for a job that failed, but a moment later: it must not wait beside its successor.
            if state.name in chosen and state.queued and state.job is not None:
                with contextlib.suppress(SwiftError):  # That moment has come already; a dead controller takes no array either.
                    slurm.ask("scancel", state.job)

        def queue(options: Sequence[str], words: Sequence[str]) -> str:
            return slurm.submit(script, words, options, environment)

        arrays = []
        for array in _arrays(sweep, title, request, groups, states, queue):
            note(sweep.folder, _entries(array, request, copy))
            arrays.append(array)
    return Submission(tuple(arrays), passed_over)


def rehearse(sweep: SweepConfig, title: str, request: Request) -> Submission:
    """What `submit` would queue; nothing is written.

    Raises:
        UsageError: a configuration, a name or a word is wrong.
        SwiftError: elements are queued already, and Slurm does not answer.
    """
    _check(sweep, request)
    launcher()
    states = element_states(sweep, read_book(sweep.folder), ask_slurm)
    chosen, passed_over = choose(states, request)
    numbers = itertools.count(1)
    arrays = _arrays(
        sweep, title, request, group(sweep, chosen, states), states, lambda _options, _words: f"JOB{next(numbers)}"
    )
    return Submission(tuple(arrays), passed_over)


def choose(states: Sequence[ElementState], request: Request) -> tuple[set[str], dict[str, str]]:
    """Which elements are to be queued, and which not, with the reason; what is not asked for stands in neither."""
    chosen, passed_over = set(), {}
    for state in states:
        if state.index is None or (request.only and state.name not in request.only):
            continue
        if state.state == "finished":
            passed_over[state.name] = "finished"
        elif state.state in ACTIVE:
            passed_over[state.name] = f"{state.state} as job {state.job}" if state.job else state.state
        elif request.failed and state.state != "failed":
            passed_over[state.name] = f"{state.state}, not failed"
        else:
            chosen.add(state.name)
    return chosen, passed_over


def group(
    sweep: SweepConfig, chosen: Collection[str], states: Sequence[ElementState]
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Elements by what they wait for and are given: those that have both in common make one array.

    Returns:
        (parents that have not finished, elements) of each array, behind the arrays of its parents.

    Raises:
        UsageError: an element waits for one that is neither finished nor queued, and is not to be queued now.
    """
    state_of, job_of = {one.name: one.state for one in states}, {one.name: one.job for one in states}
    waiting: dict[tuple[tuple[str, ...], Resources], list[str]] = {}
    for run in sweep.runs():
        if run.name not in chosen:
            continue
        parents = tuple(name for name in sweep.names() if name in run.after and state_of[name] != "finished")
        for parent in parents:
            if parent not in chosen and state_of[parent] not in ACTIVE:
                raise UsageError(
                    f"element {run.name} comes after {parent}, which is {state_of[parent]}: queue that one, too "
                    f"(swiftv2 sweep submit FILE, or --only {parent} {run.name})"
                )
            if parent not in chosen and job_of[parent] is None:
                raise UsageError(
                    f"element {run.name} comes after {parent}, which runs without a Slurm job: "
                    "queue it when that one has finished"
                )
        waiting.setdefault((parents, sweep.resources(run.name)), []).append(run.name)
    ordered: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    left = set(chosen)
    while waiting:
        # Each array waits for all of its parents, and elements wait in no circle: so arrays do not either.
        ready = next(one for one in waiting if not left.intersection(one[0]))
        names = tuple(waiting.pop(ready))
        left.difference_update(names)
        ordered.append((ready[0], names))
    return ordered


def array_indices(indices: Iterable[int]) -> str:
    """Indices as `--array` takes them: 0-3,7.

    Args:
        indices: ascending.
    """
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def launcher() -> Path:
    """The batch script of an array: `slurm/sweep.sh` beside the presets, or of SWIFTV2_ROOT.

    Raises:
        SwiftError: it is not there.
    """
    root = Path(os.environ.get(ROOT_VARIABLE) or presets_root().parent).resolve()
    script = root / "slurm" / "sweep.sh"
    if not script.is_file():
        raise SwiftError(f"{script} is not there: set {ROOT_VARIABLE} to a checkout of swiftv2, which has the launchers")
    return script


def _check(sweep: SweepConfig, request: Request) -> None:
    unknown = sorted(set(request.only) - set(sweep.names()))
    if unknown:
        raise UsageError(f"--only {unknown[0]}: the sweep has no element of that name; it has {', '.join(sweep.names())}")
    if request.after is not None and not _JOB.fullmatch(request.after):
        raise UsageError(f"--after {request.after}: give the number of a job, such as 117 or 117_3")
    resolve(sweep, request.words)


def _copy_path(sweep: SweepConfig) -> Path:
    """The sweep as it is now, under a name of its own: jobs read it when they start, and an index must mean the same then."""
    digest = hashlib.sha256(dump(sweep).encode()).hexdigest()[:12]
    return sweep.folder / f"sweep_{digest}.yaml"


def _arrays(
    sweep: SweepConfig,
    title: str,
    request: Request,
    groups: Iterable[tuple[tuple[str, ...], tuple[str, ...]]],
    states: Sequence[ElementState],
    queue: Queue,
) -> Iterable[Array]:
    """Queue one group after the other: a later one names the jobs of those before it."""
    job_of = {state.name: state.job for state in states if state.job is not None}
    index_of = {name: index for index, name in enumerate(sweep.names())}
    words = (str(_copy_path(sweep)), *request.words)
    for parents, names in groups:
        indices = tuple(index_of[name] for name in names)
        after = {parent: job_of[parent] for parent in parents}
        if request.after is not None:
            after[OTHER_JOB] = request.after
        options = _options(sweep, title, indices, sweep.resources(names[0]), tuple(after.values()))
        job = queue(options, words)
        job_of.update({name: f"{job}_{index_of[name]}" for name in names})
        yield Array(job, names, indices, after, ("sbatch", *options, str(launcher()), *words))


def _options(sweep: SweepConfig, title: str, indices: Sequence[int], given: Resources, after: Sequence[str]) -> tuple[str, ...]:
    limit = f"%{given.at_most}" if given.at_most is not None else ""
    options = [
        f"--array={array_indices(indices)}{limit}",
        f"--job-name={title}",
        f"--output={sweep.folder / 'slurm-%A_%a.out'}",
        "--open-mode=append",
    ]
    if after:
        options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    resources = {"nodes": given.nodes, "ntasks-per-node": given.tasks_per_node, "time": given.time}
    return (*options, *(f"--{name}={value}" for name, value in resources.items() if value is not None))


def _entries(array: Array, request: Request, copy: Path) -> dict[str, Entry]:
    when = now()
    return {
        name: Entry(f"{array.job}_{index}", index, request.words, when, copy.name, array.after)
        for name, index in zip(array.names, array.indices, strict=True)
    }
