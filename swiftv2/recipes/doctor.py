"""A checkup before the first step: ranks, hosts and devices, the store, and a step of the largest size."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from swiftv2.config.engine import split_batch
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data import keyed
from swiftv2.data.samples.batches import BatchReader, Prefetcher, Request
from swiftv2.engine import probes, verdicts
from swiftv2.engine.build import build_backend
from swiftv2.engine.checkup import Answer, Check, Examination, Figures, Opinion, Remark, compare, is_out_of_memory
from swiftv2.engine.collective import gather
from swiftv2.engine.launch import World, own_place, stop
from swiftv2.engine.meeting import connect, join, own_device
from swiftv2.engine.place import Place
from swiftv2.errors import SwiftError
from swiftv2.models import decay_names, learning_rates
from swiftv2.models.blocks import compile_blocks
from swiftv2.recipes.data import Data, open_data
from swiftv2.recipes.exclusions import read_exclusions
from swiftv2.recipes.objective import Objective
from swiftv2.recipes.planning import layout

CLIPS = 4
"""Clips that each rank reads to see whether and how fast it can."""
STORE_SECONDS = 20.0
"""How long a store that cannot be reached is waited for, at most: a checkup wants to know now."""
SLOW_READING = 0.3
"""Share of the median of the others' speed below which a rank reads slowly."""
STEP_SECONDS, COMPILE_SECONDS = 900.0, 3600.0
EPHEMERAL = 2
"""Ephemeral checkpoints that are kept."""


@dataclass(frozen=True)
class Report:
    """What a checkup found."""

    ok: bool
    """Whether nothing is sick."""
    checks: tuple[Check, ...]
    sick_hosts: tuple[str, ...]
    """Hosts that are better left out."""
    environment: dict[str, Any]
    """Versions, commit, launcher, ranks, hosts, command."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ok": self.ok,
            "checks": [check.to_dict() for check in self.checks],
            "sick_hosts": list(self.sick_hosts),
            "environment": self.environment,
        }


class Outcome(NamedTuple):
    """How a checkup ended, on every rank."""

    ok: bool
    """Whether nothing is sick."""
    stuck: bool
    """Whether a measurement of this rank still hangs in a thread: then only `os._exit` ends the process for sure."""


def examine(
    config: PretrainConfig, tell: Callable[[str], None], show: Callable[[Report], None], *, quick: bool = False
) -> Outcome:
    """Look at all that a run of this configuration needs (called by every rank); nothing is left behind.

    Args:
        config: of the run.
        tell: called on rank 0 with the name of a check that takes a while.
        show: called on rank 0 with what was found, before any rank leaves.
        quick: whether bandwidth and the dry run are left out.

    Raises:
        UsageError: the configuration is wrong, by itself or for this store or number of ranks.
        RankError: rank 0, or the launcher, is gone.
    """
    place = own_place()
    split_batch(config.train.global_batch, place.size, config.train.micro_batch)
    examination = Examination(place, connect(place, first=True), tell)
    _Visit(config, place, examination).look(quick=quick)
    if place.rank == 0:
        checks = tuple(examination.checks)
        hosts = sorted(set().union(*(check.sick_hosts() for check in checks)))
        show(Report(examination.well, checks, tuple(hosts), _environment(checks)))
    ok = examination.close()
    if not examination.stuck and not examination.separated:
        stop()
    return Outcome(ok, examination.stuck)


def _environment(checks: Sequence[Check]) -> dict[str, Any]:
    by_name = {check.name: check for check in checks}
    ranks = by_name["ranks"].ranks
    launcher = next((one["figures"]["launcher"] for one in ranks if one["figures"]), None)
    versions: Figures = next((one["figures"] for one in by_name["versions"].ranks if one["figures"]), {})
    hosts = list(dict.fromkeys(one["host"] for one in ranks))
    return {"world_size": len(ranks), "hosts": hosts, "launcher": launcher, "command": sys.orig_argv, **versions}


class _Visit:
    """The checks of a pretraining configuration, in their order, with what one of them leaves for the next."""

    def __init__(self, config: PretrainConfig, place: Place, examination: Examination) -> None:
        patience = min(config.data.patience_seconds, STORE_SECONDS)
        self.config = config.model_copy(update={"data": config.data.model_copy(update={"patience_seconds": patience})})
        self.place = place
        self.examination = examination
        self.device = torch.device("cpu")
        self.data: Data | None = None
        self.world: World | None = None

    def look(self, *, quick: bool) -> None:
        """All checks."""
        ask, run_dir = self.examination.ask, self.config.run.dir
        ask("ranks", lambda: {"launcher": self.place.launcher}, verdicts.ranks)
        # First of all, since it tells whether the configuration fits the store.
        store = ask("store", self._open_store, _judge_store, shared=True)
        ask("versions", lambda: probes.versions(self.place.local_rank), verdicts.versions)
        devices = ask("devices", self._take_device, verdicts.devices)
        ask("processors", lambda: probes.processors(self.place.local_rank), verdicts.processors)
        ask("host memory", probes.host_memory, verdicts.host_memory(self._host_bytes()))
        ask("shared memory", probes.shared_memory, verdicts.shared_memory)
        ask("open files", probes.open_files, verdicts.open_files)
        ask("disk", lambda: probes.disk(run_dir), verdicts.disk(*self._checkpoint_bytes()), shared=True)
        ask("lease", lambda: probes.lease(run_dir) if self.place.rank == 0 else {}, verdicts.lease, shared=True)
        self._look_together(quick=quick, with_devices=devices != "sick", with_store=store != "sick")

    def _look_together(self, *, quick: bool, with_devices: bool, with_store: bool) -> None:
        ask, skip = self.examination.ask, self.examination.skip
        if with_store:
            ask("reading", self._read, _judge_reading, shared=True)
        else:
            skip("reading", "not every rank can open the store")
        ask("links", lambda: self._join(with_devices=with_devices), _judge_links, together=True)
        ask("clock", lambda: probes.clock(self._world()), verdicts.clock, together=True)
        ask("matrix product", lambda: probes.product(self.device, self._world()), verdicts.product, together=True)
        missing = "" if with_devices else "not every rank has a healthy device of its own"
        if quick or missing:
            skip("bandwidth", missing or "--quick")
        else:
            ask("bandwidth", self._bandwidth, verdicts.bandwidth, together=True)
        missing = missing or ("" if with_store else "not every rank can open the store")
        if quick or missing:
            skip("dry run", missing or "--quick")
        else:
            seconds = COMPILE_SECONDS if self.config.engine.compile else STEP_SECONDS
            ask("dry run", self._dry_run, _judge_dry_run, together=True, shared=True, seconds=seconds)

    def _open_store(self) -> Figures:
        began = time.perf_counter()
        self.data = open_data(self.config, self.config.run.dir)
        if self.config.data.exclude is not None:
            read_exclusions(self.config.data.exclude, self.data)
        identity, version, fingerprint, clips = self.data.signature()
        return {
            "id": identity,
            "version": version,
            "fingerprint": fingerprint,
            "clips_sha256": clips,
            "clips": len(self.data.train),
            "seconds": time.perf_counter() - began,
        }

    def _opened(self) -> Data:
        if self.data is None:
            raise SwiftError("the store is not open")
        return self.data

    def _world(self) -> World:
        if self.world is None:
            raise SwiftError("the ranks have no link")
        return self.world

    def _take_device(self) -> Figures:
        self.device = own_device(self.config.engine.device, self.place)
        return probes.device(self.device)

    def _host_bytes(self) -> int:
        """Bytes that a rank holds beside its device: what is read ahead, and its part of a checkpoint on its way."""
        data = self.config.data
        ahead = data.prefetch_mb << 20
        if self.data is not None:
            clip = self.config.clip.frames * len(self.data.store.voxels) * 4
            ahead = min(ahead, data.prefetch * self._split()[0] * clip)
        return ahead + 12 * sum(layout(self.config).sizes) // self.place.size

    def _split(self) -> tuple[int, int]:
        train = self.config.train
        return split_batch(train.global_batch, self.place.size, train.micro_batch)

    def _checkpoint_bytes(self) -> tuple[int, int, int, int]:
        """Bytes of the largest checkpoint, of all that are kept at a time, of those that are there, of those kept for ever."""
        train, engine = self.config.train, self.config.engine
        parameters = sum(layout(self.config).sizes)
        state = 12 * parameters
        # DeepSpeed's own files hold the whole state once more, and the weights of the passes.
        weights = 2 if engine.precision == "bf16" else 4
        with_native = train.deepspeed_files and engine.backend == "deepspeed"
        permanent = state + ((12 + weights) * parameters if with_native else 0)
        kept = (train.keep_last + 1) * permanent + (EPHEMERAL * state if train.save_minutes else 0)
        archived = train.max_steps // train.keep_every * permanent if train.keep_every else 0
        return permanent, kept, _size(self.config.run.dir / "checkpoints") if self.place.rank == 0 else 0, archived

    def _read(self) -> Figures:
        """Read a few clips of this rank's own share, as the run would."""
        data, config = self._opened(), self.config
        reader = BatchReader(
            data.store,
            data.train,
            data.order(config.run.seed, 0, []),
            config.mask,
            config.data.normalisation,
            seed=config.run.seed,
            micro_batch=1,
            rank=self.place.rank,
            world_size=self.place.size,
            reading=data.reading(config.data, self.device),
            most_faults=int(config.data.quarantine_limit * len(data.train)),
        )
        began, size, finite, faults = time.perf_counter(), 0, True, []
        with reader:
            for _ in range(CLIPS):
                batch = next(reader)
                size += batch.bytes
                source = batch.bold.float() * batch.slope[:, None, None] + batch.intercept[:, None, None]
                finite = finite and bool(source.isfinite().all() and batch.statistics.isfinite().all())
                faults += [f"run {fault.run}: {fault.reason}" for fault in reader.faults()]
        seconds = time.perf_counter() - began
        return {"clips": CLIPS, "bytes": size, "seconds": seconds, "finite": finite, "unusable": faults}

    def _join(self, *, with_devices: bool) -> Figures:
        began = time.perf_counter()
        device = self.device if with_devices else torch.device("cpu")
        self.world = join(self.place, device, connect(self.place))
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        if int(one) != self.place.size:
            raise SwiftError(f"a sum of {self.place.size} ones over the ranks gives {float(one):g}")
        return {"backend": dist.get_backend(), "seconds": time.perf_counter() - began}

    def _bandwidth(self) -> Figures:
        world = self._world()
        return probes.bandwidth(world, gather(self.examination.host, world))

    def _dry_run(self) -> Figures:
        """One optimizer step of the largest size with all that training uses, and then nothing is kept of it."""
        micro_batch, accumulation = self._split()
        try:
            return self._step(micro_batch, min(accumulation, 2))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SwiftError(f"out of memory with {micro_batch} clips at a time: {self._advice(micro_batch)}") from error

    def _step(self, micro_batch: int, accumulation: int) -> Figures:
        """`accumulation` passes and a step: the first sums are made in the first pass and added to in the second."""
        config, data, world = self.config, self._opened(), self._world()
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        probes.begin_peak(world.device)
        began = time.perf_counter()
        objective = Objective(config, torch.as_tensor(data.store.voxels).long(), data.store.grid.shape)
        if config.engine.compile:
            compile_blocks(objective, varying=config.model.packing == "subject" or config.objective == "visible_only")
        names, rates = decay_names(objective), learning_rates(objective, config.model)
        parts = (config.engine, config.optimizer, objective, names, world, micro_batch, accumulation)
        backend = build_backend(*parts, rates)
        built = time.perf_counter() - began
        with self._largest(micro_batch, accumulation) as batches:
            began = time.perf_counter()
            for batch in batches:
                backend.forward_backward(batch.to(world.device))
            result = backend.step(config.optimizer.lr)
        seconds = time.perf_counter() - began
        backend.close()
        return {
            "micro_batch": micro_batch,
            "passes": accumulation,
            "seconds": seconds,
            "build_seconds": built,
            "peak_bytes": probes.peak(world.device),
            "device": world.device.type,
            "device_bytes": torch.cuda.mem_get_info(world.device)[1] if world.device.type == "cuda" else None,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "refused": result.refused,
        }

    def _largest(self, micro_batch: int, count: int) -> Prefetcher:
        """Micro-batches of the clips with the largest brains: where background is left out, they hold most tokens."""
        data, config = self._opened(), self.config
        usable = np.setdiff1d(np.arange(len(data.train)), np.array(data.withdrawn_train, dtype=np.int64))
        brains = np.array([data.store.runs[run].brain_voxels for run in data.train.run[usable].tolist()])
        clips = np.resize(usable[np.argsort(-brains, kind="stable")][:micro_batch], micro_batch).astype(np.int64)
        zeros, places = np.zeros(micro_batch, dtype=np.int64), np.arange(micro_batch, dtype=np.int64)
        request = Request(clips, zeros, places, np.ones(micro_batch, dtype=np.float32), 0)
        return Prefetcher(
            data.store,
            data.train,
            iter([request] * count),
            config.mask,
            config.data.normalisation,
            lambda turn, clip: keyed.generator(config.run.seed, "mask", turn, clip),
            reading=data.reading(config.data, self.device),
        )

    def _advice(self, micro_batch: int) -> str:
        """What needs less memory."""
        stages = list(range(len(self.config.model.depths)))
        changes = []
        if micro_batch > 1:
            smaller = max(n for n in range(1, micro_batch) if micro_batch % n == 0)
            changes.append(f"train.micro_batch={smaller}")
        if list(self.config.model.checkpoint_stages) != stages:
            changes.append(f"model.checkpoint_stages={stages}".replace(" ", ""))
        return f"try {' or '.join(changes)}" if changes else "take more ranks, or devices with more memory"


def _judge_store(answers: Sequence[Answer]) -> Opinion:
    """All ranks must open the same version of the same store."""
    keys = ("id", "version", "fingerprint", "clips_sha256")
    seen = [tuple(a.figures[key] for key in keys) for a in answers]
    usual = max(seen, key=seen.count)
    remarks: dict[int, Remark] = {}
    for answer, own in zip(answers, seen, strict=True):
        if own != usual:
            said = f"sees version {own[1]} of store {str(own[0])[:8]}, others version {usual[1]} of store {str(usual[0])[:8]}"
            remarks[answer.rank] = ("sick", f"{said}, or other clips of it: is data.store the same folder everywhere?")
    slowest = max(a.figures["seconds"] for a in answers)
    told = f"version {usual[1]}, {answers[0].figures['clips']} training clips, opened in {slowest:.1f} s at most"
    return Opinion(told, remarks)


def _judge_reading(answers: Sequence[Answer]) -> Opinion:
    speeds = {a.rank: a.figures["bytes"] / a.figures["seconds"] for a in answers}
    shares = compare(speeds)
    remarks: dict[int, Remark] = {}
    for answer in answers:
        told = answer.figures
        if not told["finite"]:
            remarks[answer.rank] = ("sick", "clips hold values that are not finite: run `swiftv2 store verify`")
        elif told["unusable"]:
            remarks[answer.rank] = ("warning", f"{len(told['unusable'])} clips of no use, such as {told['unusable'][0]}")
        elif shares.get(answer.rank, 1.0) < SLOW_READING:
            said = f"reads {speeds[answer.rank] / 1e6:.1f} MB/s, {shares[answer.rank]:.2f} of what the other ranks do"
            remarks[answer.rank] = ("warning", said)
    median = statistics.median(speeds.values()) / 1e6
    return Opinion(f"{CLIPS} clips a rank, {median:.1f} MB/s in the median, {min(speeds.values()) / 1e6:.1f} at least", remarks)


def _judge_links(answers: Sequence[Answer]) -> Opinion:
    slowest = max(a.figures["seconds"] for a in answers)
    return Opinion(
        f"all ranks joined by {answers[0].figures['backend']} in {slowest:.1f} s" if len(answers) > 1 else "one rank"
    )


def _judge_dry_run(answers: Sequence[Answer]) -> Opinion:
    remarks: dict[int, Remark] = {}
    for answer in answers:
        told = answer.figures
        if told["loss"] is None or told["refused"]:
            said = told["refused"] or "its loss is not finite"
            remarks[answer.rank] = ("sick", f"the first step is of no use, {said}: look at data.normalisation and optimizer")
        elif told["device_bytes"] and told["peak_bytes"] > verdicts.FULL * told["device_bytes"]:
            said = f"{told['peak_bytes'] / 1e9:.1f} of {told['device_bytes'] / 1e9:.1f} GB held: lower train.micro_batch"
            remarks[answer.rank] = ("warning", said)
    told, peak = answers[0].figures, max(a.figures["peak_bytes"] for a in answers)
    slowest = max(a.figures["seconds"] for a in answers)
    held = "reserved on the device" if told["device"] == "cuda" else "resident"
    passes = f"{told['passes']} {'passes' if told['passes'] > 1 else 'pass'} of {told['micro_batch']} clips"
    return Opinion(f"{passes} and a step in {slowest:.1f} s, {peak / 1e9:.2f} GB {held} at most", remarks)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
