"""DeepSpeed's own checkpoints (ZeRO 0, 1 and 2), read into stretches as ours hold them.

They are pickles. PyTorch's restricted reader takes them apart and may make nothing but tensors, plain values and the few
classes below; nothing of DeepSpeed is imported.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from swiftv2.engine.backend import MOMENTS
from swiftv2.engine.shards import Stretch
from swiftv2.errors import SwiftError

MODEL_FILE = "mp_rank_00_model_states.pt"
_RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Address:
    """Stands for DeepSpeed's `fragment_address`: elements of a flat partition that belong to one parameter."""

    numel: int
    start: int


class _Unused:
    """Stands for what is of no use here; takes whatever arguments the original took."""

    def __init__(self, *_: object) -> None:
        return


ALLOWED = {
    "deepspeed.utils.tensor_fragment.fragment_address": _Address,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Unused,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Unused,
}
"""All classes that DeepSpeed's files may name beside those which PyTorch itself allows, and what is made in their place."""


class Source(NamedTuple):
    """The files of a DeepSpeed checkpoint."""

    folder: Path
    model: Path
    ranks: list[Path]
    """Partitions of the optimizer by rank; none under ZeRO 0."""


class Part(NamedTuple):
    """What one file holds of the state."""

    stretches: list[Stretch]
    adam_steps: int


class ForeignState:
    """A DeepSpeed checkpoint whose model file was read.

    Attributes:
        steps, samples: counted by DeepSpeed since its engine was made; samples are None where it does not tell.
        world_size: ranks that saved it.
        micro_batch: clips that a rank computed at a time; None where it does not tell.
        version: of DeepSpeed.
        shapes: of all whole tensors of the state, by key.
    """

    def __init__(self, source: Source) -> None:
        """Read what all ranks share.

        Raises:
            SwiftError: the file is damaged, no such checkpoint, or of a kind that is not adopted; the message names it.
        """
        self.source = source
        content = _load(source.model)
        with _understood(source.model):
            self.steps, self.world_size = int(content["global_steps"]), int(content["dp_world_size"])
            self.samples: int | None = content.get("global_samples")
            self.micro_batch: int | None = content["ds_config"].get("train_micro_batch_size_per_gpu")
            self.version = str(content["ds_version"])
            self._optimizer = content["optimizer"]
            partitions = content["param_shapes"]
            if int(content["mp_world_size"]) != 1:
                raise SwiftError(f"{source.model}: of a model split between ranks, which is not adopted")
            tied = set(content.get("shared_params") or ())
            module = {name: tensor for name, tensor in content["module"].items() if name not in tied}
            module |= content.get("frozen_param_fragments") or {}
            self._module: dict[str, Tensor] = module
            self._trained = self._find_trained(partitions, set(content["buffer_names"]))
        self._check_ranks(partitioned=partitions is not None)
        kinds = ("weight", *MOMENTS)
        self.shapes = {f"{kind}/{name}": shape for kind in kinds for name, shape in self._trained.items()}
        self._others = [Stretch(f"other/{n}", 0, t.reshape(-1)) for n, t in module.items() if n not in self._trained]
        self.shapes |= {f"other/{n}": tuple(t.shape) for n, t in module.items() if n not in self._trained}

    def parts(self) -> Iterator[Part]:
        """The state, a rank's part at a time: fp32 weights and moments; what is not trained comes with the first.

        Raises:
            SwiftError: a file is damaged, does not belong to the others, or they leave holes; the message names it.
        """
        if not self.source.ranks:
            part = self._whole()
            yield Part(part.stretches + self._others, part.adam_steps)
            return
        reached = dict.fromkeys(self._trained, 0)
        steps: int | None = None
        for rank, path in enumerate(self.source.ranks):
            content = _load(path)
            with _understood(path):
                part = self._partition(content["optimizer_state_dict"], path, reached, steps)
            steps = part.adam_steps
            yield part if rank else Part(part.stretches + self._others, steps)
        for name, shape in self._trained.items():
            if reached[name] != torch.Size(shape).numel():
                raise SwiftError(
                    f"{self.source.folder}: its partitions hold {reached[name]} of the {torch.Size(shape).numel()} elements of "
                    f"{name}: they are not of one save"
                )

    def _find_trained(self, partitions: Any, buffers: set[str]) -> dict[str, tuple[int, ...]]:
        if partitions is None:
            names = [name for name in self._module if name not in buffers]
            return {name: tuple(self._module[name].shape) for name in names}
        found: dict[str, tuple[int, ...]] = {}
        for group in partitions:
            for name, shape in group.items():
                if name in found or tuple(self._module[name].shape) != tuple(shape):
                    raise SwiftError(f"{self.source.model}: {name} is there twice, or in two shapes")
                found[name] = tuple(shape)
        return found

    def _check_ranks(self, *, partitioned: bool) -> None:
        folder, ranks = self.source.folder, self.source.ranks
        if not partitioned and ranks:
            raise SwiftError(f"{ranks[0]}: {MODEL_FILE} is of a run without partitions: the files are of two saves")
        if partitioned and len(ranks) != self.world_size:
            raise SwiftError(
                f"{folder}: {MODEL_FILE} was saved by {self.world_size} ranks, and there are partitions of {len(ranks)}: "
                f"{_first_difference(ranks, self.world_size)}"
            )

    def _partition(self, state: Any, path: Path, reached: dict[str, int], steps: int | None) -> Part:
        """A rank's part: of each parameter the elements that follow those of the ranks before."""
        stretches: list[Stretch] = []
        for index, addresses in enumerate(state["param_slice_mappings"]):
            if state["partition_count"][index] != self.world_size:
                raise SwiftError(f"{path}: of a save by {state['partition_count'][index]} ranks, not {self.world_size}")
            if not addresses:
                continue  # a group so small that this rank holds nothing of it
            moments, counted = _adam(state["base_optimizer_state"], index, path)
            steps = _agreed(steps, counted, path)
            flat = {"weight": state["single_partition_of_fp32_groups"][index], **moments}
            end = 0
            for name, address in sorted(addresses.items(), key=lambda item: int(item[1].start)):
                if name not in reached or address.numel < 0 or address.start < end:
                    raise SwiftError(f"{path}: {name} is unknown to {MODEL_FILE}, or its elements are those of another one")
                end = address.start + address.numel
                for kind, values in flat.items():
                    if end > values.numel():
                        raise SwiftError(f"{path}: {name} reaches beyond the partition")
                    stretches.append(_stretch(f"{kind}/{name}", reached[name], values[address.start : end], path))
                self._compare(name, reached[name], flat["weight"][address.start : end], path)
                reached[name] += address.numel
        if steps is None:
            raise SwiftError(f"{path}: nothing of the optimizer is in it")
        return Part(stretches, steps)

    def _compare(self, name: str, start: int, master: Tensor, path: Path) -> None:
        """Weights of the model file are roundings of the masters: so they show files of two saves, and ranks exchanged."""
        weights = self._module[name].reshape(-1)[start : start + master.numel()]
        if not torch.equal(weights, master.to(weights.dtype)):
            raise SwiftError(f"{path}: {name} is not what {MODEL_FILE} holds of it: the files are not of one save")

    def _whole(self) -> Part:
        """Everything, of ZeRO 0, where names have to be found by order, shape and value."""
        path, kept = self.source.model, self._optimizer
        with _understood(path):
            if kept is None or "fp32_groups_flat" in kept:
                raise SwiftError(f"{path}: without ZeRO, weights in one flat tensor or without optimizer are not adopted")
            optimizer = kept.get("optimizer_state_dict", kept)
            members = [[optimizer["state"][i] for i in group["params"]] for group in optimizer["param_groups"]]
            masters = kept.get("fp32_groups")
            known = masters or [[one["exp_avg"] for one in group] for group in members]
            groups = _assign({name: self._module[name] for name in self._trained}, known, by_value=masters is not None)
            if groups is None:
                raise SwiftError(
                    f"{path}: which parameter is which cannot be told for certain, as ZeRO 0 saves no names: "
                    "save it with ZeRO 1 or 2"
                )
            stretches, steps = [], None
            for group, names in enumerate(groups):
                for index, name in enumerate(names):
                    steps = _agreed(steps, _count(members[group][index], optimizer["param_groups"][group]), path)
                    weight = self._module[name] if masters is None else masters[group][index]
                    values = {"weight": weight, **{kind: members[group][index][kind] for kind in MOMENTS}}
                    stretches += [_stretch(f"{kind}/{name}", 0, v.reshape(-1), path) for kind, v in values.items()]
        return Part(stretches, steps or 0)


def find_source(path: Path) -> Source:
    """The files of a DeepSpeed checkpoint.

    Args:
        path: the folder of a tag, or the one that holds `latest`, which names it.

    Raises:
        SwiftError: there is none, or it is of a kind that is not adopted.
    """
    folder = path
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        folder = path / tag
        if Path(tag).name != tag or not folder.is_dir():
            raise SwiftError(f"{path / 'latest'} names {tag!r}, which is no folder beside it: give the folder of a tag")
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise SwiftError(f"{folder}: a checkpoint of ZeRO 3, which is not adopted: save it with ZeRO 1 or 2")
    if not (folder / MODEL_FILE).is_file():
        raise SwiftError(f"{folder}: no {MODEL_FILE} there: give the folder of a DeepSpeed tag, or the one that holds `latest`")
    ranks: dict[int, Path] = {}
    for file in sorted(folder.glob("*_optim_states.pt")):
        named = _RANK_FILE.fullmatch(file.name)
        if named is None:
            raise SwiftError(f"{file}: of a model split between ranks, or of experts, which is not adopted")
        rank = int(named.group(1))
        if rank in ranks:
            raise SwiftError(f"{file}: {ranks[rank].name} is of the same rank: the files are of two saves")
        ranks[rank] = file
    return Source(folder, folder / MODEL_FILE, [ranks[rank] for rank in sorted(ranks)])


def _load(path: Path) -> dict[str, Any]:
    """Read a file of DeepSpeed without letting it run anything.

    Raises:
        SwiftError: it is damaged, or wants something made that is not allowed.
    """
    with safe_globals([(stand_in, name) for name, stand_in in ALLOWED.items()]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            # A damaged pickle may raise anything, and so does a file that is shorter than its list of tensors says.
            if isinstance(error, OSError) and error.filename is not None:
                raise
            wanted = _not_allowed(path)
            if wanted:
                raise SwiftError(f"{path}: it asks for {wanted}, which may run code and is no part of DeepSpeed's") from error
            raise SwiftError(f"{path}: it cannot be read as a file of DeepSpeed: it is damaged") from error
    if not isinstance(content, dict):
        raise SwiftError(f"{path}: not a file of DeepSpeed")
    return content


def _not_allowed(path: Path) -> str:
    try:
        return ", ".join(sorted(get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # noqa: BLE001 (of a damaged file, which is told anyway)
        return ""


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Turn what goes wrong with content of an unknown form into one line."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise SwiftError(f"{path}: not what DeepSpeed writes of ZeRO 0, 1 or 2 with Adam ({error!r})") from error


def _first_difference(ranks: Sequence[Path], size: int) -> str:
    numbers = {int(named.group(1)) for path in ranks if (named := _RANK_FILE.fullmatch(path.name))}
    missing = sorted(set(range(size)) - numbers)
    if missing:
        return f"that of rank {missing[0]} (zero_pp_rank_{missing[0]}_mp_rank_00_optim_states.pt) is missing"
    return f"{ranks[-1].name} is of another world size"


def _adam(base: Any, group: int, path: Path) -> tuple[dict[str, Tensor], int]:
    """Moments of a flat group and the number of updates."""
    if isinstance(base, list):  # DeepSpeed's `elastic_checkpoint`
        return {kind: base[group][kind] for kind in MOMENTS}, _count(base[group], {})
    settings = base["param_groups"][group]
    (index,) = settings["params"]
    state = base["state"][index]
    if not set(MOMENTS) <= state.keys():
        raise SwiftError(f"{path}: its optimizer has no moments of Adam")
    return {kind: state[kind] for kind in MOMENTS}, _count(state, settings)


def _count(state: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    return int(state["step"] if "step" in state else settings["step"])


def _agreed(former: int | None, counted: int, path: Path) -> int:
    if former not in (None, counted):
        raise SwiftError(f"{path}: {counted} updates of Adam, where others have {former}: the files are not of one save")
    return counted


def _stretch(key: str, start: int, values: Tensor, path: Path) -> Stretch:
    if values.dtype not in _FLOATS or values.dim() != 1:
        raise SwiftError(f"{path}: {key} is {values.dtype} with {values.dim()} axes, not flat numbers of fp32")
    return Stretch(key, start, values.float())


def _assign(weights: Mapping[str, Tensor], groups: Sequence[Sequence[Tensor]], *, by_value: bool) -> list[list[str]] | None:
    """The one way in which named weights, in their order, are the members of ordered groups; None where none or several.

    Args:
        weights: of the module.
        groups: what the optimizer holds, of equal shapes.
        by_value: whether the groups hold masters, of which the weights are roundings.
    """

    def fits(weight: Tensor, member: Tensor) -> bool:
        return weight.shape == member.shape and (not by_value or torch.equal(weight, member.to(weight.dtype)))

    # By how many members of each group are taken: in how many ways, and the groups chosen in one of them, latest first.
    reached: dict[tuple[int, ...], tuple[int, Any]] = {(0,) * len(groups): (1, None)}
    for weight in weights.values():
        following: dict[tuple[int, ...], tuple[int, Any]] = {}
        for taken, (ways, chosen) in reached.items():
            for g, members in enumerate(groups):
                if taken[g] < len(members) and fits(weight, members[taken[g]]):
                    now = (*taken[:g], taken[g] + 1, *taken[g + 1 :])
                    following[now] = (ways + following.get(now, (0, None))[0], (g, chosen))
        reached = following
    ways, chosen = reached.get(tuple(map(len, groups)), (0, None))
    if ways != 1:
        return None
    assigned: list[list[str]] = [[] for _ in groups]
    for name in reversed(list(weights)):
        g, chosen = chosen
        assigned[g].insert(0, name)
    return assigned
