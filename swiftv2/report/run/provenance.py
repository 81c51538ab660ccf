"""What ran: settings against their preset, code, packages, machines, attempts, and the commands to do it again."""

import shlex
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import yaml

from swiftv2.config.base import Config
from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import describe, dump, load, presets_root
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import SwiftError
from swiftv2.report.markup import Cell, Content, element, tabled, warned
from swiftv2.report.run.reading import UNREADABLE, Run, why_not
from swiftv2.report.run.words import counted, facts, listing, moment, section
from swiftv2.report.tracked import missing, read_neptune

_RECIPES: Mapping[str, type[Config]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_PLACES = {"run.dir", "data.store", "task.data.store"}
"""Settings that no preset can know."""
_MISSING = object()


class Preset(NamedTuple):
    """The configuration that the command named.

    Attributes:
        name: as the command gave it.
        settings: flat, by dotted key, as they are without the overrides of the command; None where it cannot be read.
        problem: why it cannot.
    """

    name: str
    settings: Mapping[str, Any] | None
    problem: str | None


def provenance_section(run: Run) -> Element:
    """Differences, code, machines, commands."""
    parts: list[Content] = [element("h3", "Settings that differ from the preset"), *_differences(run)]
    parts += [element("h3", "Code and machines"), facts(_machines(run))]
    attempts = _attempts(run)
    parts += [attempts] if attempts is not None else []
    for name, made in (("trackers", _trackers), ("Neptune's files", _neptune)):
        try:
            parts += made(run)
        except UNREADABLE as error:
            parts.append(warned("What trackers have cannot be told", [why_not(name, error, run.path)]))
    parts += _commands(run)
    settings = yaml.safe_dump(dict(run.settings), sort_keys=False) if run.settings else "config.yaml cannot be read\n"
    parts.append(element("details", element("summary", "The whole configuration"), element("pre", settings, tabindex="0")))
    return section("provenance", "What ran", *parts)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def command_of(run: Run) -> list[str]:
    """Words of the command; empty where it is not known."""
    words = run.environment.get("command")
    return [str(word) for word in words] if isinstance(words, list) else []


def preset_of(run: Run) -> Preset | None:
    """The configuration file of the command and what it says now; None where the command is not known."""
    words = command_of(run)
    recipe = next((word for word in words if word in _RECIPES), None)
    if recipe is None:
        return None
    named = [word for word in words[words.index(recipe) + 1 :] if word.endswith((".yaml", ".yml")) and "=" not in word]
    if not named:
        return None
    cls = _RECIPES[recipe]
    found = _file(named[0], run)
    if found is None:
        return Preset(named[0], None, "the file is not there any more")
    settings = flat(run.settings)
    known = {key: value for key, value in settings.items() if key in _PLACES}
    try:
        config = load(cls, found, [f"{key}={json_like(value)}" for key, value in known.items()])
    except SwiftError as error:
        return Preset(named[0], None, str(error))
    except OSError as error:
        return Preset(named[0], None, error.strerror or "it cannot be read")
    return Preset(named[0], flat(yaml.safe_load(dump(config))), None)


def json_like(value: Any) -> str:
    """A value as one word of YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)).removesuffix("...\n").strip()


def _file(name: str, run: Run) -> Path | None:
    folder = Path(str(run.environment.get("folder", ".")))
    parts = Path(name).parts
    shipped = [presets_root().joinpath(*parts[place + 1 :]) for place, part in enumerate(parts) if part == "configs"]
    return next((path for path in (folder / name, *shipped) if path.is_file()), None)


def _differences(run: Run) -> list[Element]:
    preset = preset_of(run)
    now = flat(run.settings)
    if not now:
        return [element("p", "config.yaml cannot be read.")]
    if preset is None or preset.settings is None:
        why = f"{preset.name}: {preset.problem}" if preset is not None else "the command names no configuration file"
        base, against = (
            _defaults(run),
            f"The preset cannot be looked at ({why}); these differ from the defaults of the program.",
        )
        title = "default"
    else:
        base, against = dict(preset.settings), f"Against {preset.name} as it is now."
        title = "preset"
    docs = {key: text for cls in _RECIPES.values() for key, _, text in describe(cls)}
    rows: list[list[Cell]] = []
    for key in sorted(base | now if preset is not None and preset.settings is not None else now):
        before, after = base.get(key, _MISSING), now.get(key, _MISSING)
        # Of a setting that came later than the run there is nothing to say.
        if before != after and after is not _MISSING and key not in _PLACES:
            rows.append([element("code", key, kind="key"), _value(before), _value(after), docs.get(key, "")])
    if not rows:
        return [element("p", against, kind="quiet"), element("p", "None: it ran as the preset says.")]
    return [
        element("p", against, kind="quiet"),
        tabled(("setting", title, "this run", "what it is"), rows, label="settings that differ", sortable=len(rows) > 8),
    ]


def _defaults(run: Run) -> dict[str, Any]:
    cls = FinetuneConfig if "task" in run.settings else PretrainConfig
    found: dict[str, Any] = {}
    for key, default, _ in describe(cls):
        if default != "required":
            value = yaml.safe_load(default)
            found |= flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def _value(value: Any) -> Cell:
    return element("span", "\u2013", kind="quiet") if value is _MISSING else element("code", json_like(value))


def _machines(run: Run) -> list[tuple[str, Content]]:
    get = run.environment.get
    git, packages = _mapping(get("git")), _mapping(get("packages"))
    shown: list[tuple[str, Content]] = []
    if get("swiftv2"):
        shown.append(("swiftv2", str(get("swiftv2"))))
    if git.get("commit"):
        changed = ", with changes that were not committed" if git.get("changed") else ""
        shown.append(("commit", element("span", element("code", str(git["commit"])[:12]), changed)))
    if get("python"):
        shown.append(("Python", str(get("python"))))
    shown += [(name, str(version)) for name, version in packages.items() if version]
    if get("world_size"):
        shown.append(("ranks", f"{get('world_size')} on {get('device')}, {get('launcher')}"))
    for key, name in (("host", "host"), ("platform", "system"), ("slurm_job", "Slurm job")):
        if get(key):
            shown.append((name, str(get(key))))
    return shown or [("environment", "environment.json is missing or cannot be read")]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _attempts(run: Run) -> Element | None:
    starts = run.told("start")
    if len(starts) < 2:
        return None
    rows: list[list[Cell]] = []
    for row in starts:
        steps = [int(one["step"]) for one in run.metrics if one.get("attempt") == row.get("attempt")]
        span = f"{min(steps):,} to {max(steps):,}" if steps else "none that still counts"
        when = moment(float(row["time"])) if isinstance(row.get("time"), int | float) else ""
        rows.append(
            [
                str(row.get("attempt", "")),
                when,
                f"{row.get('world_size', '')}",
                str(row.get("launcher", "")),
                str(row.get("host", "")),
                span,
            ]
        )
    table = tabled(("attempt", "began (UTC)", "ranks", "launcher", "host", "steps"), rows, label="attempts")
    changed = [
        f"{row.get('key')}: {row.get('old')} to {row.get('new')} (attempt {row.get('attempt')})"
        for row in run.told("config_changed")
    ]
    note = [element("p", f"Changed on the way: {'; '.join(changed)}.")] if changed else []
    return element("div", element("h3", counted(len(starts), "attempt")), table, *note)


def _trackers(run: Run) -> list[Element]:
    """Where else its numbers went, and whether all of them arrived."""
    told = run.document("trackers.json")
    trackers = _mapping((told or {}).get("trackers"))
    if not trackers:
        return []
    rows: list[list[Cell]] = []
    for name, one in trackers.items():
        get = _mapping(one).get
        numbers = [str(get(key, "")) for key in ("sent", "dropped", "errors")]
        rows.append([name, str(get("mode", "")), *numbers, str(get("problem") or "")])
    table = tabled(("tracker", "mode", "sent", "dropped", "errors", "last problem"), rows, label="trackers")
    note = element("p", "The run calls itself ", element("code", str((told or {}).get("id", ""))), " there.", kind="quiet")
    return [element("h3", "Trackers"), note, table]


def _neptune(run: Run) -> list[Element]:
    """Whether Neptune's offline files hold what the metrics hold."""
    folder = run.path / "neptune"
    if not folder.is_dir():
        return []
    offline = read_neptune(folder)
    lacking = missing(offline, run.path)
    kept = sum(len(values) for values in offline.series.values())
    says = f"Neptune's offline files hold {counted(kept, 'value')} of {counted(len(offline.series), 'series', 'series')}; "
    if lacking:
        names = listing(sorted(lacking)[:3])
        says += f"{counted(sum(lacking.values()), 'value')} of metrics.jsonl are not there or differ, of {names}."
    else:
        says += "all values of metrics.jsonl are there."
    says += f" {counted(len(offline.damaged), 'line')} of them cannot be read." if offline.damaged else ""
    return [element("p", says, kind="quiet")]


def _commands(run: Run) -> list[Content]:
    script = _script(run)
    # Names of runs on one page may differ in signs alone that no id can have.
    mark = f"{zlib.crc32(str(run.path).encode()):08x}"
    parts: list[Content] = [element("h3", "The same again")]
    fresh = fresh_command(run, script)
    if fresh is not None:
        git = run.environment.get("git")
        changed = isinstance(git, Mapping) and git.get("changed")
        note = "The code had changes that were not committed: it cannot be had back exactly. " if changed else ""
        parts += [element("p", f"{note}From the beginning, in a new run directory:"), *copied(f"fresh-{mark}", fresh)]
    if script is not None:
        parts += [
            element("p", "To go on with this run (", element("code", "resume.sh"), "):"),
            *copied(f"resume-{mark}", script),
        ]
    if fresh is None and script is None:
        parts.append(element("p", "Neither resume.sh nor environment.json can be read, so the command is not known."))
    return parts


def _script(run: Run) -> str | None:
    try:
        return (run.path / "resume.sh").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def fresh_command(run: Run, script: str | None) -> str | None:
    """Lines that do the run again from the beginning in a directory of its own; None where the command is not known."""
    git = run.environment.get("git")
    commit = git.get("commit") if isinstance(git, Mapping) else None
    new = f"run.dir={run.setting('run.dir', run.path)}-again"
    lines = (script or "").splitlines()
    starts = [line for line in lines if line.startswith("exec ")]
    if starts:
        try:
            words = shlex.split(starts[-1].removeprefix("exec "))
        except ValueError:
            return None
        before = [line for line in lines if line and not line.startswith(("exec ", "#"))]
    elif command_of(run):
        words = command_of(run)
        before = [f"cd {shlex.quote(str(run.environment['folder']))}"] if run.environment.get("folder") else []
    else:
        return None
    places = [place for place, word in enumerate(words) if word.startswith("run.dir=")]
    words = [new if place in places else word for place, word in enumerate(words)] + ([] if places else [new])
    checkout = [f"git checkout {commit}"] if commit else []
    return "\n".join([*before[:1], *checkout, *before[1:], shlex.join(words)])


def copied(name: str, text: str) -> Sequence[Element]:
    """Lines with a button that copies them."""
    identity = "".join(letter if letter.isalnum() else "-" for letter in name)
    button = element("button", "copy", type="button", kind="tool", data_copies=identity)
    return [element("div", element("pre", text, id=identity, tabindex="0"), button, kind="copied")]
