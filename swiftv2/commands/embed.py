"""The command that embeds."""

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from swiftv2.commands.ranks import STOPPED_EARLY, Terminated, own_rank
from swiftv2.config.load import override
from swiftv2.engine.place import find_place
from swiftv2.errors import UsageError
from swiftv2.terminal import Shown, add_command, add_json, answer


def add(nouns: Any) -> None:
    """The command `embed`."""
    text = (
        "embed the clips and subjects of a store, or of one NIfTI file, by exported weights. Normalisation, frames and stride "
        "are the weights'; a source that their input contract does not allow is refused. Under torchrun, mpirun or srun the "
        "ranks share the runs. Stopped or killed, it goes on when the same command is given again."
    )
    examples = (
        "swiftv2 embed weights/first cohort.zarr embeddings/cohort --stages all",
        "swiftv2 embed weights/first sub-01_space-MNI152NLin2009cAsym_bold.nii.gz embeddings/one grid.resample=true",
        "srun swiftv2 embed weights/806M hcp.zarr embeddings/hcp --precision bf16 data.cohorts=[HCP] clip.stride_between=0.5",
    )
    parser = add_command(nouns, "embed", _embed, text, examples)
    add_json(parser)
    parser.add_argument("weights", type=Path, help="folder of exported weights")
    parser.add_argument("source", type=Path, help="folder of a store, or a NIfTI file")
    parser.add_argument("out", type=Path, help="folder to be made, or that of the same command unfinished")
    words = (
        "clip.* changes how clips are cut, data.* how the store is read (cohorts, on_bad_clip, threads, ...); of a NIfTI file "
        "grid.space names its template space and grid.resample=true interpolates it"
    )
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=words)
    parser.add_argument("--stages", choices=("last", "all"), default="last", help="which stages; the last by default")
    parser.add_argument("--tokens", action="store_true", help="keep the features of each token too, as Zarr: large")
    parser.add_argument(
        "--format", choices=("parquet", "zarr"), default="parquet", help="of the embeddings; parquet by default"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU where there is one by default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is for GPUs; fp32 by default")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="clips at a time; 8 by default")
    parser.add_argument(
        "--pool",
        choices=("mean", "mean_std"),
        default="mean",
        help="over the tokens of a clip: mean (default), or mean and deviation, which hold how signals vary within it",
    )
    parser.add_argument("--untrained", action="store_true", help="the same architecture from first values, as a baseline")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of those first values; 0 by default")
    text = "refuse subjects that the weights were trained on; the card declares them otherwise"
    parser.add_argument("--refuse-overlap", action="store_true", help=text)
    text = "cohort of a NIfTI file's subject, so that pretraining on it, and a later withdrawal, are seen"
    parser.add_argument("--cohort", metavar="NAME", help=text)


def _embed(arguments: argparse.Namespace) -> int:
    tree: dict[str, Any] = {"clip": {}, "data": {}, "grid": {}}
    for word in arguments.overrides:
        if not word.startswith(tuple(f"{section}." for section in tree)):
            raise UsageError(f"override {word!r}: embed takes clip.KEY=VALUE, data.KEY=VALUE, grid.space and grid.resample")
        override(tree, word)
    grid = tree["grid"]
    unknown = sorted(grid.keys() - {"space", "resample"})
    if unknown:
        raise UsageError(f"grid.{unknown[0]}: the weights' input contract says it; embed takes grid.space and grid.resample")
    if grid and arguments.source.is_dir():
        raise UsageError(f"grid.{min(grid)} is for a NIfTI file, and {arguments.source} is a folder")
    if arguments.batch < 1:
        raise UsageError(f"--batch {arguments.batch}: take 1 or more")
    from swiftv2.files import read_json
    from swiftv2.recipes.embed import embed
    from swiftv2.recipes.encoding import EmbedOptions

    same = (
        "stages",
        "pool",
        "tokens",
        "format",
        "device",
        "precision",
        "batch",
        "untrained",
        "seed",
        "refuse_overlap",
        "cohort",
    )
    options = EmbedOptions(
        **{name: getattr(arguments, name) for name in same},
        clip=tree["clip"],
        data=tree["data"],
        space=grid.get("space"),
        resample=bool(grid.get("resample", False)),
    )
    try:
        with _stoppable(), Shown("shards", shown=own_rank() == 0) as shown:
            card = embed(arguments.weights, arguments.source, arguments.out, options, shown.update)
    except Terminated:
        if own_rank() == 0:
            raise
        return STOPPED_EARLY
    if find_place(os.environ).rank == 0:
        content = read_json(card)
        counts, overlap = content["counts"], content["overlap"]
        whose = f"{counts['clips']:,} clips of {counts['runs']:,} runs of {counts['subjects']:,} subjects"
        lines = [f"{arguments.out}: {whose}, {content['pooling']}"]
        lines += [f"too short for a clip: {counts['runs_too_short']} runs"] if counts["runs_too_short"] else []
        lines += [f"left out as unusable: {counts['clips_unusable']} clips"] if counts["clips_unusable"] else []
        lines += _told(overlap)
        answer({"out": str(arguments.out), **content}, *lines, as_json=arguments.json)
    return 0


def _told(overlap: dict[str, Any] | None) -> list[str]:
    if overlap is None:
        return []
    if not overlap["known"]:
        return [f"whether the weights were trained on these subjects cannot be told: {overlap['why']}"]
    return [f"the weights were trained on {overlap['counted']} of the {overlap['asked']} subjects"]


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let what Slurm sends before the end of the time, and SIGTERM, end the command as one that goes on later."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated

    heard = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    former = [signal.signal(number, stop) for number in heard]
    try:
        yield
    finally:
        for number, handler in zip(heard, former, strict=True):
            signal.signal(number, handler)
