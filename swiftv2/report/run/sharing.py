"""A page without names of hosts, of people and of folders, to be given away."""

import pwd
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.run.reading import Run

_PATH = re.compile(r"(?<![\w.\u2026<])/(?:[^\s/\"'\\=:;,<>]+/)+(?=[^\s/\"'\\=:;,<>]*)")
_HOME = re.compile(r"/(?:home|Users)/([^\s/\"'\\]+)")
_NO_TEXT = {"src", "href", "id", "class", "data-value", "style", "for"}
"""Attributes that nobody reads."""


def hide(content: Sequence[Element], runs: Sequence[Run]) -> None:
    """Take out of a page's elements the names of hosts and users, and all of paths but their last part.

    Args:
        content: changed in place, with the data of its charts.
        runs: whose settings, environments and events hold the names.
    """
    clean = _cleaner(runs)
    for top in content:
        for one in top.iter():
            one.text, one.tail = (None if text is None else clean(text) for text in (one.text, one.tail))
            for name in set(one.attrib) - _NO_TEXT:
                one.set(name, clean(one.attrib[name]))


def _cleaner(runs: Sequence[Run]) -> Callable[[str], str]:
    texts = [text for run in runs for tree in (run.settings, run.environment, run.events) for text in _texts(tree)]
    hosts = list(dict.fromkeys(name for run in runs for name in _hosts((run.environment, run.events)) if name))
    # A path with blanks in it is known as a whole or not at all.
    paths = {text for text in texts if text.startswith("/") and text.count("/") > 1} | {str(run.path) for run in runs}
    known = sorted(paths, key=len, reverse=True)
    users = {name for text in [*texts, *paths] for name in _HOME.findall(text)} | {_owner(run.path) for run in runs}
    named = {name: f"host-{place + 1}" for place, name in enumerate(hosts)}
    named |= dict.fromkeys(users - {"root", ""}, "user")
    words = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
    word = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])") if words else None

    def clean(text: str) -> str:
        for path in known:
            text = text.replace(path, f"\u2026/{Path(path).name}")
        text = _PATH.sub("\u2026/", text)
        return text if word is None else word.sub(lambda found: named[found[0]], text)

    return clean


def _owner(path: Path) -> str:
    try:
        return pwd.getpwuid(path.stat().st_uid).pw_name
    except (OSError, KeyError):
        return ""


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)


def _hosts(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key in {"host", "hosts", "excluded"}:
                yield from _texts(value)
            else:
                yield from _hosts(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _hosts(value)
