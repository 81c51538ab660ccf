"""Write docs/configuration.md from the configuration classes: every key, its default and its documentation.

Run it after a change of `swiftv2/config`; a test compares the page with the classes.
"""

from pathlib import Path

from pydantic import BaseModel

from swiftv2.config.data import GridConfig
from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.ladder import LadderConfig
from swiftv2.config.ladder_parts import LadderMask, LadderSize, LadderSubjects
from swiftv2.config.load import describe
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.config.task import TargetConfig
from swiftv2.config.tune import ParameterConfig, TuneConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = """# Configuration

A configuration file is YAML; every key can be overridden on the command line as `section.key=value`. Unknown keys are
refused. `model` may be the name of a preset of `configs/model` (`model: 806M`), or a mapping that starts from one
(`model: {preset: 806M, drop_path: 0.1}`). `swiftv2 pretrain CONFIG --dry-run` prints the resolved configuration.

This page is written by `python tools/write_configuration.py`.
"""

TABLES: tuple[tuple[str, str, type[BaseModel], str], ...] = (
    ("Pretraining", "`swiftv2 pretrain CONFIG`, presets in `configs/pretrain`.", PretrainConfig, ""),
    (
        "Fine-tuning",
        "`swiftv2 finetune CONFIG`, presets in `configs/finetune`; `task.*` is `swiftv2 task`.",
        FinetuneConfig,
        "",
    ),
    ("Targets of a task", "Each of `task.targets`.", TargetConfig, ""),
    ("A study", "`swiftv2 tune run STUDY`, presets in `configs/tune` ([tuning](tuning.md)).", TuneConfig, ""),
    ("Parameters of a study", "Each of `space`, by the key of a fine-tuning configuration.", ParameterConfig, ""),
    ("The store's grid", "`swiftv2 store build SOURCE STORE grid.key=value`.", GridConfig, "grid."),
    ("A generated cohort", "`swiftv2 store synth FOLDER key=value`, presets in `configs/synth`.", SynthConfig, ""),
    ("A ladder", "`swiftv2 sweep plan LADDER`, shipped in `scaling/ladders` ([ladders](ladders.md)).", LadderConfig, ""),
    ("Sizes of a ladder", "Each of `sizes`.", LadderSize, ""),
    ("Masks of a ladder", "Each of `mask`.", LadderMask, ""),
    ("Subjects of a ladder", "Each of `subjects`.", LadderSubjects, ""),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, use, cls, prefix in TABLES:
        rows = [f"| `{key}` | `{default}` | {' '.join(text.split())} |" for key, default, text in describe(cls, prefix)]
        parts.append("\n".join([f"## {title}", "", use, "", "| key | default | meaning |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
