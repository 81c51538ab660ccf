"""From YAML files and `key=value` overrides to checked configurations, and back to YAML."""

import difflib
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from swiftv2.config.base import Config
from swiftv2.config.model import ModelConfig
from swiftv2.errors import UsageError

Tree = dict[str, Any]
_TAKES = {
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} on",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
    "finite_number": "a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
    "path_type": "a path",
    **dict.fromkeys(("list_type", "tuple_type"), "a list, such as [1, 2]"),
    **dict.fromkeys(("model_type", "dict_type"), "keys with values, such as {{key: value}}"),
    "too_long": "a list of {max_length} at most",
    "too_short": "a list of {min_length} at least",
}
"""What a key takes, by pydantic's name of the problem, in words of YAML rather than of Python."""
_SHOWN_CHARACTERS = 60
PRESETS = ("model", "task")
"""Keys whose value may be the name of a preset: of `configs/<key>`."""
T = TypeVar("T", bound=Config)


def presets_root() -> Path:
    """Folder of the shipped presets: `configs/` of the checkout, or of the installed package's shared data."""
    checkout = Path(__file__).resolve().parents[2] / "configs"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data")) / "share" / "swiftv2" / "configs"


def read_yaml(path: Path) -> Tree:
    """Read a YAML mapping safely.

    Raises:
        UsageError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{path}: cannot be read ({reason}); give a YAML configuration file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def find_preset(kind: str, name: str) -> Path:
    """Path of `configs/<kind>/<name>.yaml`, or `name` itself where it is a file.

    Raises:
        UsageError: neither exists; the message names the presets that do.
    """
    if Path(name).is_file():
        return Path(name)
    folder = presets_root() / kind
    path = folder / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    raise UsageError(f"there is no file or {kind} preset named {name!r}; presets are {', '.join(known)}")


def load_model(name: str) -> ModelConfig:
    """The model preset of that name (or YAML file)."""
    path = find_preset("model", name)
    return build(ModelConfig, read_yaml(path), where=str(path))


def load(cls: type[T], path: Path, overrides: Iterable[str] = ()) -> T:
    """Read a configuration file, apply `key=value` overrides and check the result.

    Args:
        cls: class of the whole configuration.
        path: a YAML file; a `model:` or `task:` entry may be the name of a preset, or a mapping with `preset:`.
        overrides: `section.key=value` words; the value is YAML.

    Returns:
        The checked configuration.

    Raises:
        UsageError: anything is unknown, missing or out of range; one line that names file and key.
    """
    tree, words = read_yaml(path), tuple(overrides)
    for word in words:
        override(tree, word)
    return build(cls, _expand(tree), str(path), words)


def build(cls: type[T], tree: Mapping[str, Any], where: str, overrides: Iterable[str] = ()) -> T:
    """Check a tree of plain values against a configuration class.

    Args:
        cls: class of the configuration.
        tree: the values.
        where: names their source in errors.
        overrides: words that were put into the tree; the one that set a wrong value is named, too.

    Raises:
        UsageError: one line: source, key, what is wrong with it, and what it takes.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        key, text = _first_problem(cls, error)
        blamed = [word for word in overrides if f"{key}.".startswith(f"{word.partition('=')[0]}.")]
        source = f"{where} with {_cut(blamed[-1])}" if blamed else where
        raise UsageError(f"{source}: {text}") from error


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def describe(cls: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key below a configuration class as (dotted key, default, documentation)."""
    rows: list[tuple[str, str, str]] = []
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            rows += describe(section, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True)
            rows.append((prefix + name, default.removesuffix("...\n").strip(), field.description or ""))
    return rows


def _expand(tree: Mapping[str, Any]) -> Tree:
    """Put presets in the place of their names: those of `model` and `task`, at the top and in sections."""
    expanded: Tree = {}
    for key, value in tree.items():
        filled = _preset(key, value) if key in PRESETS else value
        expanded[key] = _expand(filled) if isinstance(filled, dict) else filled
    return expanded


def _preset(kind: str, value: Any) -> Any:
    if isinstance(value, str):
        return read_yaml(find_preset(kind, value))
    if isinstance(value, dict) and "preset" in value:
        preset = read_yaml(find_preset(kind, str(value["preset"])))
        return _over(preset, {k: v for k, v in value.items() if k != "preset"})
    return value


def _over(below: Tree, above: Mapping[str, Any]) -> Tree:
    """Values of one tree before those of another; sections are joined, everything else is replaced."""
    joined = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(joined.get(key), dict)
        joined[key] = _over(joined[key], value) if both else value
    return joined


def override(tree: Tree, word: str) -> None:
    """Set one value of a tree of plain values from a `section.key=value` word; the value is YAML.

    Raises:
        UsageError: the word has no key, its value is not YAML, or a section on the way is a value.
    """
    key, equals, text = word.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise UsageError(f"override {word!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"override {word!r}: the value is not valid YAML") from error
    *sections, last = key.split(".")
    for section in sections:
        below = tree.get(section)
        if section in PRESETS and isinstance(below, str):
            below = {"preset": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise UsageError(f"override {word!r}: {section} is a value, not a section")
        tree[section] = below = dict(below)
        tree = below
    tree[last] = value


def _first_problem(cls: type[BaseModel], error: ValidationError) -> tuple[str, str]:
    """The key of the first problem, and one line about it."""
    problems = error.errors(include_url=False)
    first = problems[0]
    key, kind, given = _dotted(first["loc"]), first["type"], first["input"]
    others = {_dotted(problem["loc"]) for problem in problems} - {key}
    if kind == "extra_forbidden":
        text = _unknown(cls, key)
    elif kind == "missing" and isinstance(first["loc"][-1], int):
        place = first["loc"][:-1]  # A list of fixed length is too short: each entry that it lacks is a problem.
        last = max(int(problem["loc"][-1]) for problem in problems if problem["loc"][:-1] == place)
        key = _dotted(place)
        others = {other for other in others if not other.startswith(f"{key}.")}
        text = f"{key} takes a list of {last + 1}, not {_plain(given)}"
    elif kind == "missing":
        text = f"{key} is required and not given"
    elif kind in _TAKES:
        text = f"{key} takes {_TAKES[kind].format(**first.get('ctx', {}))}, not {_plain(given)}"
    elif kind == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        text = message if not key or message.startswith(f"{key}.") else f"{key}: {message}"
    else:
        text = f"{key}: {first['msg']}"
    return key, text + (f" (and {len(others)} more)" if others else "")


def _unknown(cls: type[BaseModel], key: str) -> str:
    rows = [row[0] for row in describe(cls)]
    close = difflib.get_close_matches(key, rows, n=1)
    if close:
        return f"unknown key {key}; did you mean {close[0]}?"
    section = key.rpartition(".")[0]
    prefix = f"{section}." if section else ""
    below = dict.fromkeys(row.removeprefix(prefix).partition(".")[0] for row in rows if row.startswith(prefix))
    return f"unknown key {key}; keys{f' of {section}' if section else ''} are {', '.join(below)}"


def _dotted(place: Iterable[int | str]) -> str:
    return ".".join(map(str, place))


def _plain(value: Any) -> str:
    """A value as YAML writes it, in one line."""
    try:
        text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    except yaml.YAMLError:
        text = repr(value)
    return _cut(text.removesuffix("...\n").strip())


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _section(annotation: Any) -> type[BaseModel] | None:
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
