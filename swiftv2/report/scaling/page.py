"""One page that tells a scaling law: words, tables and figures in a single file that needs no network."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from matplotlib.figure import Figure

from swiftv2.files import write_file
from swiftv2.report.markup import Content, document, element
from swiftv2.report.scaling import checks, losses, sections, widths
from swiftv2.report.scaling.style import PAGE_INCHES, render

PAGE = "index.html"
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class _Picture:
    """A figure of the page.

    Attributes:
        name: of its files.
        title: what it shows.
        read: one sentence on how to read it.
        draw: makes it of a tree.
    """

    name: str
    title: str
    read: str
    draw: Callable[[Tree], Figure]


_OF_FIT = (
    _Picture(
        "loss_against_compute",
        "Loss against compute",
        "The black line is the lowest loss that the law allows at each compute; runs near it were of the right size, and where "
        "it is dashed no run has been.",
        losses.loss_against_compute,
    ),
    _Picture(
        "loss_against_tokens",
        "Loss against tokens",
        "Each line is a size; the further it stays above the black one (endless parameters), the more its size holds it back.",
        losses.loss_against_tokens,
    ),
    _Picture(
        "loss_against_parameters",
        "Loss against parameters",
        "Each line is a number of tokens; the further it stays above the black one (endless tokens), the more data "
        "holds it back.",
        losses.loss_against_parameters,
    ),
    _Picture(
        "residuals",
        "Residuals",
        "Runs shall lie about zero without a pattern: a bend means that the law's form does not hold, and hollow ones "
        "are off it.",
        checks.residuals,
    ),
)
_ISOFLOP = _Picture(
    "isoflop",
    "isoFLOP parabolas",
    "Left, the lowest point of each parabola is the best size of its budget; right, those sizes shall lie within "
    "the band of the law's line.",
    checks.isoflop,
)
_TRANSFER = _Picture(
    "transfer",
    "Learning rate over widths",
    "Stars mark the best rate of each width: where it carries over they stand above one another, and where it does not they "
    "wander with the width.",
    widths.transfer,
)
_COORDINATES = _Picture(
    "coordinates",
    "Size of activations over widths",
    "Lines that stay level say that activations keep their size as the model grows wider; a slope that grows with steps says "
    "that the learning rate must shrink with the width.",
    widths.coordinates,
)


def write_page(
    folder: Path,
    fit: Tree,
    *,
    transfer: Tree | None = None,
    coordinates: Tree | None = None,
    prediction: Tree | None = None,
) -> tuple[Path, ...]:
    """Write the figures of a fit (SVG and PNG) and `index.html`, which holds them all.

    All is drawn before anything is written, and the page is written last, each file whole or not at all.

    Args:
        folder: made where it is not there.
        fit: a fit tree, as `swiftv2 sweep fit` writes it.
        transfer: a tree of learning rates over widths, as `swiftv2 sweep transfer` writes it.
        coordinates: a tree of activations over widths, as `swiftv2 sweep coordinates` writes it.
        prediction: a tree that `swiftv2 sweep predict` wrote.

    Returns:
        Paths of all that was written, the page first. Where the fit has no budgets of equal compute, the page says why, and
        figures of them from an earlier fit are taken away.
    """
    drawn: dict[str, dict[str, bytes]] = {}

    def shown(picture: _Picture, tree: Tree) -> Element:
        figure = picture.draw(tree)
        drawn[picture.name] = render(figure)
        return _shown(picture, drawn[picture.name]["svg"], wide=figure.get_figwidth() > 0.75 * PAGE_INCHES)

    pictures = [shown(picture, fit) for picture in _OF_FIT]
    stale = "refused" in fit["isoflop"]
    pictures.append(sections.refused_figure(_ISOFLOP.title, fit["isoflop"]["refused"]) if stale else shown(_ISOFLOP, fit))
    pictures += [shown(_TRANSFER, transfer)] if transfer is not None else []
    pictures += [shown(_COORDINATES, coordinates)] if coordinates is not None else []
    content: list[Content] = [
        *sections.heading(fit),
        *sections.summary(fit),
        *sections.warnings(fit),
        *sections.constants(fit),
        element("h2", "Figures"),
        element("div", *pictures, kind="figures"),
        *sections.checks(fit),
        *sections.points(fit),
        *(sections.prediction(prediction) if prediction is not None else []),
        *sections.method(fit),
    ]
    page = document(f"Scaling law of {Path(fit['table']).name}", content)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, made in drawn.items():
        for ending, content_of in made.items():
            paths.append(folder / f"{name}.{ending}")
            write_file(paths[-1], content_of)
    if stale:
        for ending in ("svg", "png"):
            (folder / f"{_ISOFLOP.name}.{ending}").unlink(missing_ok=True)
    write_file(folder / PAGE, page)
    return folder / PAGE, *paths


def _shown(picture: _Picture, svg: bytes, *, wide: bool) -> Element:
    # As an image of its own, a figure's names of parts and styles cannot meet those of another.
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    image = element("img", src=source, alt=f"{picture.title}. {picture.read}")
    links = [element("a", ending.upper(), href=f"{picture.name}.{ending}") for ending in ("svg", "png")]
    caption = element("figcaption", element("strong", picture.title), f". {picture.read} (", links[0], ", ", links[1], ")")
    return element("figure", element("div", image, kind="picture"), caption, kind="wide" if wide else "narrow")
