"""The command that fits a scaling law to a table of finished runs."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, add_json, answer, table, warn

if TYPE_CHECKING:
    from rich.table import Table

_CONSTANTS = ("E", "A", "alpha", "B", "beta", "a", "b")
_CURVES = (("L(C)", "compute"), ("L(D)", "data"), ("L(N)", "parameters"))


def add(verbs: Any) -> None:
    """The verb `fit` of `sweep`."""
    text = (
        "fit L = E + A N^-alpha + B D^-beta to a table of finished runs. Every constant has an interval; loss against "
        "compute, tokens and size, isoFLOP parabolas, the envelope, the error of predicting the largest run, runs that are "
        "off and ladders that do not fall are told with it (docs/scaling.md). A table that tells no law is refused."
    )
    examples = (
        "swiftv2 sweep fit table.csv --parameters parameters --tokens tokens --compute flops --loss loss --out law",
        'swiftv2 sweep fit figure4.csv --parameters "Model Size" --flops "Training FLOP" --loss loss --drop-highest-losses 5',
        "swiftv2 sweep fit table.csv --tokens tokens --unique unique_tokens --json",
    )
    parser = add_command(verbs, "fit", _fit, text, examples)
    add_json(parser)
    parser.add_argument("table", type=Path, help="CSV with a line of titles, or JSON, such as `sweep collect` writes")
    parser.add_argument("--parameters", metavar="COL", default="parameters", help="column of model sizes (default: parameters)")
    parser.add_argument("--tokens", metavar="COL", help="column of tokens seen in training")
    parser.add_argument("--flops", metavar="COL", help="column of training FLOPs, instead of --tokens: then D = FLOPs / 6N")
    parser.add_argument("--loss", metavar="COL", default="loss", help="column of held-out losses (default: loss)")
    parser.add_argument("--compute", metavar="COL", help="column of training FLOPs beside --tokens; without it they are 6ND")
    parser.add_argument("--unique", metavar="COL", help="column of tokens that differ, for the law of repeated data")
    parser.add_argument("--drop-highest-losses", type=int, default=0, metavar="N", help="leave out the N highest losses")
    parser.add_argument("--delta", type=float, default=1e-3, help="of Huber's loss of log L (default: 1e-3)")
    parser.add_argument("--bootstraps", type=int, default=500, metavar="N", help="draws of the bootstrap (default: 500)")
    parser.add_argument("--level", type=float, default=0.9, help="of the intervals (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write fit.json, points.csv, figures and a page there")


def _fit(arguments: argparse.Namespace) -> int:
    from swiftv2.scaling.fit import Options, fit_table
    from swiftv2.scaling.table import Columns, read_table

    if (arguments.tokens is None) == (arguments.flops is None):
        given = "both are given" if arguments.tokens is not None else "none is given"
        raise UsageError(f"give --tokens COL or --flops COL, one of the two: {given}")
    if arguments.compute is not None and arguments.tokens is None:
        raise UsageError("--compute goes with --tokens; --flops COL alone names the column of FLOPs")
    columns = Columns(
        parameters=arguments.parameters,
        loss=arguments.loss,
        tokens=arguments.tokens,
        flops=arguments.flops or arguments.compute,
        unique=arguments.unique,
    )
    options = Options(
        drop_highest=arguments.drop_highest_losses,
        delta=arguments.delta,
        bootstraps=arguments.bootstraps,
        level=arguments.level,
        seed=arguments.seed,
    )
    options.check()
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out}: a file is there; give a folder")
    tree = fit_table(read_table(arguments.table, columns), options)
    written = [] if arguments.out is None else _write(arguments.out, tree)
    if arguments.json:
        for text in tree["warnings"]:
            warn(text)
    answer(tree, *_lines(tree), *(f"wrote {path}" for path in written), as_json=arguments.json)
    return 0


def _write(folder: Path, tree: Mapping[str, Any]) -> list[Path]:
    """What is kept of a fit: the tree first, for the figures stand on nothing else."""
    from swiftv2.report.scaling import write_page
    from swiftv2.scaling.keep import write_fit

    return [*write_fit(folder, tree), *write_page(folder, tree)]


def _lines(tree: Mapping[str, Any]) -> list["str | Table"]:
    intervals, errors = tree["intervals"], tree["standard_errors"]
    rows = [
        [name, f"{tree[name]:.5g}", f"{intervals[name][0]:.4g} to {intervals[name][1]:.4g}", f"{errors[name]:.2g}"]
        for name in _CONSTANTS
    ]
    level = f"{intervals['level']:.0%}"
    dropped = f", {len(tree['dropped'])} dropped" if tree["dropped"] else ""
    lines: list[str | Table] = [
        f"L = E + A N^-alpha + B D^-beta, {tree['used']} runs{dropped}; N_opt ~ C^a and D_opt ~ C^b where C ~ N D\n",
        table(["", "value", f"{level} interval", "standard error"], rows),
        f"\nobjective {tree['objective']:.6g} (sum of Huber's loss of log L, delta {tree['delta']:g})",
        f"{tree['starts_in_best_basin']} of {tree['starts']} starts end there; noise of a run {tree['noise']:.2%}",
        *(f"{name}: {_curve(tree['curves'][key])}" for name, key in _CURVES),
        f"isoFLOP: {_exponent(tree['isoflop'], 'budgets')}",
        f"envelope: {_exponent(tree['envelope'], 'rows')}",
        f"repeated data: {_repeated(tree['repeated'])}",
        f"largest run left out: {_extrapolation(tree['extrapolation'], level)}",
    ]
    return [*lines, *(f"warning: {text}" for text in tree["warnings"])]


def _curve(tree: Mapping[str, Any]) -> str:
    if "refused" in tree:
        return f"refused: {tree['refused']}"
    constants, (low, high) = tree["constants"], tree["intervals"]["alpha"]
    told = f"{constants['E']:.4g} + {constants['A']:.4g} x^-{constants['alpha']:.4g}"
    return f"{told} (exponent {low:.3g} to {high:.3g}): {tree['note']}"


def _exponent(tree: Mapping[str, Any], items: str) -> str:
    if "refused" in tree:
        return f"refused: {tree['refused']}"
    count = f"{len(tree[items])} {'budgets' if items == 'budgets' else 'runs'}"
    if tree["exponent"] is None:
        return f"{count}; {tree['why']}"
    between = "" if tree["interval"] is None else f" ({tree['interval'][0]:.3g} to {tree['interval'][1]:.3g})"
    return f"N_opt ~ C^{tree['exponent']:.3g}{between} over {count}"


def _repeated(tree: Mapping[str, Any]) -> str:
    if "refused" in tree:
        return f"refused: {tree['refused']}"
    low, high = ("open" if end is None else f"{end:.3g}" for end in tree["interval"])
    return f"R* = {tree['R_star']:.3g} repetitions ({low} to {high}), up to {tree['most_epochs']:.3g} epochs"


def _extrapolation(tree: Mapping[str, Any], level: str) -> str:
    if "refused" in tree:
        return f"refused: {tree['refused']}"
    low, high = tree["interval"]
    return (
        f"predicted {tree['predicted']:.4g} ({level}: {low:.4g} to {high:.4g}), measured {tree['measured']:.4g}: error "
        f"{tree['error']:+.2%}; 'the same as the largest seen' errs by {tree['last_seen_error']:+.2%}"
    )
