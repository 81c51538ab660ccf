"""A page without names of hosts, of people and of folders, to be given away."""

import json
import pwd
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.run.reading import Run

Clean = Callable[[str], str]

_END = r"(?=$|[\s\"'\\=:;,<>()\[\]{}])"
_PART = r"[^\s/\"'\\=:;,<>()]+"
_PATH = re.compile(rf"(?<![\w.\u2026<])(?:~[\w.-]*|\$\w+|\$\{{\w+\}}|\.\.?)?/(?:{_PART}/)*(?={_PART})")
"""From the beginning of an absolute path, or one from home, a variable, or the folder above, up to its last part."""
_WORD = re.compile(r"[^\s\"'\\=:;,<>()]*/[^\s\"'\\=:;,<>()]*")
_OURS = re.compile(r"configs/|\w+/s$")
"""Words with a stroke that name no folder of anybody: our presets, and what is counted by the second."""
_URL = re.compile(r"\b([a-z]+)://[^\s\"'<>]+")
_OVERRIDE = re.compile(r"^[\w.]+=")
_HOME = re.compile(r"/(?:home|homes|Users|users|pscratch/sd|scratch)/(?:[a-z]/)?([^\s/\"'\\]{2,})")
_RANK = re.compile(r"\b(?:rank|process|host) (?:\d+ )?(?:on )?([A-Za-z][\w.-]*\d[\w.-]*)")
_NO_USER = {"root", "", "data", "shared", "public", "project", "projects", "group", "groups", "lab", "runs", "user", "users"}
_NO_TEXT = {"src", "href", "id", "class", "data-value", "data-copies", "style", "for", "type"}
"""Attributes that nobody reads."""


def shareable(runs: Sequence[Run]) -> list[Run]:
    """Runs under the last part of their names, with what was told of them freed from folders.

    In texts of events whatever has a stroke is taken for a path: of one that holds blanks nothing else would tell.
    """
    last = [run.path.name for run in runs]
    twice = Counter(last)
    names = [f"{name} ({place + 1})" if twice[name] > 1 else name for place, name in enumerate(last)]
    return [
        replace(
            run,
            name=name,
            events=tuple(_freed(run.events)),
            damaged=tuple(_freed(run.damaged)),
            standing=_freed(run.standing),
        )
        for run, name in zip(runs, names, strict=True)
    ]


def hide(content: Sequence[Element], runs: Sequence[Run]) -> Clean:
    """Take out of a page's elements the names of hosts and users, and all of paths but their last part.

    Args:
        content: changed in place, with the data of its charts.
        runs: as they were read, whose settings, environments and events hold the names.

    Returns:
        What does the same to a text.
    """
    clean = _cleaner(runs)
    for top in content:
        for one in top.iter():
            if one.tag == "script":
                # Names that are keys or values of the chart itself must stay: only what is written in it is cleaned.
                one.text = _in_json(one.text or "", clean) if one.get("type") == "application/json" else one.text
            else:
                one.text = None if one.text is None else clean(one.text)
            one.tail = None if one.tail is None else clean(one.tail)
            for name in set(one.attrib) - _NO_TEXT:
                one.set(name, clean(one.attrib[name]))
    return clean


def _in_json(text: str, clean: Clean) -> str:
    tree = _strings(json.loads(text), lambda value: clean(value) if _SPEAKS.search(value) else value)
    found = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    return found.replace("<", "\\u003c")


_SPEAKS = re.compile(r"[\s/.\d-]")
"""Of texts of a chart that a person reads and that may hold a name; words of the library have no such sign."""


def _strings(tree: Any, change: Clean) -> Any:
    """A tree with its texts changed; keys stay."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _strings(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_strings(value, change) for value in tree]
    return tree


def _freed(tree: Any) -> Any:
    return _strings(tree, lambda text: _WORD.sub(_last_part, _URL.sub(_site, text)))


def _site(found: re.Match[str]) -> str:
    return f"{found[1]}:\u2026"


def _last_part(found: re.Match[str]) -> str:
    word = found[0]
    return word if _OURS.match(word) else f"\u2026/{word.rstrip('/').rpartition('/')[2]}"


def _cleaner(runs: Sequence[Run]) -> Clean:
    texts = [text for run in runs for tree in (run.settings, run.environment, run.events) for text in _texts(tree)]
    hosts = [name for run in runs for name in _hosts((run.environment, run.events)) if name]
    hosts = list(dict.fromkeys([*hosts, *(name for text in texts for name in _RANK.findall(text))]))
    # A path with blanks in it is known as a whole or not at all.
    values = (_OVERRIDE.sub("", text) for text in texts)
    paths = {value for value in values if _is_path(value)} | {str(run.path) for run in runs}
    whole = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
    known = re.compile(rf"(?<![\w.\u2026/])(?:{whole}){_END}")
    users = {name for text in [*texts, *paths] for name in _HOME.findall(text)} | {_owner(run.path) for run in runs}
    named = {name: f"host-{place + 1}" for place, name in enumerate(hosts)}
    named |= dict.fromkeys(users - _NO_USER, "user")
    words = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
    word = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])") if words else None

    def clean(text: str) -> str:
        text = known.sub(lambda found: f"\u2026/{Path(found[0]).name}", text)
        text = _PATH.sub("\u2026/", _URL.sub(_site, text))
        return text if word is None else word.sub(lambda found: named[found[0]], text)

    return clean


def _is_path(text: str) -> bool:
    return "/" in text.strip("/") and "\n" not in text and not _OURS.match(text) and "://" not in text


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
