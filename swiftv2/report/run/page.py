"""The page of one run or of several: a single file that works without a network."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Content, document, element, warned
from swiftv2.report.profile import profile_section
from swiftv2.report.run import charts
from swiftv2.report.run.comparing import comparing_section
from swiftv2.report.run.curves import curves_section
from swiftv2.report.run.datasheet import datasheet_section
from swiftv2.report.run.downstream import downstream_section
from swiftv2.report.run.heldout import heldout_section
from swiftv2.report.run.overlap import overlap_section
from swiftv2.report.run.pictures import pictures_section
from swiftv2.report.run.provenance import provenance_section
from swiftv2.report.run.reading import UNREADABLE, Run, why_not
from swiftv2.report.run.sharing import hide, shareable
from swiftv2.report.run.throughput import throughput_section
from swiftv2.report.run.timeline import timeline_section
from swiftv2.report.run.verdict import shown, verdicts
from swiftv2.report.run.words import counted, moment

STYLE = """
body { max-width: 64rem; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 4rem; }
header h1 { margin: .2rem 0 .1rem; font-size: 1.7rem; letter-spacing: -.01em; } header p { margin: 0; }
nav { position: sticky; top: 0; z-index: 5; background: var(--paper); border-bottom: 1px solid var(--rule); margin: 1rem 0 0;
  overflow-x: auto; white-space: nowrap; } nav a { display: inline-block; padding: .5rem .8rem .5rem 0; font-size: .9rem;
  text-decoration: none; } nav a:hover { text-decoration: underline; }
section { scroll-margin-top: 3rem; } section > h2 { margin: 2.8rem 0 .6rem; font-size: 1.3rem; letter-spacing: -.01em; }
section h3 { margin: 1.6rem 0 .4rem; }
section > figure { margin: 1.4rem 0; } section > figure figcaption { margin-top: .4rem; font-size: .88rem; }
:root { --good: #1a7f4b; --bad: #b3261e; --card: #f7f7f9; }
@media (prefers-color-scheme: dark) { :root { --good: #5fd39a; --bad: #ff8a80; --card: #1f1f25; } }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: .9rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-top: .25rem solid var(--quiet); border-radius: .5rem;
  padding: .8rem 1rem; font-size: .94rem; } .card h3 { margin: 0; font-size: .88rem; font-weight: 500; color: var(--quiet); }
.card p { margin: .4rem 0; } .card ul { margin: .4rem 0 0; padding-left: 1.1rem; color: var(--quiet); }
.card .answer { font-size: 1.2rem; } .sign { display: inline-grid; place-items: center; width: 1.5rem; height: 1.5rem;
  border-radius: 50%; color: var(--paper);
  background: var(--quiet); font-size: .95rem; font-weight: 700; vertical-align: .08em; }
.good { border-top-color: var(--good); } .good .sign { background: var(--good); }
.look { border-top-color: var(--alarm); } .look .sign { background: var(--alarm); border-radius: .3rem; }
.bad { border-top-color: var(--bad); } .bad .sign { background: var(--bad); border-radius: .3rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem 1.2rem; margin: .8rem 0; }
.facts dt { color: var(--quiet); font-size: .82rem; } .facts dd { margin: 0; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .4rem; padding: .7rem .9rem; overflow: auto;
  max-height: 26rem; font-size: .85rem; margin: .4rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.copied { position: relative; } .copied button { position: absolute; top: .45rem; right: .5rem; }
.copied pre { padding-right: 4.5rem; }
summary { cursor: pointer; } details.run { border-top: 1px solid var(--rule); margin-top: 1.5rem; padding-top: .8rem; }
details.run > summary { font-size: 1.3rem; font-weight: 600; } a:focus-visible, button:focus-visible, summary:focus-visible,
[tabindex]:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
footer { margin-top: 3rem; font-size: .85rem; }
td code { overflow-wrap: break-word; } td code.key { white-space: nowrap; }
@media print { nav { display: none; } body { max-width: none; } .chart, .card { break-inside: avoid; } }
"""


def page(runs: Sequence[Run], now: float, *, share: bool = False) -> bytes:
    """The page.

    Args:
        runs: with names that differ.
        now: unix time, told in the page: it does not follow a run that goes on.
        share: whether names of hosts and users and all of paths but their last part are left out.

    Returns:
        HTML in UTF-8 that fetches nothing.
    """
    told = shareable(runs) if share else runs
    body = _single(told[0], now) if len(told) == 1 else _several(told, now)
    title = f"{told[0].name} \u2013 run" if len(told) == 1 else f"{counted(len(told), 'run')} side by side"
    if share:
        title = hide([one for one in body if isinstance(one, Element)], runs)(title)
    return document(title, body, style=charts.STYLE + STYLE, scripts=charts.scripts())


def _single(run: Run, now: float) -> list[Content]:
    sections = [one for one in _sections(run, alone=True) if one is not None]
    header = element("header", element("h1", run.name), element("p", _status(run), kind="quiet"))
    return [header, *_damaged(run), shown(verdicts(run)), _links(sections), *sections, _footer(now)]


def _several(runs: Sequence[Run], now: float) -> list[Content]:
    header = element("header", element("h1", f"{counted(len(runs), 'run')} side by side"))
    drawn = {"comparing": comparing_section, "curves": curves_section, "throughput": throughput_section}
    made = [_guarded(name, partial(section, runs), "one of the runs") for name, section in drawn.items()]
    common = [one for one in made if one is not None]
    own: list[Element] = []
    for place, run in enumerate(runs):
        sections = [one for one in _sections(run, alone=False) if one is not None]
        for part in sections:
            part.set("id", f"{part.get('id', 'part')}-{place}")
        content: list[Content] = [element("p", _status(run), kind="quiet"), *_damaged(run), shown(verdicts(run)), *sections]
        own.append(element("details", element("summary", run.name), *content, kind="run", id=f"run-{place}"))
    return [header, _links([*common, *own]), *common, *own, _footer(now)]


def _sections(run: Run, *, alone: bool) -> list[Element | None]:
    """Of one run, top down; what is drawn for all runs together is not drawn again."""
    sections: dict[str, Callable[[], Element | None]] = {
        "heldout": lambda: heldout_section(run),
        "pictures": lambda: pictures_section(run),
        "curves": lambda: curves_section([run]) if alone else None,
        "throughput": lambda: throughput_section([run]),
        "profile": lambda: profile_section(run),
        "datasheet": lambda: datasheet_section(run),
        "overlap": lambda: overlap_section(run),
        "downstream": lambda: downstream_section(run),
        "timeline": lambda: timeline_section(run),
        "provenance": lambda: provenance_section(run),
    }
    return [_guarded(name, made, run.path) for name, made in sections.items()]


def _guarded(name: str, made: Callable[[], Element | None], where: Path | str) -> Element | None:
    """A section, or a box that says what it could not be made from: the rest of the page is worth having."""
    try:
        return made()
    except UNREADABLE as error:
        return warned("A part of the page cannot be made", [why_not(name, error, where)])


def _status(run: Run) -> str:
    step, last = run.last("step"), run.setting("train.max_steps")
    parts = [str(run.standing.get("state") or "")]
    if isinstance(last, int):
        parts.append(f"step {step or 0:,} of {last:,}")
    model = run.setting("model.name") or run.setting("task.name")
    parts += [str(model)] if model else []
    device = run.environment.get("device")
    ranks = run.environment.get("world_size")
    parts += [f"{counted(int(ranks), 'rank')} on {device}"] if isinstance(ranks, int) else []
    starts = run.told("start")
    if starts and isinstance(starts[0].get("time"), int | float):
        parts.append(f"begun {moment(starts[0]['time'])} UTC")
    return " \u00b7 ".join(part for part in parts if part)


def _damaged(run: Run) -> list[Element]:
    return [warned("Files that cannot be read as they should be", list(run.damaged))] if run.damaged else []


def _links(sections: Sequence[Element]) -> Element:
    links = []
    for one in sections:
        title = next((part.text for part in one if part.tag in {"h2", "summary"}), None)
        if title and one.get("id"):
            links.append(element("a", title, href=f"#{one.get('id')}"))
    return element("nav", *links, aria_label="parts of the page")


def _footer(now: float) -> Element:
    text = "This page is one file and fetches nothing; a run that goes on has moved since."
    text = f"Made by swiftv2 report, {moment(now)} UTC. {text}"
    return element("footer", element("p", text, kind="quiet"))
