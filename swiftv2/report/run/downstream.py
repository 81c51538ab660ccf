"""What a fine-tuning run came to: metrics with their intervals, its figures, and where it stands among baselines."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Cell, Number, element, tabled
from swiftv2.report.run.reading import Run
from swiftv2.report.run.words import counted, section

RESULT = "result.json"
FOREST = "forest.png"
_PARTS = {"val": "validation", "test": "test"}
_MOST_FIGURES = 6


def downstream_section(run: Run) -> Element | None:
    """Results of a fine-tuning run; None for a run that has none.

    A forest plot that `swiftv2 task compare` has left in a folder above the run stands beside them.
    """
    result = run.document(RESULT)
    if result is None:
        return None
    subjects = result.get("subjects") or {}
    told = ", ".join(f"{number:,} {part}" for part, number in subjects.items())
    says = f"Task {result.get('task')}, {result.get('name')}: {told or 'subjects not told'}."
    step = result.get("best_step")
    says += f" Validation subjects chose step {step:,}." if isinstance(step, int) else ""
    judged = [part for target in (result.get("targets") or {}).values() for part in _PARTS if target.get(part)]
    if "test" not in judged:
        says += " Test subjects were not predicted."
    rows = [row for column, target in (result.get("targets") or {}).items() for row in _rows(str(column), target)]
    titles = ("target", "part", "metric", "value", "95 % interval", "subjects")
    table = tabled(titles, rows, label="results", sortable=True)
    note = (
        "Intervals are of resampled subjects. A result says little by itself: `swiftv2 task baselines` and `task compare` set "
        "it beside connectivity, motion and others on the same split."
    )
    content = [element("p", says, kind="says"), table, element("p", note, kind="quiet"), *_forest(run), *_figures(run)]
    return section("downstream", "Downstream results", *content)


def _rows(column: str, target: Mapping[str, Any]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for part, word in _PARTS.items():
        judged = target.get(part)
        for metric, estimate in ((judged or {}).get("metrics") or {}).items():
            value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
            interval = (
                f"{low:.3f} to {high:.3f}" if low is not None and high is not None else str(estimate.get("reason") or "none")
            )
            shown: Cell = Number(value, f"{value:.3f}") if value is not None else "not defined"
            count = judged.get("n") if judged else None
            rows.append([column, word, metric, shown, interval, Number(count, f"{count:,}") if count is not None else ""])
    return rows


def _forest(run: Run) -> list[Element]:
    found = next((folder / FOREST for folder in run.path.resolve().parents[:2] if (folder / FOREST).is_file()), None)
    if found is None:
        return []
    read = (
        "Each row is a method on the same subjects: left its metric, right its difference from the reference. Thick lines are "
        "intervals over test subjects, thin ones over training and test subjects."
    )
    return [element("h3", "Beside other methods"), _picture(found, "Forest plot of methods", read)]


def _figures(run: Run) -> list[Element]:
    paths = sorted((run.path / "figures").glob("test_*.png")) or sorted((run.path / "figures").glob("val_*.png"))
    shown = [_picture(path, path.stem.replace("_", " "), "Drawn from the predictions of gathered subjects.") for path in paths]
    left = len(paths) - _MOST_FIGURES
    more = [element("p", f"{counted(left, 'figure')} more in figures/.", kind="quiet")] if left > 0 else []
    return [element("div", *shown[:_MOST_FIGURES], kind="figures"), *more] if shown else []


def _picture(path: Path, title: str, read: str) -> Element:
    image = element("img", src=f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", alt=title)
    return element("figure", element("div", image, kind="picture"), element("figcaption", f"{title}. {read}"))
