"""The command that shows whether the best learning rate stays put over widths."""

import argparse
import json
from pathlib import Path
from typing import Any

from swiftv2.errors import UsageError
from swiftv2.files import write_file
from swiftv2.terminal import add_command, add_json, answer

NEEDED = ("parametrisation", "embed_dim", "lr", "loss")


def add(verbs: Any) -> None:
    """The verb `transfer` of `sweep`."""
    text = (
        "find the best learning rate of each width in a table of runs, in the standard form and under muP, and draw the losses "
        "against the rate: under muP the best rate stays put."
    )
    examples = (
        "swiftv2 sweep collect scaling/ladders/transfer.yaml --out tables/transfer",
        "swiftv2 sweep transfer tables/transfer/table.json --out transfer",
    )
    parser = add_command(verbs, "transfer", _transfer, text, examples)
    add_json(parser)
    parser.add_argument("table", type=Path, help="table.json that `sweep collect` has written of a ladder with a grid of rates")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write transfer.json and the plot (SVG and PNG)")


def _transfer(arguments: argparse.Namespace) -> int:
    from swiftv2.scaling.transfer import transfer

    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out}: a file is there; give a folder")
    curves = transfer(_rows(arguments.table))
    written: list[str] = []
    if arguments.out is not None:
        from swiftv2.report.scaling import save_figure
        from swiftv2.report.scaling import transfer as draw

        arguments.out.mkdir(parents=True, exist_ok=True)
        write_file(arguments.out / "transfer.json", json.dumps(curves, indent=1) + "\n")
        written = [str(one) for one in save_figure(draw(curves), arguments.out, "transfer")]
    answer(curves | {"written": written}, *_lines(curves), *written, as_json=arguments.json)
    return 0


def _rows(path: Path) -> list[dict[str, Any]]:
    """The table's runs.

    Raises:
        UsageError: it cannot be read, or is no table of runs with rates.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise UsageError(f"{path}: cannot be read ({reason}); give the table.json of `swiftv2 sweep collect`") from error
    rows = tree.get("rows") if isinstance(tree, dict) else tree
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: holds no runs; give the table.json of `swiftv2 sweep collect`")
    missing = [name for name in NEEDED if any(name not in row for row in rows)]
    if missing:
        raise UsageError(f"{path}: runs without {', '.join(missing)}; give the table.json of `swiftv2 sweep collect`")
    return rows


def _lines(curves: dict[str, Any]) -> list[str]:
    lines = []
    for one in curves["widths"]:
        between = one["best_lr_interval"]
        where = f"between {between[0]:.3g} and {between[1]:.3g}" if between else "at the end of the grid: widen it"
        lines.append(f"{one['parametrisation']:<9} width {one['embed_dim']:>5}: best rate {one['best_lr']:.3g} ({where})")
    for form, ratio in curves["moved"].items():
        own = [one for one in curves["widths"] if one["parametrisation"] == form]
        if None in (own[0]["best_lr_interval"], own[-1]["best_lr_interval"]):
            lines.append(f"{form}: whether the best rate stays put cannot be told: at a width it is at the end of the grid")
            continue
        stays = 1 / curves["step"] <= ratio <= curves["step"]
        lines.append(
            f"{form}: from the smallest to the largest width the best rate changes by a factor of {ratio:.2g}, "
            f"{'no more' if stays else 'more'} than a step of the grid ({curves['step']:.2g})"
        )
    return lines
