"""Embeddings of clips and subjects by pretrained weights, from a store or from one NIfTI file."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftv2 import __version__, weights
from swiftv2.config.data import ClipConfig, StoreConfig
from swiftv2.config.load import build
from swiftv2.data.samples.clips import index_clips, select_runs
from swiftv2.data.store.reader import Store
from swiftv2.engine.launch import choose_device
from swiftv2.engine.place import Place, find_place
from swiftv2.errors import InterruptedRunError, SwiftError, UsageError
from swiftv2.files import read_json
from swiftv2.recipes import embeddings
from swiftv2.recipes.data import check_cleaned
from swiftv2.recipes.embeddings import CARD, PLAN, SubjectMeans
from swiftv2.recipes.encoding import EmbedOptions, Work, build_encoder, make_shard
from swiftv2.recipes.export import hashes_of, input_contract
from swiftv2.recipes.overlap import Overlap, find_overlap
from swiftv2.recipes.single import store_of_file

FEWEST_RUNS, MOST_SHARDS = 4, 512
"""Runs of a shard at least, and shards at most: what a stop may cost, and files."""
PATIENCE_SECONDS = 1800.0
"""How long the first rank waits for the next shard of another one."""
LOGS = "logs"
"""What a launcher of a job may have made in the folder."""
NOT_TOLD = "the cohort of a single file is not told: name it by --cohort"
Tell = Callable[[int, int], None]
DEFAULT = EmbedOptions()

POOLINGS = {"mean": "mean", "mean_std": "mean and deviation"}
"""What is taken over the tokens of a clip, in words."""


def embed(weights_folder: Path, source: Path, out: Path, options: EmbedOptions = DEFAULT, tell: Tell | None = None) -> Path:
    """Embed every clip and subject of a source; given again, it goes on with what is missing.

    Ranks of a launcher share the runs without talking to each other; the first one waits for all shards and finishes.
    Embeddings are means over the tokens that hold brain (variant=swift_v1: over all tokens, as published), in float32; a
    subject's is the mean over its runs of the means over their clips.

    Args:
        weights_folder: exported weights; their input contract is honoured.
        source: a store, or a NIfTI file.
        out: folder to be made or gone on with.
        options: how.
        tell: called with shards done and shards in all.

    Returns:
        The card, `embeddings.json`; only the first rank's return means that it is there.

    Raises:
        SwiftError: the source does not fit the weights, is damaged, or holds subjects of the pretraining that are refused;
            the folder holds other embeddings.
        UsageError: a setting is wrong or unknown, or several ranks are to embed one file.
    """
    place = find_place(os.environ)
    if source.is_dir():
        return _embed(weights_folder, source, out, options, place, tell or _silent, file=False)
    if not source.is_file():
        raise UsageError(f"{source}: not there: give the folder of a store, or a NIfTI file")
    if place.size > 1:
        raise UsageError(f"{source} is one run: embed it with one process, not with {place.size}")
    contract = weights.read_card(weights_folder).input
    with store_of_file(source, contract, options.cohort, options.space, resample=options.resample) as store:
        return _embed(weights_folder, store, out, options, place, tell or _silent, file=True)


def _silent(done: int, total: int) -> None:
    del done, total


def _embed(
    weights_folder: Path, store: Path, out: Path, options: EmbedOptions, place: Place, tell: Tell, *, file: bool
) -> Path:
    work = _prepare(weights_folder, store, out, options, file=file)
    _open_folder(work, place)
    if (out / CARD).exists():
        _sweep(work)
        return out / CARD
    missing = [n for n in range(place.rank, len(work.groups), place.size) if not _done(work, n)]
    if missing:
        device = choose_device(options.device, place)
        if options.precision == "bf16" and device.type != "cuda":
            raise UsageError("--precision bf16 is for GPUs: on the CPU say fp32")
        encoder = build_encoder(work, weights_folder).to(device, torch.bfloat16 if options.precision == "bf16" else None)
        voxels = torch.as_tensor(work.store.voxels).long().to(device)
        for number in missing:
            make_shard(work, number, encoder, voxels)
            tell(sum(_done(work, n) for n in range(len(work.groups))), len(work.groups))
    if place.rank == 0:
        _wait(lambda: sum(_done(work, n) for n in range(len(work.groups))), len(work.groups), tell)
        _finish(work)
    return out / CARD


def _prepare(weights_folder: Path, path: Path, out: Path, options: EmbedOptions, *, file: bool) -> Work:
    """Open everything, and refuse what does not fit before anything is computed."""
    card = weights.read_card(weights_folder)
    store = Store.open(path)
    config, clip = _settings(card, path, options)
    runs = [int(run) for run in select_runs(store.runs, store.subject_keys, config.cohorts)]
    if not runs:
        raise UsageError(f"{path}: no run of data.cohorts is there")
    contract = input_contract(store, clip, config.normalisation, runs)
    weights.check_contract(card, contract)
    check_cleaned(config, store, runs)
    clips = index_clips(
        store.runs, clip, runs, allow_mixed_tr=True, censored=lambda run: store.censored(run, clip.displacement_mm)
    )
    model = card.model
    if card.kind == "visible_only" and model.packing == "none":
        # Visible tokens were encoded by the definition of packing; all tokens are another function of the weights.
        model = model.model_copy(update={"packing": "template"})
    used = np.unique(clips.run)
    size = max(FEWEST_RUNS, -(-len(used) // MOST_SHARDS))
    groups = [used[first : first + size] for first in range(0, len(used), size)]
    keys = {store.runs[run].subject for run in used.tolist()}
    overlap = None if options.untrained else _overlap(card, store, keys, options, file=file)
    return Work(out, card, contract, model, store, config, clips, groups, overlap, options, file)


def _settings(card: weights.Card, path: Path, options: EmbedOptions) -> tuple[StoreConfig, ClipConfig]:
    """How the store is read: what the weights want, and words."""
    for name in ("store", "normalisation"):
        if name in options.data:
            raise UsageError(f"data.{name}: comes from {'SOURCE' if name == 'store' else 'the weights'}: leave it out")
    wanted = card.input
    tree = {"store": str(path), "normalisation": wanted.normalisation.model_dump(), "allow_mixed_tr": True, **options.data}
    own: dict[str, Any] = {} if "seconds" in options.clip else {"frames": wanted.frames}
    own["stride_within"] = wanted.stride_within
    return build(StoreConfig, tree, where="data"), build(ClipConfig, own | dict(options.clip), where="clip")


def _overlap(card: weights.Card, store: Store, keys: set[str], options: EmbedOptions, *, file: bool) -> Overlap:
    """Subjects that the weights were trained on.

    Raises:
        SwiftError: there are some, or nobody can tell, and `refuse_overlap` is set.
    """
    untold = file and options.cohort is None
    found = Overlap(known=False, counted=0, asked=len(keys), why=NOT_TOLD) if untold else find_overlap(card, store, keys)
    if options.refuse_overlap and not found.known:
        raise SwiftError(f"whether the weights were trained on these subjects cannot be told ({found.why}): --refuse-overlap")
    if options.refuse_overlap and found.counted:
        raise SwiftError(
            f"the weights were trained on {found.counted} of the {found.asked} subjects: embed other ones, or leave out "
            "--refuse-overlap, and the card declares it"
        )
    return found


def _open_folder(work: Work, place: Place) -> None:
    """Make the folder, or see that it is for the same embeddings.

    Raises:
        SwiftError: it holds something else.
    """
    path, plan = work.folder / PLAN, work.plan()
    if place.rank == 0 and not path.exists():
        if work.folder.exists() and {entry.name for entry in work.folder.iterdir()} - {LOGS}:
            raise SwiftError(f"{work.folder}: holds other files, and no unfinished embeddings: give another folder")
        work.folder.mkdir(parents=True, exist_ok=True)
        embeddings.write_json(path, plan)
    _wait(lambda: int(path.exists()), 1, _silent)
    found = read_json(path)
    differing = sorted(name for name in plan if found.get(name) != plan[name] and found.get(name) != _plain(plan[name]))
    if differing:
        raise SwiftError(
            f"{work.folder}: holds embeddings that differ in {', '.join(differing)}: give another folder, or the same command "
            "as before"
        )


def _plain(value: Any) -> Any:
    """A value as JSON brings it back."""
    return list(value) if isinstance(value, tuple) else value


def _done(work: Work, number: int) -> bool:
    return embeddings.shard_path(work.folder, number).exists()


def _wait(count: Callable[[], int], wanted: int, tell: Tell) -> None:
    """Until so many are there.

    Raises:
        InterruptedRunError: none came for long.
    """
    last, since, pause = count(), time.monotonic(), 0.05
    while last < wanted:
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
        now = count()
        if now > last:
            last, since = now, time.monotonic()
            tell(now, wanted)
        elif time.monotonic() - since > PATIENCE_SECONDS:
            raise InterruptedRunError("another rank has stopped before its share was done: give the same command again")


def _finish(work: Work) -> None:
    """Subjects and the card, from whole shards."""
    paths = [embeddings.shard_path(work.folder, number) for number in range(len(work.groups))]
    means, unusable = SubjectMeans(), 0
    for path in paths:
        shard = embeddings.read_shard(path, work.stages)
        means.add(shard)
        unusable += shard.unusable
    if work.options.format == "zarr":
        embeddings.finish_zarr(work.folder, paths, means, work.stages)
    else:
        embeddings.finish_parquet(work.folder, means, work.stages)
    embeddings.write_json(work.folder / CARD, _card(work, means, unusable))
    _sweep(work)


def _sweep(work: Work) -> None:
    """With format=zarr the shards have done their service."""
    if work.options.format == "zarr":
        for number in range(len(work.groups)):
            embeddings.shard_path(work.folder, number).unlink(missing_ok=True)


def _card(work: Work, means: SubjectMeans, unusable: int) -> dict[str, Any]:
    store, model = work.store, work.model
    over = "all tokens" if model.variant == "swift_v1" else "tokens that hold any brain voxel"
    identity = {"id": store.attributes["store_id"], "fingerprint": store.fingerprint}
    told = not work.file or work.options.cohort is not None
    return {
        "kind": "embeddings",
        "weights": {
            "name": model.name,
            "sha256": work.card.sha256,
            "untrained": work.options.untrained,
            "seed": work.options.seed if work.options.untrained else None,
        },
        "input": work.contract.model_dump(mode="json"),
        "clip": work.clips.config.model_dump(mode="json"),
        # The store of a single file is gone: nothing is named that could be looked up.
        "store": None if work.file else identity | {"version": store.version, "generated": store.generated},
        "pooling": f"{POOLINGS[work.options.pool]} over {over}; subjects: mean over runs of means over clips",
        "stages": [{"stage": stage, "width": width} for stage, width in work.stages.items()],
        "tokens": work.options.tokens,
        "format": work.options.format,
        "precision": work.options.precision,
        "counts": {
            "subjects": len(means.subjects),
            "runs": means.runs,
            "clips": means.clips,
            "runs_too_short": len(work.clips.too_short),
            "clips_unusable": unusable,
        },
        "overlap": None if work.overlap is None else work.overlap.to_json(),
        "subjects": hashes_of(store, means.subjects) if told else None,
        "made_with": {"swiftv2": __version__},
    }
