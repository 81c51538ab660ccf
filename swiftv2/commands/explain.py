"""Commands that tell what predictions rest on, and how embeddings move."""

import argparse
import json
from pathlib import Path
from typing import Any

from swiftv2.errors import UsageError
from swiftv2.files import write_file
from swiftv2.terminal import Shown, add_command, add_json, answer


def add(verbs: Any) -> None:
    """The verbs of `explain`."""
    text = (
        "attribute the output of a finished fine-tuning run to voxels by integrated gradients, averaged over validation "
        "subjects: gradients.nii.gz in the store's space, a picture, and how complete the map is and how it differs from that "
        "of random weights."
    )
    example = "swiftv2 explain gradients runs/sex maps/sex --target Gender --clips 64"
    parser = add_command(verbs, "gradients", _gradients, text, [example])
    parser.add_argument("run_dir", type=Path, help="run directory of `swiftv2 finetune`")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--target", help="column that is predicted (default: the task's first)")
    parser.add_argument("--class", dest="label", help="class whose log odds are attributed (default: the last)")
    parser.add_argument("--clips", type=int, default=32, help="validation clips, spread over subjects (default: 32)")
    parser.add_argument("--steps", type=int, default=32, help="steps from the baseline to the clip (default: 32)")
    parser.add_argument(
        "--baseline", choices=("mean", "background"), default="mean", help="each clip's mean image (default), or background"
    )
    text = "write a map of fewer than 5 real subjects too, in a folder that you alone can read: brains are personal data"
    parser.add_argument("--draw-subjects", action="store_true", help=text)
    add_json(parser)
    text = (
        "say how embeddings of clips move in time, stage by stage: slope of their power spectrum, autocorrelation over lag, "
        "effective rank."
    )
    parser = add_command(verbs, "embeddings", _embeddings, text, ["swiftv2 explain embeddings embeddings/hcp maps/hcp"])
    parser.add_argument("folder", type=Path, help="folder of `swiftv2 embed`, in Parquet")
    parser.add_argument("out", type=Path, help="new folder")
    add_json(parser)


def _gradients(arguments: argparse.Namespace) -> int:
    if arguments.clips < 1 or arguments.steps < 2:
        raise UsageError("--clips takes 1 or more, --steps 2 or more")
    try:
        import captum  # noqa: F401 (whether it is there)
    except ImportError as error:
        raise UsageError("integrated gradients need captum: pip install 'swiftv2[explain]'") from error
    from swiftv2.recipes.explain import FACTS, explain
    from swiftv2.report.brainmaps import draw_map

    with Shown("clips", shown=not arguments.json) as shown:
        found = explain(
            arguments.run_dir,
            arguments.out,
            target=arguments.target,
            label=arguments.label,
            clips=arguments.clips,
            steps=arguments.steps,
            baseline=arguments.baseline,
            draw_subjects=arguments.draw_subjects,
            progress=shown.update,
        )
    facts = json.loads((arguments.out / FACTS).read_text(encoding="utf-8"))
    draw_map(arguments.out / "gradients.nii.gz", arguments.out / "gradients.png", f"{facts['task']}: {_what(facts)}")
    text = (
        f"{arguments.out}: {found.clips} clips of {found.subjects} subjects; attributions miss the output's difference by "
        f"{found.completeness_error:.1%}, correlate with those of random weights by {found.randomised_correlation:.2f}"
    )
    answer({"folder": str(arguments.out), **facts}, text, as_json=arguments.json)
    return 0


def _what(facts: dict[str, Any]) -> str:
    return facts["target"] if facts["class"] is None else f"{facts['target']} = {facts['class']}"


def _embeddings(arguments: argparse.Namespace) -> int:
    from swiftv2.downstream.dynamics import describe
    from swiftv2.report.brainmaps import draw_dynamics

    if arguments.out.exists():
        raise UsageError(f"{arguments.out}: already exists; choose another folder or delete it")
    found = {stage: describe(runs) for stage, runs in _runs_of_stages(arguments.folder).items()}
    arguments.out.mkdir(parents=True)
    write_file(arguments.out / "embeddings.json", json.dumps(found, indent=1) + "\n")
    draw_dynamics(found, arguments.out / "embeddings.png")
    lines = [
        f"{stage}: power f^-{one['power_slope']['mean']:.2f} (deviation {one['power_slope']['deviation']:.2f}), effective rank "
        f"{one['effective_rank']:.1f} of {one['dimensions']}"
        for stage, one in found.items()
    ]
    answer({"folder": str(arguments.out), "stages": found}, "\n".join(lines), as_json=arguments.json)
    return 0


def _runs_of_stages(folder: Path) -> dict[str, list[tuple[Any, Any, float]]]:
    """By stage, of each run its clips' embeddings in the order of their starts, the starts, and seconds between frames."""
    import numpy as np

    from swiftv2.recipes.embeddings import read_clips

    found: dict[str, list[tuple[Any, Any, float]]] = {}
    for shard in read_clips(folder):
        runs = np.asarray(shard.keys["run"])
        for run in np.unique(runs):
            own = np.flatnonzero(runs == run)
            own = own[np.argsort(shard.start[own])]
            for stage, rows in shard.stages.items():
                one = rows[own].astype(np.float64), shard.start[own], float(shard.tr[own[0]])
                found.setdefault(f"stage {stage}", []).append(one)
    return found
