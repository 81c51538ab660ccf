"""Where the time of a run's steps goes: a page made of a profile's summary, and what the run's report tells of it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.errors import SwiftError
from swiftv2.files import read_json, write_file
from swiftv2.report.markup import Cell, Content, Number, document, element, listed, number, tabled, warned
from swiftv2.report.run.reading import Run

PAGE = "index.html"
Tree = Mapping[str, Any]
Place = tuple[str, str]
"""Range and direction."""

_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)
"""What comes of a summary that is none."""
NOWHERE = "outside of the model"
_COLOURS = {
    "matrix products": "#4477aa",
    "attention": "#66bbdd",
    "convolution": "#228833",
    "elementwise and sums": "#ccaa33",
    "normalisation": "#ee7766",
    "copies and indexing": "#aa4488",
    "communication": "#994455",
    "compiled kernels": "#117766",
    "launching kernels": "#997700",
    "waiting for the device": "#8899aa",
    "Python and waiting": "#a0a0a8",
    "other": "#777783",
}
"""Of kinds of operators: told apart on light and dark, and by most who see colours otherwise."""
_PHASES = {
    "data": "#994455",
    "copy": "#aa4488",
    "forward": "#4477aa",
    "backward": "#ee7766",
    "communication": "#ccaa33",
    "optimizer": "#228833",
    "checkpoint": "#66bbdd",
    "evaluation": "#117766",
    "other": "#777783",
}
_SMALL = 0.005
"""Share of a step below which a bar is left out: its row is in the table."""
_MUCH_LONGER = 1.5
_BESIDE = {
    "data": "waiting for data",
    "communication": "communication",
    "copy": "waiting for copies",
    "optimizer": "the optimizer",
}
"""Phases that no range of the model holds."""
_STYLE = """
.profile-bar { display: flex; height: 1.3rem; border-radius: .2rem; overflow: hidden; background: var(--rule);
  margin: .15rem 0; }
.profile-bar span { display: block; height: 100%; }
.profile-keys { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  font-size: .92rem; }
.profile-keys i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem; }
.profile-ranges { display: grid; grid-template-columns: minmax(6rem, 15rem) minmax(6rem, 1fr) 4.2rem; gap: .1rem .7rem;
  font-size: .92rem; align-items: center; } .profile-ranges .share { text-align: right; font-variant-numeric: tabular-nums; }
"""


class _Rank:
    """A rank's part of a summary, by share of its steps.

    Where kernels of a GPU were recorded, `compute` is their time, else that of the main thread.
    """

    def __init__(self, told: Tree) -> None:
        self.told = told
        self.steps = len(told["steps"])
        self.seconds = float(told["seconds"])
        self.device: Tree | None = told["device"]
        self.basis = "cpu" if self.device is None else "device"
        self.computed = sum(float(cell[self.basis]) for cell in told["cells"])

    def by(self, key: Callable[[Tree], Any], basis: str | None = None) -> dict[Any, float]:
        """Seconds a step, the longest first."""
        sums: defaultdict[Any, float] = defaultdict(float)
        for cell in self.told["cells"]:
            sums[key(cell)] += float(cell[basis or self.basis]) / self.steps
        return dict(sorted(sums.items(), key=lambda one: -one[1]))

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.seconds / self.steps

    @property
    def whole(self) -> float:
        """Seconds a step of which ranges and kinds have their shares."""
        return (self.computed / self.steps) or self.step


def sentence(summary: Tree) -> str:
    """Where the time goes, in words: the first rank's longest range, what it does there, and what else is long."""
    rank = _first(summary)
    ranges = {name: seconds for name, seconds in rank.by(_range).items() if name != NOWHERE}
    phases = rank.by(lambda cell: cell["phase"], "cpu")
    parts = []
    if rank.device is not None:
        parts.append(f"The GPU computes {_percent(rank.device['busy'], rank.device['seconds'])} of the time")
    if ranges:
        (name, seconds), *others = ranges.items()
        kinds = rank.by(lambda cell: cell["kind"] if _range(cell) == name else "")
        kinds.pop("", None)
        kind, most = next(iter(kinds.items()))
        whole, verb = "a step" if rank.device is None else "that", "are" if kind.endswith("s") else "is"
        share = f"{_percent(seconds, rank.whole)} of {whole} is in {name}, forward and backward, where {kind} {verb}"
        next_to_it = " and ".join(
            f"{_percent(one, rank.whole)} in {other}" for other, one in others[:2] if one > rank.whole / 10
        )
        parts += [f"{share} {_percent(most, seconds)}", *([next_to_it] if next_to_it else [])]
    beside = {words: phases.get(phase, 0.0) for phase, words in _BESIDE.items()}
    first = next(iter(ranges.values()), 0.0) / rank.whole
    longest = max(beside, key=lambda words: beside[words])
    leads = beside[longest] / rank.step > first
    (words, seconds), *others = sorted(beside.items(), key=lambda one: -one[1]) if leads else beside.items()
    also = [f"{other} {_percent(one, rank.step)}" for other, one in others if one >= _SMALL * rank.step]
    waits = ", ".join([f"{words} is {_percent(seconds, rank.step)} of a step", *also])
    said = "; ".join([waits, *parts] if leads else [*parts, waits])
    return said[0].upper() + said[1:] + "."


def slowdown(summary: Tree) -> tuple[float, str]:
    """How many times as long profiled steps were as others, NaN where that is not known, and a sentence that says so."""
    others = summary.get("other_step_seconds")
    mine = sorted(float(one) for one in summary["step_seconds"])
    median = (mine[(len(mine) - 1) // 2] + mine[len(mine) // 2]) / 2
    if not others:
        return float("nan"), f"A profiled step took {_seconds(median)}; no other step came before, so nothing is compared."
    ratio = median / float(others)
    return ratio, (
        f"A profiled step took {_seconds(median)} in the median, {ratio:.2f} times the {_seconds(float(others))} of "
        f"{_before(int(summary['other_steps']))}: trust shares more than seconds; small operators look longer than they are."
    )


def write_page(folder: Path) -> Path:
    """Write a profile's page.

    Args:
        folder: holds `summary.json`.

    Returns:
        The page.

    Raises:
        SwiftError: the summary cannot be read.
    """
    summary = read_json(folder / "summary.json")
    try:
        content = _content(summary)
    except _DAMAGED as error:
        raise SwiftError(f"{folder / 'summary.json'}: no summary of a profile: the file is damaged") from error
    write_file(folder / PAGE, document(f"Profile of {_steps(summary)}", content, _STYLE))
    return folder / PAGE


def profile_section(run: Run) -> Element | None:
    """What the report of a run tells of its newest profile; None where there is none."""
    found = sorted((run.path / "profile").glob("attempt_*/summary.json"), key=_attempt)
    if not found:
        return None
    where = found[-1].parent.relative_to(run.path).as_posix()
    try:
        summary = read_json(found[-1])
        rank = _first(summary)
        told: list[Content] = [
            element("p", _unbroken(sentence(summary)), kind="says"),
            *_phase_bar(rank),
            element("p", slowdown(summary)[1], kind="quiet"),
        ]
    except (SwiftError, *_DAMAGED):
        told = [element("p", f"{where}/summary.json cannot be read.", kind="warning")]
    more = element(
        "p", "Stages, operators and the trace itself: ", element("code", f"{where}/{PAGE}"), " in the run directory."
    )
    return element("section", element("h2", "Profile"), element("style", _STYLE), *told, more, id="profile")


def _content(summary: Tree) -> list[Content]:
    rank = _first(summary)
    ratio, compared = slowdown(summary)
    ranks = [(name, _Rank(told)) for name, told in summary["ranks"].items()]
    content: list[Content] = [
        element("h1", f"Where the time goes: {_steps(summary)}"),
        element("p", _unbroken(sentence(summary)), kind="says"),
        element("p", compared, kind="quiet"),
    ]
    if ratio > _MUCH_LONGER:
        content.append(
            warned("The profiler has slowed these steps", ["Many small operators: read shares of the large ones only."])
        )
    if summary["problems"]:
        content.append(warned("Not all of it is here", list(summary["problems"])))
    content += [element("h2", "What to do next"), listed(_advice(rank, len(ranks)))]
    content += [element("h2", "By phase"), *_phase_bar(rank), _phase_table(rank)]
    content += [element("h2", "By range, forward and backward"), *_range_bars(rank), _range_table(rank)]
    content += [element("h2", "By kind of operator"), _kind_table(rank)]
    content += [element("h2", "Operators"), _operator_table(rank)]
    if rank.device is not None:
        content += [element("h2", "The GPU"), *_device(rank.device)]
    content += [element("h2", "Ranks and traces"), *_ranks(summary, ranks)]
    return content


def _phase_bar(rank: _Rank) -> list[Content]:
    phases = rank.by(lambda cell: cell["phase"], "cpu")
    ordered = {name: phases[name] for name in _PHASES if phases.get(name)}
    return [_bar(ordered, rank.step, _PHASES), _keys(ordered, rank.step, _PHASES)]


def _phase_table(rank: _Rank) -> Element:
    device = rank.by(lambda cell: cell["phase"], "device")
    rows: list[list[Cell]] = [
        [name, _milliseconds(seconds), _share(seconds, rank.step), *([_milliseconds(device[name])] if rank.device else [])]
        for name, seconds in rank.by(lambda cell: cell["phase"], "cpu").items()
    ]
    rows += [
        [f"{name}, between steps", _milliseconds(float(seconds) / rank.steps), "", *([""] if rank.device else [])]
        for name, seconds in rank.told["between"].items()
    ]
    titles = ["Phase", "ms a step", "Share", *(["Kernels, ms a step"] if rank.device else [])]
    return tabled(titles, rows, label="Phases of a step", sortable=True)


def _range_bars(rank: _Rank) -> list[Content]:
    places = rank.by(lambda cell: (_range(cell), cell["direction"]))
    longest = max(places.values(), default=0.0)
    rows: list[Content] = []
    seen: set[str] = set()
    for place in _in_order(places):
        if places[place] < _SMALL * rank.whole:
            continue
        kinds = rank.by(lambda cell, place=place: cell["kind"] if (_range(cell), cell["direction"]) == place else "")  # type: ignore[misc]
        kinds.pop("", None)
        seen |= kinds.keys()
        rows += [
            element("span", _named(place)),
            _bar(kinds, longest, _COLOURS, _named(place)),
            element("span", _percent(places[place], rank.whole), kind="share"),
        ]
    what = "of the time of all kernels" if rank.device else "of a step"
    return [
        element("p", f"Each bar is a range's own time, without the ranges within it; the share is {what}.", kind="quiet"),
        element("div", *rows, kind="profile-ranges"),
        _keys({name: 0.0 for name in _COLOURS if name in seen}, 0.0, _COLOURS),
    ]


def _range_table(rank: _Rank) -> Element:
    own = rank.by(lambda cell: (_range(cell), cell["direction"]))
    names = rank.by(_range)
    totals: defaultdict[str, float] = defaultdict(float)
    for cell in rank.told["cells"]:
        for name in cell["range"] or [NOWHERE]:
            totals[name] += float(cell[rank.basis]) / rank.steps
    rows: list[list[Cell]] = [
        [
            name,
            _milliseconds(own.get((name, "forward"), 0.0)),
            _milliseconds(own.get((name, "backward"), 0.0)),
            _share(names[name], rank.whole),
            _milliseconds(totals[name]),
        ]
        for name in names
    ]
    titles = ["Range", "Forward, ms a step", "Backward, ms a step", "Share", "With ranges within, ms"]
    return tabled(titles, rows, label="Ranges of the model", sortable=True)


def _kind_table(rank: _Rank) -> Element:
    cpu, device = (rank.by(lambda cell: cell["kind"], basis) for basis in ("cpu", "device"))
    rows: list[list[Cell]] = [
        [
            name,
            _milliseconds(seconds),
            _share(seconds, rank.step),
            *([_milliseconds(device[name]), _share(device[name], rank.whole)] if rank.device else []),
        ]
        for name, seconds in (
            cpu if rank.device is None else device | {k: v for k, v in cpu.items() if k not in device}
        ).items()
    ]
    titles = ["Kind", "Main thread, ms a step", "Share", *(["Kernels, ms a step", "Share of kernels"] if rank.device else [])]
    return tabled(titles, rows, label="Kinds of operators", sortable=True)


def _operator_table(rank: _Rank) -> Element:
    shaped = any(one["shapes"] for one in rank.told["operators"])
    rows: list[list[Cell]] = [
        [
            element("code", str(one["name"])),
            *([str(one["shapes"])] if shaped else []),
            str(one["kind"]),
            _count(one["count"] / rank.steps),
            _milliseconds(one["cpu"] / rank.steps),
            _share(one["cpu"] / rank.steps, rank.step),
            *(
                [_milliseconds(one["device"] / rank.steps), _share(one["device"] / rank.steps, rank.whole)]
                if rank.device
                else []
            ),
        ]
        for one in rank.told["operators"]
    ]
    titles = ["Operator", *(["Shapes"] if shaped else []), "Kind", "Calls a step", "Own ms a step", "Share"]
    titles += ["Kernels, ms a step", "Share of kernels"] if rank.device else []
    return tabled(titles, rows, label="Operators that take longest", sortable=True)


def _device(device: Tree) -> list[Content]:
    seconds, idle = float(device["seconds"]), float(device["idle"])
    words = (
        f"Kernels, copies and fills keep it busy for {_percent(device['busy'], seconds)} of the time from the first step's "
        f"begin to the last one's end; it stands still for {_percent(idle, seconds)}, of which "
        f"{_percent(device['long_gap_seconds'], idle)} in {device['long_gaps']} gaps of 0.1 ms or more."
    )
    rows: list[list[Cell]] = [
        [element("code", str(one["name"])), str(one["kind"]), _count(one["count"]), _milliseconds(one["seconds"])]
        for one in device["kernels"]
    ]
    return [element("p", words), tabled(["Kernel", "Kind", "Calls", "ms, all steps"], rows, label="Kernels", sortable=True)]


def _ranks(summary: Tree, ranks: Sequence[tuple[str, _Rank]]) -> list[Content]:
    rows: list[list[Cell]] = []
    for name, rank in ranks:
        phases = rank.by(lambda cell: cell["phase"], "cpu")
        kinds = rank.by(lambda cell: cell["kind"], "cpu")
        rows.append(
            [
                Number(float(name), name),
                _milliseconds(rank.step),
                _milliseconds(phases.get("data", 0.0)),
                _milliseconds(max(phases.get("communication", 0.0), kinds.get("communication", 0.0))),
                _count(rank.told["events"] / rank.steps),
                Number(float(rank.told["bytes"]), f"{rank.told['bytes'] / 1e6:.2f} MB"),
                element("code", str(rank.told["trace"])),
            ]
        )
    titles = ["Rank", "Step, ms", "Data, ms", "Communication, ms", "Events a step", "Size", "Trace"]
    words = (
        f"{summary['world_size']} rank{'s' if summary['world_size'] > 1 else ''} on {summary['device']}, "
        f"{summary['threads']} thread{'s' if summary['threads'] > 1 else ''} each; this page tells of rank {ranks[0][0]}."
    )
    return [
        element("p", words),
        tabled(titles, rows, label="Ranks"),
        element(
            "p",
            "To look at each operator on its line of time, open a trace, compressed as it is, at ",
            element("code", "https://ui.perfetto.dev"),
            " (it stays in the browser) or in Chrome at ",
            element("code", "chrome://tracing"),
            "; ranges are on the line of the main thread, W and S zoom, A and D move.",
        ),
    ]


def _advice(rank: _Rank, ranks: int) -> list[Content]:
    """What is worth trying, by what is long."""
    phases, kinds = rank.by(lambda cell: cell["phase"], "cpu"), rank.by(lambda cell: cell["kind"], "cpu")
    said: list[str] = []
    if phases.get("data", 0.0) > 0.05 * rank.step:
        said.append(
            "Waiting for data is more than 5 % of a step: more data.threads, a larger data.prefetch, a store on a local disk."
        )
    if phases.get("copy", 0.0) > 0.05 * rank.step:
        said.append("Copies to the device are waited for: a larger data.prefetch lets them begin earlier.")
    shared = max(phases.get("communication", 0.0), kinds.get("communication", 0.0))
    if shared > 0.1 * rank.step:
        slow = "compare the ranks below: who waits least is the slow one; " if ranks > 1 else ""
        said.append(
            f"Communication is {_percent(shared, rank.step)} of a step: {slow}larger micro-batches exchange more seldom."
        )
    if rank.device is not None and float(rank.device["idle"]) > 0.2 * float(rank.device["seconds"]):
        said.append("The GPU stands still for more than a fifth of the time: engine.compile=true, or a larger micro-batch.")
    if rank.device is None and kinds.get("Python and waiting", 0.0) - phases.get("data", 0.0) > 0.2 * rank.step:
        said.append("More than a fifth of a step is outside of operators: a larger micro-batch gives each of them more to do.")
    if phases.get("optimizer", 0.0) > 0.2 * rank.step:
        said.append("The optimizer is more than a fifth of a step: a larger global batch steps more seldom.")
    copies = rank.by(lambda cell: _range(cell) if cell["kind"] == "copies and indexing" else "")
    copies.pop("", None)
    if sum(copies.values()) > 0.25 * rank.whole:
        halved = "" if rank.device is None else "; engine.precision=bf16 halves what they move"
        said.append(
            f"Copies and indexing are {_percent(sum(copies.values()), rank.whole)}, most of them in {next(iter(copies))}: they "
            f"move memory and compute nothing{halved}."
        )
    products = rank.by(lambda cell: cell["kind"]).get("matrix products", 0.0)
    if products > 0.5 * rank.whole:
        said.append(
            "Matrix products are most of it, which is as it should be: from here on bf16, a smaller model, or packing, which "
            "leaves out what holds no brain."
        )
    elif not said:
        said.append("Nothing stands out: look at the longest range and its kinds of operators below.")
    return [
        *said,
        element(
            "span",
            "How to read this page: ",
            element("code", "docs/profiling.md"),
            "; step by step from a slow run to its cause: ",
            element("code", "docs/throughput.md"),
            ".",
        ),
    ]


def _bar(parts: Mapping[str, float], whole: float, colours: Mapping[str, str], label: str = "Parts of a step") -> Element:
    shown = [
        element(
            "span",
            title=f"{name}: {1000 * seconds:.2f} ms",
            style=f"width: {100 * seconds / whole if whole else 0:.2f}%; background: {colours.get(name, '#777783')}",
        )
        for name, seconds in parts.items()
        if seconds > 0
    ]
    words = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in parts.items() if seconds > 0)
    return element("div", *shown, kind="profile-bar", role="img", aria_label=f"{label}: {words}")


def _keys(parts: Mapping[str, float], whole: float, colours: Mapping[str, str]) -> Element:
    items = [
        element("li", element("i", style=f"background: {colours[name]}"), f"{name} {_percent(seconds, whole) if whole else ''}")
        for name, seconds in parts.items()
    ]
    return element("ul", *items, kind="profile-keys")


def _in_order(places: Iterable[Place]) -> list[Place]:
    """By range, the longest first, its forward pass before its backward one."""
    ranges = list(dict.fromkeys(name for name, _ in places))
    return sorted(places, key=lambda place: (ranges.index(place[0]), place[1] != "forward", place[1]))


def _named(place: Place) -> str:
    return ", ".join(part for part in place if part)


def _range(cell: Tree) -> str:
    return str(cell["range"][-1]) if cell["range"] else NOWHERE


def _first(summary: Tree) -> _Rank:
    first, *_ = summary["ranks"].values()
    return _Rank(first)


def _steps(summary: Tree) -> str:
    steps = summary["steps"]
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"


def _attempt(path: Path) -> int:
    digits = path.parent.name.removeprefix("attempt_")
    return int(digits) if digits.isdecimal() else -1


def _percent(part: float, whole: float) -> str:
    share = 100 * float(part) / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 9.95 or share == 0 else f"{share:.1f} %"


def _before(steps: int) -> str:
    return "the step before" if steps == 1 else f"the {steps} steps before"


def _unbroken(text: str) -> str:
    """A number stays on the line of its sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _share(part: float, whole: float) -> Number:
    return Number(part / whole if whole else 0.0, _percent(part, whole))


def _milliseconds(seconds: float) -> Number:
    return Number(seconds, f"{1000 * seconds:.2f}")


def _count(value: float) -> Number:
    return Number(value, f"{value:.0f}" if value == round(value) else f"{value:.1f}")


def _seconds(value: float) -> str:
    return f"{number(1000 * value, 3)} ms" if value < 1 else f"{number(value, 3)} s"
