"""What a study came to, as figures and as one page that needs no network."""

import base64
import html
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.visualization import matplotlib as plots

from swiftv2.files import write_file

_INCHES = (8.0, 4.5)
_FIGURES: dict[str, tuple[Callable[[optuna.Study], Any], str]] = {
    "history": (
        plots.plot_optimization_history,
        "Value of each trial on the validation subjects; the line is the best so far.",
    ),
    "intermediate_values": (plots.plot_intermediate_values, "Values while training; short lines were ended early."),
    "importances": (plots.plot_param_importances, "Share of each setting in how much the values differ."),
    "parallel": (plots.plot_parallel_coordinate, "Each line is a trial; dark ones are good."),
    "slices": (plots.plot_slice, "Values over each setting."),
    "distribution": (plots.plot_edf, "Share of the trials that are at least as good as a value."),
    "timeline": (plots.plot_timeline, "When each trial ran, and how it ended."),
}
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;color:#1b1b1f;background:#fff}
table{border-collapse:collapse;font-size:.92rem}th,td{padding:.25rem .6rem;border-bottom:1px solid #d5d5dc;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{margin:1.5rem 0}img{max-width:100%}
figcaption,.quiet{color:#5d5d66}.scroll{overflow-x:auto}"""


def draw(study: optuna.Study, folder: Path) -> dict[str, tuple[Path, str]]:
    """Draw Optuna's figures of a study as PNG files.

    Returns:
        By name, (file, one sentence on how to read it); what a study of its kind has no figure of is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    with mpl.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for name, (plot, says) in _FIGURES.items():
            try:
                axes = plot(study)
            except (ValueError, RuntimeError, ZeroDivisionError):
                plt.close("all")
                continue  # Importances of one trial, for instance.
            figure = np.atleast_1d(axes).ravel()[0].figure
            figure.set_size_inches(*_INCHES)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close("all")
            made[name] = (path, says)
    return made


def write_page(path: Path, found: Mapping[str, Any], figures: Mapping[str, tuple[Path, str]]) -> None:
    """Write the page of a finished study from the content of its `study.json`."""
    tried, best = found["tried"], found["best"]
    metric = _text(found["select"]["metric"])
    told = (
        f"{tried['configurations']} configurations were tried: {tried['complete']} came to their end, {tried['pruned']} "
        f"were ended early, {tried['failed']} failed. Trial {best['trial']} was the best on the validation subjects "
        f"({metric}, with the sign that makes lower better: {_number(best['value'])}). It was trained again with "
        f"{len(found['seeds'])} seeds of their own, which predicted the test subjects, once."
    )
    parts = [
        f"<h1>{_text(found['name'])}</h1>",
        f"<p>{told}</p>",
        "<h2>Test subjects</h2>",
        _spreads(found["test"]),
        "<h2>Validation subjects</h2>",
        '<p class="quiet">The search has chosen by these: they flatter it.</p>',
        _spreads(found["val"]),
        "<h2>The configuration</h2>",
        _table(("setting", "value"), [(key, str(value)) for key, value in best["settings"].items()]),
        "<h2>Which settings matter</h2>",
        _importance(found),
        *(_figure(file, says) for file, says in figures.values()),
        "<h2>All trials</h2>",
        _trials(found["trials"]),
    ]
    body = "\n".join(parts)
    write_file(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(found["name"])}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n",
    )


def _spreads(targets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        (column, metric, _number(one["mean"]), _number(one["std"]), _number(one["low"]), _number(one["high"]))
        for column, metrics in targets.items()
        for metric, one in metrics.items()
    ]
    return _table(("target", "metric", "mean over seeds", "deviation", "lowest", "highest"), rows)


def _importance(found: Mapping[str, Any]) -> str:
    if found["importance"] is None:
        return f"<p>Not known: {_text(found['importance_unknown'])}.</p>"
    return _table(("setting", "importance"), [(key, _number(value)) for key, value in found["importance"].items()])


def _trials(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    shown = [
        (
            str(row["number"]),
            row["state"],
            _number(row["value"]),
            _number(row["lowest"]),
            str(row["steps"] if row["steps"] is not None else ""),
            *(_number(value) if isinstance(value := row["settings"].get(key, ""), float) else str(value) for key in keys),
            row["reason"] or "",
        )
        for row in rows
    ]
    return _table(("trial", "state", "value", "lowest", "steps", *keys, "reason"), shown)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return f"<td>{_text(text)}</td>"
    return f'<td class="n">{_text(text)}</td>'


def _figure(path: Path, says: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{_text(says)}" src="data:image/png;base64,{data}"><figcaption>{_text(says)}</figcaption></figure>'
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return html.escape(str(value))
