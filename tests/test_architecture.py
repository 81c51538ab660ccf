"""The walls of the house: which part of the package may import which, and how long the loop may be."""

import ast
from pathlib import Path

import pytest

import swiftv2

PACKAGE = Path(swiftv2.__file__).parent
WINGS = {"data", "models", "engine"}
ALLOWED = {
    "errors": set[str](),
    "files": {"errors"},
    "records": {"errors", "files"},
    "config": {"errors"},
    "data": {"errors", "files", "config"},
    "models": {"errors", "config"},
    "engine": {"errors", "files", "records", "config"},
    "weights": {"errors", "files", "config", "models"},
    "plan": {"errors", "files", "config", "models"},
    "scaling": {"errors", "files", "config"},
    "downstream": {"errors", "files", "config"},
    "tuning": {"errors", "files", "records", "config", "engine"},
    "report": {"errors", "files", "records", "config"},
    "cluster": {"errors", "files", "records", "config"},
    "terminal": {"errors"},
    "recipes": {"errors", "files", "records", "config", "weights", "plan", "report", "scaling", "downstream"} | WINGS,
    "commands": {
        "errors",
        "config",
        "records",
        "terminal",
        "cluster",
        "weights",
        "plan",
        "recipes",
        "report",
        "scaling",
        "downstream",
        "tuning",
        "files",
        "data",
        "engine",
    },
    "cli": {"errors", "terminal", "commands"},
    "__main__": {"cli"},
}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "swiftv2" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("swiftv2.")}
    return parts - {"__version__"}


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_flow(path: Path) -> None:
    part = _part(path)
    assert part in ALLOWED, f"{part} has no place on the map: add it to docs/architecture.md and here"
    against = _imported_parts(path) - ALLOWED[part] - {part}
    assert not against, f"{path.relative_to(PACKAGE)} imports {sorted(against)} against the flow"


def test_the_wings_stand_side_by_side() -> None:
    for wing in WINGS:
        assert not ALLOWED[wing] & WINGS


WITHIN_DATA = {
    "samples": {"keyed"},
    "store": {"grid", "keys", "labels", "ranks", "statistics"},
    "ingest": {"store", "grid", "labels", "statistics", "keys"},
    "changes": {"store", "ingest", "grid", "labels", "statistics", "keys", "ranks"},
    "synth": {"grid", "keyed"},
}


@pytest.mark.parametrize("folder", WITHIN_DATA)
def test_the_floors_of_the_data_wing(folder: str) -> None:
    """Samples know a store by what they ask of it; nothing but changes knows how runs come into one."""
    for path in (PACKAGE / "data" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("swiftv2.data"):
                below = node.module.split(".")[2:3] or [alias.name for alias in node.names]
                assert set(below) <= WITHIN_DATA[folder] | {folder}, path


def test_the_loop_reads_in_one_sitting() -> None:
    assert len((PACKAGE / "engine" / "loop.py").read_text(encoding="utf-8").splitlines()) <= 350


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    """`swiftv2 --help` must answer at once: torch, DeepSpeed and MPI are imported where they are used."""
    for path in [PACKAGE / "cli.py", *sorted((PACKAGE / "commands").glob("*.py"))]:
        top = ast.parse(path.read_text(encoding="utf-8")).body
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
        assert not {
            n
            for n in names
            if n.split(".")[0]
            in {"torch", "deepspeed", "mpi4py", "zarr", "matplotlib", "optuna", "sklearn", "pandas", "captum"}
        }, path
        light = {"swiftv2.engine.place"}
        parts = ("data", "models", "engine", "recipes", "report", "weights", "downstream", "tuning")
        heavy = tuple(f"swiftv2.{part}" for part in parts)
        assert not {n for n in names if n.startswith(heavy)} - light, path
