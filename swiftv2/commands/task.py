"""The commands about downstream tasks: what one comes to, its baselines and probes, and methods beside each other."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.commands.pretrain import OVERRIDES
from swiftv2.config.load import find_preset, load
from swiftv2.config.task import TaskConfig
from swiftv2.errors import UsageError
from swiftv2.terminal import Parser, Shown, add_command, add_json, answer, table

if TYPE_CHECKING:
    from rich.table import Table

    from swiftv2.recipes.probe import ProbeOptions

_SHOWN = {"classification": "auroc", "regression": "pearson_r"}
"""Metric that answers show of each kind of target; files hold all."""


def add(verbs: Any) -> None:
    """The verbs of `task`."""
    _add_show(verbs)
    _add_baselines(verbs)
    _add_probe(verbs)
    _add_compare(verbs)


def _add_show(verbs: Any) -> None:
    text = (
        "show what a task comes to in its store. Labels that are there and missing, classes, sizes of all splits; nobody, and "
        "no family, is in two parts of one, or the command fails."
    )
    examples = ("swiftv2 task show hcp_sex data.store=hcp.zarr", "swiftv2 task show my_task.yaml split.kind=site --json")
    parser = add_command(verbs, "show", _show, text, examples)
    add_json(parser)
    _add_task(parser)


def _add_baselines(verbs: Any) -> None:
    text = (
        "fit the baselines that stand beside every result, on the same splits. Functional connectivity, mean image, motion, "
        "covariates, brain mask, mean or majority, and embeddings of folders that are named: logistic or ridge regression, "
        "its penalty chosen on inner folds of the training subjects. With --permutations, AUROC for permuted labels too."
    )
    examples = (
        "swiftv2 task baselines hcp_sex baselines data.store=hcp.zarr",
        "swiftv2 task baselines generated baselines --embeddings untrained=emb/untrained --embeddings frozen=emb/pretrained",
        "swiftv2 task baselines generated baselines --methods motion --permutations 50 --target null",
    )
    parser = add_command(verbs, "baselines", _baselines, text, examples)
    _add_probing(parser)
    parser.add_argument("--methods", metavar="NAME,...", help="only these baselines and embeddings; all when not given")
    parser.add_argument(
        "--atlas",
        default="seitzman_2018",
        help="of functional connectivity: seitzman_2018, power_2011, dosenbach_2010 (coordinates that nilearn ships), a NIfTI "
        "file of labels in the store's space, or none (default: seitzman_2018)",
    )
    parser.add_argument(
        "--radius", type=float, metavar="MM", help="of the spheres around coordinates (default: the atlas' own)"
    )
    parser.add_argument("--band", metavar="LOW,HIGH", help="frequencies in Hz that connectivity keeps (default: all)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where features of runs are kept (default: OUT/features)")


def _add_probe(verbs: Any) -> None:
    text = (
        "fit linear probes on embeddings, as baselines are fitted. The encoder is not looked at, so that probes of several "
        "encoders on one task differ in nothing else."
    )
    examples = ("swiftv2 task probe hcp_sex probes --embeddings frozen=emb/pretrained --embeddings stage2=emb/pretrained#2",)
    parser = add_command(verbs, "probe", _baselines, text, examples)
    _add_probing(parser)
    parser.set_defaults(methods=None, atlas="none", radius=None, band=None, cache=None, only_embeddings=True)


def _add_probing(parser: Parser) -> None:
    add_json(parser)
    _add_task(parser, "out", "folder of the results: OUT/NAME/split_INDEX/result.json and predictions.csv")
    parser.add_argument(
        "--embeddings",
        metavar="NAME=FOLDER[#STAGE]",
        action="append",
        default=[],
        help="folder that `swiftv2 embed` wrote, and what its result is called; #STAGE takes one stage of it",
    )
    parser.add_argument("--splits", metavar="INDEX,...", help="numbers of the splits, from 0 (default: all)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="draws of subjects (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of inner folds, draws and permutations (default: 0)")
    parser.add_argument("--permutations", type=int, metavar="N", help="learn and judge labels permuted so often, too")
    parser.add_argument("--target", metavar="COLUMN", help="the target whose labels are permuted")
    parser.add_argument("--within-sites", action="store_true", help="labels are exchanged within a site only")


def _add_task(parser: Parser, *more: str) -> None:
    parser.add_argument("task", help="YAML file or preset of configs/task")
    if more:
        parser.add_argument(more[0], type=Path, help=more[1])
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDES)


def _add_compare(verbs: Any) -> None:
    text = (
        "compare methods on the same subjects and splits. Reads every result.json below the folders, of baselines and of "
        "fine-tuning runs; tells means over splits and paired differences from a reference, each with its interval."
    )
    examples = (
        "swiftv2 task compare baselines runs",
        "swiftv2 task compare baselines pretrained=runs/full scratch=runs/scratch --reference scratch --out report",
    )
    parser = add_command(verbs, "compare", _compare, text, examples)
    add_json(parser)
    parser.add_argument("folders", nargs="+", metavar="[NAME=]DIR", help="folders of results; NAME stands for their own names")
    parser.add_argument("--reference", metavar="NAME", help="method that others are compared with (default: connectivity)")
    parser.add_argument(
        "--task", metavar="TASK", help="draw whole families of this task (its YAML or preset) for the intervals"
    )
    parser.add_argument(
        "--ceilings", type=Path, metavar="JSON", help="oracles of the targets: a generated cohort's traits.json"
    )
    parser.add_argument("--metric", metavar="NAME", help="that is shown (default: auroc of classes, pearson_r of numbers)")
    parser.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="draws of test subjects (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write comparison.json and forest.svg, forest.png there")


def _config(arguments: argparse.Namespace) -> TaskConfig:
    return load(TaskConfig, find_preset("task", arguments.task), arguments.overrides)


def _show(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    from swiftv2.recipes.task_facts import describe_task

    tree = describe_task(config)
    several = f", {tree['families_of_several']} families of several" if tree["families_of_several"] else ""
    sites = f", {len(tree['sites'])} sites" if tree["sites"] else ""
    whole = "subject" if config.split.unit == "subject" else "run"
    answer(
        tree,
        f"task {tree['task']} on {tree['store']} (version {tree['store_version']}): {tree['subjects']} subjects{several}{sites}"
        f", {tree['runs']} runs of {tree['minutes_per_run']:.1f} minutes\n",
        table(
            ["target", "kind", "known", "missing", "values"], [_target_row(*one) for one in tree["targets"].items()], words=2
        ),
        f"\n{len(tree['splits'])} splits of {config.split.unit}s ({config.split.kind}), {next(iter(tree['targets']))} of each "
        "part in brackets\n",
        table(["split", "train", "val", "test", "unassigned"], [_split_row(one) for one in tree["splits"]]),
        f"\nno {whole}{' or family' if whole == 'subject' and config.split.families else ''} is in two parts of a split",
        as_json=arguments.json,
    )
    return 0


def _target_row(column: str, tree: Mapping[str, Any]) -> list[str]:
    return [column, tree["kind"], f"{tree['known']} {tree['of']}", str(tree["missing"]), _values(tree)]


def _split_row(tree: Mapping[str, Any]) -> list[str]:
    first = next(iter(tree["targets"].values()))
    return [str(tree["index"]), *(f"{tree[part]} ({_values(first[part])})" for part in first), str(tree["unassigned"])]


def _values(tree: Mapping[str, Any]) -> str:
    if "classes" in tree:
        return ", ".join(f"{name} {count}" for name, count in tree["classes"].items())
    return "none" if tree["mean"] is None else f"{tree['mean']:.3g} +- {tree['std']:.2g}"


def _baselines(arguments: argparse.Namespace) -> int:
    config, options = _config(arguments), _options(arguments)
    if (arguments.permutations is None) != (arguments.target is None):
        raise UsageError("--permutations N and --target COLUMN go together")
    if arguments.permutations is not None and arguments.permutations < 1:
        raise UsageError(f"--permutations {arguments.permutations}: take 1 or more")
    from swiftv2.recipes.probe import permutations, probe

    with Shown("runs", shown=not arguments.json) as shown:

        def tell(what: str, done: int, total: int) -> None:
            shown.update(done, total, note=what)

        done = probe(config, arguments.out, options, tell)
        permuted = {}
        if arguments.permutations is not None:
            within = arguments.within_sites
            permuted = permutations(
                config, arguments.out, arguments.target, arguments.permutations, options, within_sites=within, tell=tell
            )
    from swiftv2.recipes.probe import summary

    means = summary(done.results)
    tree = {
        "results": [str(path) for path in done.results],
        "means": means,
        "left_out": done.left_out,
        "about": done.about,
        "permutations": permuted,
    }
    columns = list(next(iter(means.values())))
    rows = [[name, *(_number(found[column]["mean"]) for column in columns)] for name, found in means.items()]
    answer(
        tree,
        "mean over splits, test subjects: AUROC of classes, r of numbers (- where it is not defined)\n",
        table(["", *columns], rows),
        *(f"\n{name}: {text}" for name, text in done.about.items()),
        *(f"\nleft out {name}: {reason}" for name, reason in done.left_out.items()),
        *(f"\n{_permuted(name, found)}" for name, found in permuted.items()),
        f"\nresults are in {arguments.out}; `swiftv2 task compare {arguments.out}` tells differences and intervals",
        as_json=arguments.json,
    )
    return 0


def _permuted(name: str, tree: Mapping[str, Any]) -> str:
    error = "" if tree["error"] is None else f" +- {tree['error']:.3f}"
    return (
        f"{name}, {tree['target']} permuted {tree['count']} times: mean AUROC {tree['mean']:.3f}{error} "
        f"({tree['low']:.3f} to {tree['high']:.3f}); true labels {tree['observed']:.3f}, p = {tree['p']:.3g}"
    )


def _options(arguments: argparse.Namespace) -> "ProbeOptions":
    from swiftv2.recipes.feature_sets import FeatureOptions
    from swiftv2.recipes.probe import ProbeOptions

    embeddings: dict[str, str] = {}
    for word in arguments.embeddings:
        name, equals, folder = word.partition("=")
        if not equals or not folder or not name.replace("_", "").replace("-", "").isalnum() or name in embeddings:
            raise UsageError(f"--embeddings {word}: write NAME=FOLDER, each name once, of letters, digits, - and _")
        embeddings[name] = folder
    only = getattr(arguments, "only_embeddings", False)
    if only and not embeddings:
        raise UsageError("give at least one --embeddings NAME=FOLDER")
    methods = tuple(embeddings) if only else None if arguments.methods is None else tuple(arguments.methods.split(","))
    if arguments.bootstrap < 0 or arguments.seed < 0:
        raise UsageError("--bootstrap and --seed take whole numbers from 0 on")
    cache = arguments.out / "features" if arguments.cache is None and not only else arguments.cache
    features = FeatureOptions(methods, arguments.atlas, arguments.radius, _band(arguments.band), embeddings, cache)
    return ProbeOptions(features, _indices(arguments.splits), arguments.bootstrap, arguments.seed)


def _band(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high:
        raise UsageError(f"--band {text}: write LOW,HIGH in Hz, such as 0.01,0.1")
    return low, high


def _indices(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--splits {text}: write numbers from 0 on, such as 0,1,2") from error


def _compare(arguments: argparse.Namespace) -> int:
    from swiftv2.downstream.metrics import CLASSIFICATION, REGRESSION

    if arguments.metric is not None and arguments.metric not in {*CLASSIFICATION, *REGRESSION}:
        names = dict.fromkeys([*CLASSIFICATION, *REGRESSION])
        raise UsageError(f"--metric {arguments.metric}: there are {', '.join(names)}")
    from swiftv2.recipes.comparison import Source, compare_folders

    sources = []
    for word in arguments.folders:
        name, equals, folder = word.partition("=")
        sources.append(Source(Path(folder), name) if equals and not Path(word).exists() else Source(Path(word)))
    tree = compare_folders(
        sources,
        arguments.reference,
        ceilings=arguments.ceilings,
        groups=_families(arguments.task),
        bootstrap=arguments.bootstrap,
        seed=arguments.seed,
    )
    shown = dict.fromkeys(_SHOWN, arguments.metric) if arguments.metric else _SHOWN
    written = [] if arguments.out is None else _write(arguments.out, tree, shown)
    answer(tree, *_compared(tree, shown), *(f"\nwrote {path}" for path in written), as_json=arguments.json)
    return 0


def _families(task: str | None) -> dict[str, str] | None:
    if task is None:
        return None
    from swiftv2.data.samples.splits import PARTS
    from swiftv2.recipes.task import open_task

    data = open_task(load(TaskConfig, find_preset("task", task)))
    found = {key: group for part in PARTS for key, group in data.together(data.cut(part)).items()}
    return found or None


def _write(folder: Path, tree: Mapping[str, Any], metrics: Mapping[str, str]) -> list[Path]:
    import json

    from swiftv2.files import write_file
    from swiftv2.report.downstream import draw_forest

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "comparison.json"
    write_file(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")
    return [path, *draw_forest(tree, folder / "forest", metrics)]


def _compared(tree: Mapping[str, Any], shown: Mapping[str, str]) -> Sequence["str | Table"]:
    parts: list[str | Table] = []
    for column, target in tree["targets"].items():
        metric = shown[target["kind"]]
        if metric not in target["metrics"]:
            continue
        ceiling = target["ceiling"] or {}
        oracle = f", oracle {ceiling['oracle']:.3f}" if ceiling.get("metric") == metric else ""
        better = target["metrics"][metric]["better"]
        rows = [_compared_row(name, one) for name, one in target["metrics"][metric]["methods"].items()]
        parts.append(f"\n{column}: {metric} ({better} is better{oracle}) over {len(target['splits'])} splits\n")
        parts.append(table(["", "mean", "test subjects", f"less {tree['reference']}", "test subjects", "retrained"], rows))
    parts.append(
        f"\n{tree['level']:.0%} intervals: over test subjects (bootstrap); over training and test subjects (corrected t)"
    )
    return parts


def _compared_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    difference = entry["difference"]
    less = ["", "", ""]
    if difference is not None:
        less = [_number(difference["mean"], sign=True), _between(difference["bootstrap"]), _between(difference["corrected_t"])]
    return [name, _number(entry["mean"]), _between(entry["bootstrap"]), *less]


def _between(interval: Mapping[str, Any] | None) -> str:
    if interval is None or interval["low"] is None:
        return "-"
    return f"{interval['low']:.3f} to {interval['high']:.3f}"


def _number(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"
