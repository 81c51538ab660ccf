"""GPUs and machines by name, with the source of every figure: read from `machines.yaml` beside this file."""

import re
from functools import cache
from importlib import resources
from typing import Any, Self

import yaml
from pydantic import PositiveFloat, PositiveInt, model_validator

from swiftv2.config.base import Config
from swiftv2.errors import UsageError


class _Sourced(Config):
    """An entry whose every figure names its source."""

    name: str
    """Name of the entry, such as a100-80."""
    sources: dict[str, str]
    """Where each figure comes from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        figures = set(type(self).model_fields) - {"name", "gpu", "sources"}
        if figures != set(self.sources):
            raise ValueError(f"{self.name}: sources must name {', '.join(sorted(figures))}, each once")
        return self


class Gpu(_Sourced):
    """What one rank holds."""

    memory_bytes: PositiveFloat
    """Memory that the driver reports, in bytes."""
    peak_bf16_flops: PositiveFloat
    """Dense matrix products in bf16, FLOP/s."""
    peak_fp32_flops: PositiveFloat
    """Products in plain fp32, FLOP/s."""
    memory_bandwidth: PositiveFloat
    """Bytes a second from the GPU's own memory."""


class Machine(_Sourced):
    """Nodes of equal GPUs on one network."""

    gpu: Gpu
    """The GPU of every rank."""
    gpus_per_node: PositiveInt
    """Ranks on a node."""
    nodes: PositiveInt
    """Nodes that there are."""
    intra_node_bandwidth: PositiveFloat
    """Bytes a second that one rank sends to the others of its node."""
    nics_per_node: PositiveInt
    """Network interfaces of a node, shared by its ranks."""
    nic_bandwidth: PositiveFloat
    """Bytes a second that one network interface sends."""
    intra_node_latency: PositiveFloat
    """Seconds of one hop between ranks of a node."""
    network_latency: PositiveFloat
    """Seconds of one hop between nodes."""

    @property
    def injection_bandwidth(self) -> float:
        """Bytes a second that a node sends into the network through all its interfaces."""
        return self.nics_per_node * self.nic_bandwidth


@cache
def gpu(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UsageError: there is none; the message names those that are.
    """
    return Gpu.model_validate({"name": name, **_entry("gpus", name)})


def find_gpu(driver_name: str) -> Gpu | None:
    """The GPU that a driver calls so, such as "NVIDIA A100-SXM4-80GB"; None for one that is not in the list."""
    kinds = {"A100.*80": "a100-80", "A100": "a100-40", "H200": "h200", "MI250X": "mi250x-gcd"}
    return next((gpu(name) for pattern, name in kinds.items() if re.search(pattern, driver_name)), None)


@cache
def machine(name: str) -> Machine:
    """The machine of that name.

    Raises:
        UsageError: there is none; the message names those that are.
    """
    entry = _entry("machines", name)
    return Machine.model_validate({"name": name, **entry, "gpu": gpu(entry["gpu"])})


def machine_of(gpu_name: str) -> Machine:
    """The first machine whose nodes hold the GPU of that name.

    Raises:
        UsageError: there is no such GPU.
    """
    gpu(gpu_name)
    return machine(next(name for name, entry in _tree()["machines"].items() if entry["gpu"] == gpu_name))


def gpu_names() -> list[str]:
    """Names of the GPUs."""
    return list(_tree()["gpus"])


def machine_names() -> list[str]:
    """Names of the machines."""
    return list(_tree()["machines"])


@cache
def _tree() -> dict[str, dict[str, dict[str, Any]]]:
    text = resources.files("swiftv2.plan").joinpath("machines.yaml").read_text(encoding="utf-8")
    tree: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(text)
    return tree


def _entry(kind: str, name: str) -> dict[str, Any]:
    entries = _tree()[kind]
    if name not in entries:
        raise UsageError(f"no {kind.removesuffix('s')} is named {name!r}; there are {', '.join(entries)}")
    return entries[name]
