"""Numbers, times and names as the page of a run says them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Content, element

METHODS = {
    "model": "model",
    "visible_mean": "mean of the visible frames",
    "time_interpolation": "interpolation in time",
    "run_mean": "mean of the whole run",
}
"""What predicts the hidden voxels, as `recipes/baselines.py` names it."""

_SIZES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def method(name: str) -> str:
    """A method in words."""
    return METHODS.get(name, name.replace("_", " "))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 clip, 2 clips."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Two units at most: 41 s, 3 min 20 s, 5 h 2 min, 2 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, below, lesser in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {lesser}" if rest else "")
    raise AssertionError(seconds)


def moment(unix: float) -> str:
    """A time in UTC, to the second."""
    return f"{datetime.fromtimestamp(unix, UTC):%Y-%m-%d %H:%M:%S}"


def short(value: float, digits: int = 3) -> str:
    """A number with a letter for its thousands: 1.23 M, 412, 0.0345."""
    for size, letter in _SIZES:
        if abs(value) >= size:
            return f"{value / size:.{digits}g} {letter}"
    return f"{value:.{digits}g}"


def listing(words: Sequence[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def facts(pairs: Sequence[tuple[str, Content]]) -> Element:
    """Names and values, side by side."""
    parts: list[Element] = []
    for name, value in pairs:
        parts.append(element("div", element("dt", name), element("dd", value)))
    return element("dl", *parts, kind="facts")


def section(name: str, title: str, *content: Content) -> Element:
    """A part of the page that a link can lead to."""
    return element("section", element("h2", title), *content, id=name)
