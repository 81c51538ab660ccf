"""Results of fine-tuning runs and baselines, found below folders and compared on the same subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftv2.downstream.compare import compare
from swiftv2.downstream.predictions import Parts, read
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.recipes.probe import PREDICTIONS, RESULT

REFERENCES = ("connectivity", "majority")
"""Methods that others are compared with where nobody says with which, the first that is there."""


@dataclass(frozen=True)
class Source:
    """Where results are: a folder, or folders below it; `name` stands for the names that they give themselves."""

    folder: Path
    name: str | None = None


def compare_folders(
    sources: Sequence[Source],
    reference: str | None = None,
    *,
    ceilings: Path | None = None,
    groups: Mapping[str, str] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Read every `result.json` with the predictions beside it, and compare (`downstream.compare.compare`).

    Args:
        sources: where they are.
        reference: method from which the others differ; the first of `REFERENCES` that is there when None.
        ceilings: JSON with the oracle of each target, such as a generated cohort's `traits.json`.
        groups: by unit what is drawn as a whole, such as its family.
        bootstrap: draws of test subjects.
        seed: of the draws.

    Raises:
        UsageError: nothing is found, nothing to compare with, or results that do not belong together.
        SwiftError: a file is damaged.
    """
    results: list[dict[str, Any]] = []
    predictions: list[Parts | None] = []
    for source in sources:
        found = sorted(source.folder.rglob(RESULT))
        if not found:
            raise UsageError(f"{source.folder}: no {RESULT} there or below it; give folders of finished runs or baselines")
        for path in found:
            tree = read_json(path)
            if not {"task", "name", "split", "targets", "subjects", "seed"} <= tree.keys():
                raise SwiftError(f"{path}: not a result of a downstream task")
            results.append(tree if source.name is None else tree | {"name": source.name})
            known = path.with_name(PREDICTIONS)
            predictions.append(_predictions(known, tree) if known.exists() else None)
    names = list(dict.fromkeys(str(tree["name"]) for tree in results))
    chosen = reference or next((name for name in REFERENCES if name in names), None)
    if chosen is None:
        raise UsageError(f"none of {', '.join(REFERENCES)} is among {', '.join(names)}: say --reference NAME")
    oracle = None if ceilings is None else read_json(ceilings)
    return compare(results, predictions, chosen, ceilings=oracle, groups=groups, bootstrap=bootstrap, seed=seed)


def _predictions(path: Path, result: Mapping[str, Any]) -> Parts:
    """Predictions beside a result, which must have rows for whatever it says was judged on test subjects."""
    found = read(path)
    told = [column for column, target in result["targets"].items() if target["test"] is not None]
    lacking = [column for column in told if column not in found.get("test", {})]
    if lacking:
        raise SwiftError(
            f"{path}: no rows of test subjects for {', '.join(lacking)}, which {RESULT} beside it judges: make both anew, or "
            "take the table away (then there are no bootstrap intervals)"
        )
    return found
