"""What pretraining is worth on traits that are known: the generated cohort, over ten splits, beside every baseline.

    python benchmarks/downstream_cohort.py --folder FOLDER --out FILE

Two generated cohorts of 320 subjects at 6 mm: one without labels, on which an encoder is pretrained, and one with traits, on
which everything is judged, so that no subject who is judged was ever seen. Over ten folds: last-block fine-tuning and probes of
the frozen encoder, against the same model from scratch, probes of an untrained encoder, functional connectivity, mean image,
motion, covariates, brain mask, majority. A quarter of an hour on two quiet cores; the same folder goes on
where it stands. Another `--seed` is another population, on which nothing was chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import zarr
from downstream import Stages, Tree, difference, finetune_all, shown, side_by_side, swiftv2
from downstream_attentive import Tokens, attentive_probe
from machine import ROOT, page, parser, prose, table, write_page

from swiftv2.config.finetune import FinetuneConfig
from swiftv2.config.load import load
from swiftv2.config.task import TaskConfig
from swiftv2.files import read_json
from swiftv2.models.heads import Pool
from swiftv2.recipes.comparison import Source, compare_folders
from swiftv2.recipes.embed import embed
from swiftv2.recipes.embeddings import CARD, columns, write_json
from swiftv2.recipes.encoding import EmbedOptions
from swiftv2.recipes.feature_sets import FeatureOptions
from swiftv2.recipes.probe import RESULT, ProbeOptions, permutations, probe

PACKAGES = ("torch", "zarr", "numpy", "scikit-learn", "nilearn")
SALT = "5d41402abc4b2a76b9719d911017c592"
CONFIGS = ROOT / "configs"
STAGE = 2
COHORTS = {"labelled": ("generated",), "unlabelled": ("unlabelled", "frames=120", "missing_share=0")}
"""Name of each cohort in its store, and how its configuration differs from configs/synth/downstream.yaml."""
SEED = 11
"""Of the cohort on which model, readout and rates were chosen."""
REGIMES: dict[str, tuple[str, ...]] = {
    "last_blocks": (),
    "scratch": ("encoder.regime=scratch", "optimizer.lr=3.0e-3"),
}
PROBES = {"frozen": "pretrained", "untrained": "untrained"}
"""Linear probes of the mean and deviation over tokens, by name, and the encoder that each reads."""
ATTENTIVE = {"frozen_attentive": "pretrained", "untrained_attentive": "untrained"}
"""Probes that attend to tokens."""
METHODS = {
    "last_blocks": "last block",
    "frozen_attentive": "frozen, attentive",
    "frozen": "frozen, linear",
    "untrained_attentive": "untrained, attentive",
    "untrained": "untrained, linear",
    "scratch": "scratch",
    "connectivity": "connectivity",
    "mean_image": "mean image",
    "motion": "motion",
    "covariates": "covariates",
    "mask": "mask",
    "majority": "majority",
}
"""Every method by its name on the page."""
ONE_METRIC = {"classification": "auroc", "regression": "pearson_r"}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        splits: folds.
        permutations: of the labels of `null`.
        cohort, pretraining, finetuning: further settings of each.
    """

    splits: int = 10
    permutations: int = 50
    cohort: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ()
    finetuning: tuple[str, ...] = ()


REHEARSAL = Size(
    splits=3,
    permutations=5,
    cohort=("subjects=30", "frames=48"),
    pretraining=("train.max_steps=2", "train.evaluate_every=2", "evaluate.max_clips=2"),
    finetuning=("train.max_steps=2", "train.evaluate_every=2", "evaluate.bootstrap=20"),
)


class Bench:
    """The folder in which everything lies, and the stages that fill it.

    Args:
        folder: where.
        size: how much is done.
        seed: of the labelled cohort and of pretraining; the cohort without labels has the next one.
    """

    def __init__(self, folder: Path, size: Size, seed: int = SEED) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size, self.seed, self.stages = folder, size, seed, Stages(folder)
        self.store, self.weights = folder / "labelled.zarr", folder / "weights"
        self.permuted = folder / "permuted.json"

    def once(self, name: str, left: Path, job: Callable[[], None]) -> None:
        """Do a stage that has not left its last file or folder yet."""
        if not left.exists():
            with self.stages.timed(name):
                job()

    def make_cohort(self, name: str) -> None:
        """Generate a cohort and build its store."""
        bids, store = self.folder / f"{name}_bids", self.folder / f"{name}.zarr"
        cohort, *words = COHORTS[name]
        words.append(f"seed={self.seed + list(COHORTS).index(name)}")
        config = str(CONFIGS / "synth/downstream.yaml")
        swiftv2("store", "synth", str(bids), "--config", config, "--workers", "2", *words, *self.size.cohort)
        swiftv2("store", "build", str(bids), str(store), "--cohort", cohort, "--salt", SALT, "grid.voxel_mm=6")

    def pretrain(self) -> None:
        """Pretrain on the cohort without labels, and export."""
        run = self.folder / "pretrain"
        where = (f"data.store={self.folder / 'unlabelled.zarr'}", f"run.dir={run}", f"run.seed={self.seed - SEED}")
        swiftv2("pretrain", str(CONFIGS / "pretrain/downstream.yaml"), *where, *self.size.pretraining)
        swiftv2("checkpoint", "export", str(run), str(self.weights))

    def embed(self) -> None:
        """Tokens of all clips by the pretrained and by the untrained encoder, and their mean and deviation over each clip."""
        for name in PROBES.values():
            tokens = self.folder / f"tokens_{name}"
            embed(self.weights, self.store, tokens, EmbedOptions(tokens=True, untrained=name == "untrained", batch=16))
            pool_tokens(tokens, self.folder / f"embeddings_{name}")

    def config(self, regime: str, index: int) -> FinetuneConfig:
        """A fine-tuning run on one of the splits."""
        own = (
            f"task.data.store={self.store}",
            "task.data.normalisation={kind: per_voxel, scope: run}",
            "task.clip={frames: 20, stride_within: 2}",
            f"task.split={{kind: kfold, count: {self.size.splits}, index: {index}}}",
            f"encoder.weights={self.weights}",
            f"run.dir={self.folder / 'runs' / regime / f'split_{index}'}",
        )
        return load(FinetuneConfig, CONFIGS / "finetune/downstream.yaml", (*own, *REGIMES[regime], *self.size.finetuning))

    def task(self) -> TaskConfig:
        """The task, of its first split."""
        return self.config("last_blocks", 0).task

    def finetune(self) -> None:
        """Every regime on every split; regimes take turns, so that a broken-off benchmark has whole splits."""
        finetune_all([self.config(regime, index) for index in range(self.size.splits) for regime in REGIMES])

    def probe(self) -> None:
        """Baselines and linear probes on the same splits; site and motion, as covariates, of the traits that are classes."""
        embeddings = {name: str(self.folder / f"embeddings_{source}") for name, source in PROBES.items()}
        probe(self.task(), self.folder / "linear", ProbeOptions(FeatureOptions(embeddings=embeddings)))
        task = self.task()
        classes = tuple(target for target in task.targets if target.kind == "classification")
        alone = task.model_copy(update={"targets": classes, "covariates": ("site", "motion")})
        probe(alone, self.folder / "covariates", ProbeOptions(FeatureOptions(methods=("covariates",))))

    def attend(self, name: str) -> None:
        """Attentive probes of one encoder on the same splits."""
        tokens = Tokens.read(self.folder / f"tokens_{ATTENTIVE[name]}", STAGE)
        for index in range(self.size.splits):
            attentive_probe(self.task(), tokens, name, self.folder / "attentive", index)

    def permute(self) -> None:
        """AUROC of the frozen linear probe for permuted labels of the trait that is nothing."""
        name = "frozen"
        features = FeatureOptions(methods=(name,), embeddings={name: str(self.folder / "embeddings_pretrained")})
        found = permutations(self.task(), self.folder / "permuted", "null", self.size.permutations, ProbeOptions(features))
        write_json(self.permuted, found[name])

    def finished(self) -> list[int]:
        """Splits on which every regime has been fine-tuned."""
        results = [self.folder / "runs" / regime / "split_{}" / RESULT for regime in REGIMES]
        return [index for index in range(self.size.splits) if all(Path(str(path).format(index)).exists() for path in results)]

    def compare(self, reference: str, splits: Sequence[int], *, tuned: bool) -> Tree:
        """Methods beside each other on these splits, differences from one of them; with fine-tuning, or without."""
        kinds = ("attentive", "linear", "covariates", *(("runs",) if tuned else ()))
        folders = [path for kind in kinds for index in splits for path in sorted((self.folder / kind).glob(f"*/split_{index}"))]
        oracle = self.folder / "labelled_bids" / "traits.json"
        return compare_folders([Source(path) for path in folders], reference, ceilings=oracle, bootstrap=0)


def pool_tokens(tokens: Path, out: Path) -> None:
    """Mean and deviation over the tokens of each clip, as embeddings of the same clips.

    Args:
        tokens: folder of `swiftv2 embed --tokens`.
        out: folder of embeddings to be made; they are twice as wide.
    """
    out.mkdir(exist_ok=True)
    width = 0
    for path in sorted(tokens.glob("clips-*.parquet")):
        clips = pd.read_parquet(path)
        group = zarr.open_group(tokens / path.name.replace("clips", "tokens").replace(".parquet", ".zarr"), mode="r")
        features = torch.from_numpy(np.asarray(group[f"stage{STAGE}"])).permute(0, 5, 1, 2, 3, 4)
        pool = Pool("mean_std", features.shape[1])
        values, width = pool(features, torch.from_numpy(np.asarray(group[f"counted{STAGE}"]))).numpy(), pool.width
        made = pd.DataFrame(values, columns=columns({STAGE: width}))
        kept = [name for name in clips.columns if not name.startswith("stage")]
        pd.concat([clips[kept], made], axis=1).to_parquet(out / path.name)
    about = {
        "stages": [{"stage": STAGE, "width": width}],
        "pooling": "mean and deviation over tokens that hold any brain voxel",
    }
    write_json(out / CARD, read_json(tokens / CARD) | about)


def scores(*trees: Tree) -> list[str]:
    """Table of every method's score for every trait, beside the oracle; of each method the first tree's that has it."""
    rows = []
    for column, target in trees[0]["targets"].items():
        metric = ONE_METRIC[target["kind"]]
        known: Tree = {}
        for tree in trees:
            known = tree["targets"][column]["metrics"][metric]["methods"] | known
        cells = [shown(known[name]) if name in known else "-" for name in METHODS]
        ceiling = target["ceiling"]
        rows.append((column, f"{ceiling['oracle']:.2f} +- {ceiling['standard_error']:.2f}", *cells))
    return table(("trait", "oracle", *METHODS.values()), rows)


def differences(found: Tree, reference: str, others: Sequence[str]) -> list[str]:
    """Table of the reference less each of the others, for every trait."""
    rows = []
    for column, target in found["targets"].items():
        methods = target["metrics"][ONE_METRIC[target["kind"]]]["methods"]
        cells = [difference(methods[name]["difference"], turned=True) if name in methods else "-" for name in others]
        rows.append((column, *cells))
    return table((f"{METHODS[reference]} less", *(METHODS[name] for name in others)), rows)


def body(bench: Bench) -> list[str]:
    """The page's lines."""
    permuted = read_json(bench.permuted)
    splits, tuned = range(bench.size.splits), bench.finished()
    probes = {name: bench.compare(name, splits, tuned=False) for name in ("frozen_attentive", "frozen")}
    found = {name: bench.compare(name, tuned, tuned=True) for name in ("last_blocks", "frozen_attentive")}
    sizes = probes["frozen"]["targets"]["lagged"]["subjects"]
    about = (
        f"{bench.size.splits} folds of the labelled cohort, families whole: some {sizes['train'][0]} subjects train and "
        f"{sizes['test'][0]} test. All traits share one model. AUROC, of `slope` Pearson's r: means over folds. The oracle "
        f"reads the latents that the generator drew, without voxels or noise. Fine-tuned were {len(tuned)} folds: what stands "
        "beside last block or scratch is of these."
    )
    paired = (
        "Differences on the same subjects, with 95 % corrected resampled t intervals over folds; in bold where 0 lies outside. "
        "Nothing is corrected for how many there are."
    )
    beside = ("connectivity", "mean_image", "motion", "covariates", "mask", "majority")
    return [
        *prose(about),
        *scores(probes["frozen"], found["last_blocks"]),
        *prose(paired),
        *differences(found["last_blocks"], "last_blocks", ("scratch", *beside)),
        "",
        *differences(found["frozen_attentive"], "frozen_attentive", ("scratch", "last_blocks")),
        "",
        *differences(probes["frozen_attentive"], "frozen_attentive", ("untrained_attentive", *beside)),
        "",
        *differences(probes["frozen"], "frozen", ("untrained", *beside)),
        *prose(
            f"`null`, {permuted['count']} permutations of its labels, linear probe of the frozen encoder: mean AUROC "
            f"{permuted['mean']:.3f} (standard error {permuted['error']:.3f}); the true labels {permuted['observed']:.3f}."
        ),
        *bench.stages.lines(),
        "",
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Run it and write the page."""
    made = parser(__doc__)
    made.add_argument("--as-it-is", action="store_true", help="go on with no fine-tuning that is not finished")
    made.add_argument("--rehearse", action="store_true", help="few subjects, splits and steps: numbers then mean nothing")
    made.add_argument("--seed", type=int, default=SEED, help=f"of the cohorts, at least {SEED}; the default: {SEED}")
    asked = made.parse_args(words)
    bench = Bench(asked.folder.resolve(), REHEARSAL if asked.rehearse else Size(), asked.seed)
    for name in COHORTS:
        bench.once(f"cohort and store, {name}", bench.folder / f"{name}.zarr", partial(bench.make_cohort, name))
    bench.once("pretraining", bench.weights, bench.pretrain)
    bench.once("embeddings", bench.folder / "embeddings_untrained" / CARD, bench.embed)
    if not asked.as_it_is:
        with bench.stages.timed("fine-tuning"):
            bench.finetune()
    with bench.stages.timed("probes and baselines"):
        side_by_side([bench.probe, *(partial(bench.attend, name) for name in ATTENTIVE)])
    bench.once("permutations", bench.permuted, bench.permute)
    write_page(page("What pretraining is worth on known traits", PACKAGES, body(bench)), asked.out)


if __name__ == "__main__":
    main()
