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
        path: a YAML file; a `model:` entry may be the name of a preset, or a mapping with `preset:`.
        overrides: `section.key=value` words; the value is YAML.

    Returns:
        The checked configuration.

    Raises:
        UsageError: anything is unknown, missing or out of range; one line that names file and key.
    """
    tree = read_yaml(path)
    for word in overrides:
        override(tree, word)
    if "model" in tree:
        tree["model"] = _expand_model(tree["model"])
    return build(cls, tree, where=str(path))


def build(cls: type[T], tree: Mapping[str, Any], where: str) -> T:
    """Check a tree of plain values against a configuration class; `where` names its source in errors."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"{where}: {_first_problem(cls, error)}") from error


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


def _expand_model(value: Any) -> Any:
    if isinstance(value, str):
        return read_yaml(find_preset("model", value))
    if isinstance(value, dict) and "preset" in value:
        rest = {k: v for k, v in value.items() if k != "preset"}
        return read_yaml(find_preset("model", str(value["preset"]))) | rest
    return value


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
        if section == "model" and isinstance(below, str):
            below = {"preset": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise UsageError(f"override {word!r}: {section} is a value, not a section")
        tree[section] = below = dict(below)
        tree = below
    tree[last] = value


def _first_problem(cls: type[BaseModel], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [row[0] for row in describe(cls)]
        close = difflib.get_close_matches(key, known, n=1)
        text = f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else "")
    elif first["type"] == "missing":
        text = f"{key} is required and not given"
    else:
        message = first["msg"].removeprefix("Value error, ")
        given = first["input"]
        shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool, list, tuple)) else ""
        text = f"{key}: {message}{shown}" if key else message
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _section(annotation: Any) -> type[BaseModel] | None:
    candidates = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
