"""A fit on the disk: the whole tree as JSON, and its runs as CSV."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftv2.files import write_file

FIT, POINTS = "fit.json", "points.csv"


def write_fit(folder: Path, tree: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write `fit.json` and `points.csv`.

    Args:
        folder: made where it is not there.
        tree: what `fit_table` gave.

    Returns:
        The paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(tree["points"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(tree["points"])
    write_file(folder / FIT, json.dumps(tree, allow_nan=False, indent=1) + "\n")
    write_file(folder / POINTS, text.getvalue())
    return folder / FIT, folder / POINTS
