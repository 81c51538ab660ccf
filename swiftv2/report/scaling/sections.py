"""What a page tells of a fit in words and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Cell, Content, Number, between, element, listed, number, tabled, warned
from swiftv2.report.scaling.style import shown

Tree = Mapping[str, Any]

_MEANINGS = {
    "E": "loss left with endless parameters and tokens",
    "A": "how much loss too few parameters cost",
    "alpha": "how fast that falls with parameters N",
    "B": "how much loss too few tokens cost",
    "beta": "how fast that falls with tokens D",
    "a": "best parameters grow as C^a",
    "b": "best tokens grow as C^b",
}
_CURVES = {
    "compute": "L(C), loss against compute",
    "data": "L(D), loss against tokens",
    "parameters": "L(N), loss against size",
}
_VERDICTS = {
    "within": "within the budgets of the runs that the law was fitted to",
    "near": "beyond the runs that the law was fitted to, but near",
    "far": "far beyond the runs that the law was fitted to",
}


def heading(fit: Tree) -> list[Content]:
    """Title and what was fitted."""
    dropped = f", {len(fit['dropped'])} left out" if fit["dropped"] else ""
    columns = "; ".join(f"{what}: {column}" for what, column in fit["columns"].items() if column is not None)
    return [
        element("h1", f"Scaling law of {Path(fit['table']).name}"),
        element("p", f"{fit['used']} of {fit['rows']} runs{dropped}. Columns of the table: {columns}.", kind="quiet"),
    ]


def summary(fit: Tree) -> list[Content]:
    """The law in two sentences, and how it stood the test of the largest run."""
    formula = element("code", "L(N, D) = E + A N^-alpha + B D^-beta")
    says = element("p", f"{_fall(fit)} {_split(fit)}", kind="says")
    return [element("h2", "What the law says"), says, element("p", formula, ". ", _tested(fit["extrapolation"], level_of(fit)))]


def level_of(fit: Tree) -> str:
    """Level of the intervals, as `90 %`."""
    return f"{100 * float(fit['intervals']['level']):.3g} %"


def _with_interval(fit: Tree, name: str, level: str = "") -> str:
    return f"{number(float(fit[name]))} ({level}{between(fit['intervals'][name])})"


def _fall(fit: Tree) -> str:
    exponents = {"alpha": "parameters", "beta": "tokens"}
    unshown = [what for name, what in exponents.items() if min(float(fit[name]), float(fit["intervals"][name][0])) <= 0.0]
    if unshown:
        told = ", ".join(f"{name} = {_with_interval(fit, name, f'{level_of(fit)}: ')}" for name in exponents)
        return f"These runs do not show that loss falls with {' or '.join(unshown)}: {told}."
    return (
        f"Loss falls towards E = {_with_interval(fit, 'E', f'{level_of(fit)} interval ')} as models and data grow: what lies "
        f"above it shrinks as N^-alpha in parameters, alpha = {_with_interval(fit, 'alpha')}, and as D^-beta in tokens, "
        f"beta = {_with_interval(fit, 'beta')}."
    )


def _split(fit: Tree) -> str:
    grown = [number(10.0 ** float(fit[name]), 2) for name in ("a", "b")]
    return (
        f"For the lowest loss at a budget of FLOPs C ~ N D, parameters grow as C^a with a = {_with_interval(fit, 'a')} and "
        f"tokens as C^b with b = {_with_interval(fit, 'b')}: ten times the compute for {grown[0]} times the parameters and "
        f"{grown[1]} times the tokens."
    )


def _tested(told: Tree, level: str) -> str:
    if "refused" in told:
        return f"Not tested on the largest run: {told['refused']}."
    low, high = map(float, told["interval"])
    measured, error = float(told["measured"]), float(told["error"])
    inside = "inside" if low <= measured <= high else "outside"
    return (
        f"Tested: fitted without the largest budget, it foretells the largest run ({shown(told['parameters'])} parameters, "
        f"{shown(told['tokens'])} tokens) at {number(told['predicted'])} ({level} interval {between((low, high))}); "
        f"measured is {number(measured)}, {inside} that interval. The error is {100 * error:+.2f} %; that of saying 'the same "
        f"as the largest seen' is {100 * float(told['last_seen_error']):+.2f} %."
    )


def warnings(fit: Tree) -> list[Content]:
    """All that speaks against the fit, in a box that stands out."""
    found = list(fit["warnings"])
    if not found:
        return [element("p", "The fit gave no warnings.", kind="quiet")]
    return [warned(f"{len(found)} warning{'s' * (len(found) > 1)}: read before use", found)]


def constants(fit: Tree) -> list[Content]:
    """Constants with intervals and standard errors."""
    intervals, errors = fit["intervals"], fit["standard_errors"]
    unbounded = set(intervals["open"])
    rows: list[list[Cell]] = []
    for name, meaning in _MEANINGS.items():
        sides = [side for side in ("low", "high") if f"{name} {side}" in unbounded]
        said = f"; not bounded by the runs: {' and '.join(sides)} end" if sides else ""
        value = float(fit[name])
        error = float(errors[name])
        rows.append(
            [
                element("code", name),
                Number(value, number(value, 5)),
                between(intervals[name]) + said,
                Number(error, number(error, 2)),
                meaning,
            ]
        )
    titles = ["constant", "value", f"{level_of(fit)} interval", "standard error", "meaning"]
    return [element("h2", "Constants"), tabled(titles, rows, label="constants of the law")]


def checks(fit: Tree) -> list[Content]:
    """What was found by other ways than the law, or why it could not be."""
    rows: list[list[Cell]] = [[label, *_curve(fit["curves"][key])] for key, label in _CURVES.items()]
    rows.append(["isoFLOP parabolas", *_exponent(fit["isoflop"], "budgets")])
    rows.append(["envelope of the runs", *_exponent(fit["envelope"], "rows")])
    rows.append(["law of repeated data", *_repeated(fit["repeated"])])
    for name, judged in fit["monotone"].items():
        kind = "" if judged["holds"] else "off"
        rows.append([f"loss falls with {name}", element("span", "yes" if judged["holds"] else "no", kind=kind), judged["why"]])
    titles = ["check", "result", "of what, or why not"]
    intro = f"The same runs looked at in other ways; a in them is to be held against the law's {_with_interval(fit, 'a')}."
    return [element("h2", "Cross-checks"), element("p", intro), tabled(titles, rows, label="cross-checks of the law")]


def _refused(tree: Tree) -> list[Cell]:
    return [element("span", "refused", kind="off"), str(tree["refused"])]


def _curve(tree: Tree) -> list[Cell]:
    if "refused" in tree:
        return _refused(tree)
    told = tree["constants"]
    told_intervals = "; ".join(f"{name} {between(ends)}" for name, ends in tree["intervals"].items())
    form = f"{number(told['E'])} + {number(told['A'])} x^-{number(told['alpha'])}"
    return [form, f"{tree['note']}. Intervals: {told_intervals}"]


def _exponent(tree: Tree, items: str) -> list[Cell]:
    if "refused" in tree:
        return _refused(tree)
    count = f"{len(tree[items])} {'budgets' if items == 'budgets' else 'runs'}"
    without = [f"{number(one['flops'], 3)} FLOPs: {one['why']}" for one in tree.get("budgets", ()) if one["why"]]
    said = "; ".join([count, *([tree["why"]] if tree["why"] else []), *without])
    if tree["exponent"] is None:
        return [element("span", "no exponent", kind="off"), said]
    ends = "" if tree["interval"] is None else f" ({between(tree['interval'])})"
    return [f"a = {number(tree['exponent'])}{ends}", said]


def _repeated(tree: Tree) -> list[Cell]:
    if "refused" in tree:
        return _refused(tree)
    low, high = ("not bounded" if end is None else number(end, 3) for end in tree["interval"])
    most = number(tree["most_epochs"], 3)
    said = f"after so many repetitions tokens have given 63 % of what they ever give; runs saw up to {most} epochs"
    return [f"R* = {number(tree['R_star'], 3)} ({low} to {high})", said]


def points(fit: Tree) -> list[Content]:
    """All runs, those that are off with the reason, and those that were left out."""
    named = any(point["name"] for point in fit["points"])
    titles = ["row", *(["name"] if named else []), "parameters", "tokens", "FLOPs", "loss", "by the law", "residual", "off"]
    rows = []
    for point in fit["points"]:
        residual = 100 * float(point["residual"])
        cells: list[Cell] = [Number(point["row"], str(point["row"]))]
        cells += [str(point["name"] or "")] if named else []
        cells += [Number(point[key], shown(point[key])) for key in ("parameters", "tokens")]
        cells += [Number(point["flops"], number(point["flops"], 3))]
        cells += [Number(point[key], number(point[key])) for key in ("loss", "fitted")]
        cells += [Number(residual, f"{residual:+.2f} %"), element("span", point["why"] or "", kind="off")]
        rows.append(cells)
    intro = "Residuals are of the logarithm of the loss. Titles sort."
    made: list[Content] = [element("h2", "Runs"), element("p", intro), tabled(titles, rows, label="runs", sortable=True)]
    if fit["dropped"]:
        made.append(element("h3", "Left out of the fit"))
        made.append(listed([f"row {one['row']}: {one['why']}" for one in fit["dropped"]]))
    return made


def prediction(tree: Tree) -> list[Content]:
    """What a prediction advises for a budget."""
    far, budget = tree["extrapolation"], tree["budget"]
    rows: list[list[Cell]] = [["budget", f"{number(budget['flops'], 3)} FLOPs"]]
    for name, digits in (("parameters", 3), ("tokens", 3), ("loss", 4)):
        ends = tree[f"{name}_interval"]
        rows.append([f"best {name}" if name != "loss" else "loss", number(tree[name], digits) + _ends(ends, digits)])
    rows.append(["size to train", str(tree["size"])])
    rows.append(["learning rate", number(tree["lr"], 3)])
    for title, value, unit in (
        ("nodes", tree["nodes"], ""),
        ("hours", tree["hours"], " h"),
        ("node-hours", budget["node_hours"], " h"),
        ("configuration", tree["config"], ""),
    ):
        if value is not None:
            rows.append([title, value if isinstance(value, str) else f"{value:,.4g}{unit}"])
    rows.append(["extrapolation", f"{number(far['factor'], 3)} times the largest run's budget: {_VERDICTS[far['verdict']]}"])
    made: list[Content] = [element("h2", "Prediction")]
    made += [warned("Warnings of the prediction", list(tree["warnings"]))] if tree["warnings"] else []
    return [*made, tabled(["what", "advised"], rows, label="prediction")]


def _ends(ends: Sequence[float] | None, digits: int) -> str:
    return "" if ends is None else f" ({between(ends, digits)})"


def method(fit: Tree) -> list[Content]:
    """How the numbers were made."""
    intervals, unit = fit["intervals"], fit["flops_per_parameter_token"]
    assumed = "assumed, since the table has tokens or FLOPs alone" if unit["assumed"] else "the median over the runs"
    spread = f"{number(unit['lowest'], 3)} to {number(unit['highest'], 3)} over the runs"
    ends = f"{fit['starts_in_best_basin']} of {fit['starts']} starts end there"
    drawn = f"{intervals['draws']} draws, {intervals['bootstrap']}"
    items = [
        f"Fit: least sum of Huber's loss of the log residuals (delta {fit['delta']:g}), {fit['objective']:.6g}; {ends}.",
        f"Intervals of {level_of(fit)}: {intervals['method']}.",
        f"Standard errors and bands: {drawn}. Intervals are not made of draws: the two need not agree to the last digit.",
        f"Noise of a run about the law: {100 * float(fit['noise']):.2g} % of its loss.",
        f"FLOPs a parameter and token: {number(unit['value'], 3)}, {assumed}; {spread}.",
        f"Table: {fit['table']}.",
    ]
    return [element("h2", "Method"), listed(items)]


def refused_figure(title: str, why: str) -> Element:
    """In the place of a figure that cannot be drawn."""
    return element("figure", element("div", element("strong", f"{title}: refused"), element("p", why), kind="warning"))
