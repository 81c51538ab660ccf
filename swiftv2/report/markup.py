"""HTML as trees of elements: every text is escaped, since names come from files; and numbers as a page shows them."""

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

Content = Element | str

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --quiet: #5d5d66; --rule: #d5d5dc; --alarm: #a33b00;
  --tint: #fdf0e7; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ec; --paper: #17171b; --quiet: #a5a5b0; --rule: #3b3b45;
  --alarm: #ff9a57; --tint: #2e2118; --link: #8fc1ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
a { color: var(--link); } code { font-size: .92em; } .quiet, figcaption { color: var(--quiet); }
.says { font-size: 1.1rem; } .warning { border-left: .3rem solid var(--alarm); background: var(--tint); padding: .6rem 1rem; }
.warning ul { margin: .3rem 0; padding-left: 1.2rem; } .warning strong, .off { color: var(--alarm); }
.scroll { overflow-x: auto; } .scroll.tall { max-height: 36rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: normal; }
td.number { text-align: right; white-space: nowrap; } td.words { min-width: 12rem; }
.tall th { position: sticky; top: 0; background: var(--paper); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: left; }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; }
.picture { background: #fff; border-radius: .4rem; padding: .4rem; overflow-x: auto; }
.picture img { display: block; width: 100%; height: auto; } .wide .picture img { min-width: 40rem; }
"""

SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const title = button.parentElement, body = title.closest("table").tBodies[0];
  const up = title.getAttribute("aria-sort") !== "ascending";
  for (const other of title.parentElement.cells) other.removeAttribute("aria-sort");
  title.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const cell = row.cells[title.cellIndex]; return cell.dataset.value ?? cell.textContent; };
  const order = (a, b) => (Number.isNaN(a - b) ? a.localeCompare(b) : a - b) * (up ? 1 : -1);
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
};
"""

_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Nothing is fetched, whatever a table held."""


class Number(NamedTuple):
    """A cell that is sorted by its value, however it is shown."""

    value: float
    text: str


Cell = Content | Number


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """An element with texts and elements in it; `class` is written `kind`, and `_` in other names stands for `-`."""
    names = {"class" if name == "kind" else name.replace("_", "-"): value for name, value in attributes.items()}
    made = Element(tag, names)
    for one in content:
        if isinstance(one, Element):
            made.append(one)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + one
        else:
            made.text = (made.text or "") + one
    return made


def listed(items: Sequence[Content]) -> Element:
    """Items with dots."""
    return element("ul", *(element("li", item) for item in items))


def warned(title: str, items: Sequence[Content]) -> Element:
    """A box that stands out."""
    return element("div", element("strong", title), listed(items), kind="warning", role="note")


def tabled(titles: Sequence[str], rows: Sequence[Sequence[Cell]], *, label: str, sortable: bool = False) -> Element:
    """A table that scrolls by itself where it is wider than the window.

    Args:
        titles: of the columns.
        rows: of as many cells.
        label: what it is, for those who do not see it.
        sortable: whether titles are buttons that sort it; a long table, which scrolls within itself, too.
    """
    heads = [element("button", title, type="button") if sortable else title for title in titles]
    head = element("thead", element("tr", *(element("th", one, scope="col") for one in heads)))
    body = element("tbody", *(element("tr", *map(_celled, row)) for row in rows))
    kind = "scroll tall" if sortable else "scroll"
    return element("div", element("table", head, body), kind=kind, tabindex="0", role="region", aria_label=label)


def _celled(cell: Cell) -> Element:
    if isinstance(cell, Number):
        return element("td", cell.text, kind="number", data_value=repr(cell.value))
    if isinstance(cell, str):
        return element("td", cell, kind="words") if len(cell) > 30 else element("td", cell)
    return element("td", cell)


def document(title: str, content: Sequence[Content], style: str = "", scripts: Sequence[str] = ()) -> bytes:
    """A whole page in UTF-8, with its style and scripts in it.

    Args:
        title: of the window.
        content: of the page.
        style: rules beside those that all pages share.
        scripts: run in this order after the content; none may hold `</script`.
    """
    head = element("head", element("meta", charset="utf-8"))
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    head.extend([element("title", title), element("style", STYLE + style)])
    body = element("body", element("main", *content), *(element("script", one) for one in (*scripts, SORT)))
    page = "<!DOCTYPE html>\n" + tostring(element("html", head, body, lang="en"), encoding="unicode", method="html") + "\n"
    # A name from JSON may hold half a character, which no encoding can write.
    return page.encode("utf-8", "replace")


def number(value: float, digits: int = 4) -> str:
    """A number of so many significant digits at least, all of them shown: 1.870, 1255, 3.2e19."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
    lead, sign, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{lead}{sign}{int(exponent)}"


def between(ends: Sequence[float], digits: int = 4) -> str:
    """An interval: 1.784 to 1.870."""
    return f"{number(float(ends[0]), digits)} to {number(float(ends[1]), digits)}"
