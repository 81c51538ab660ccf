"""The state of a run in pieces: every rank writes the stretches of tensors that it keeps, and any number of ranks reads them.

`state/rank_R_of_W.safetensors` holds flat stretches by key (`weight/NAME`, `exp_avg/NAME`, ...); its metadata say where in
the whole tensor each begins. Nothing is gathered, and nothing in a file can run code.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swiftv2.errors import SwiftError
from swiftv2.files import named

FOLDER = "state"
_CHUNK_BYTES = 16 << 20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Stretch(NamedTuple):
    """What a rank keeps of a tensor: `values`, flat, from element `start` of the whole on."""

    key: str
    start: int
    values: Tensor


class Written(NamedTuple):
    """Size in bytes and SHA-256 of a file, as manifests list them."""

    size: int
    sha256: str


def shard_name(rank: int, size: int) -> str:
    """Name, below a checkpoint, of what one of so many ranks writes."""
    return f"{FOLDER}/rank_{rank}_of_{size}.safetensors"


def write_shard(path: Path, stretches: list[Stretch], shapes: Mapping[str, tuple[int, ...]], adam_steps: int) -> Written:
    """Write stretches as a safetensors file and bring it to the disk; hashed on the way, so that it is never read back.

    Most of the time is spent outside of Python's lock, so that training goes on beside it.

    Args:
        path: the file; its folder is made.
        stretches: contiguous tensors, brought to the host one at a time.
        shapes: of the whole tensors, by key.
        adam_steps: updates of the optimizer so far.

    Raises:
        OSError: it cannot be written.
    """
    tensors, offset = {}, 0
    for key, _, values in stretches:
        end = offset + values.numel() * values.element_size()
        tensors[key] = {"dtype": _NAMES[values.dtype], "shape": [values.numel()], "data_offsets": [offset, end]}
        offset = end
    notes = {
        "adam_steps": str(adam_steps),
        "starts": json.dumps({key: start for key, start, _ in stretches}),
        "shapes": json.dumps(dict(shapes)),
    }
    header = json.dumps({"__metadata__": notes, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with named(path), path.open("wb", buffering=0) as file:
        first = (memoryview(len(header).to_bytes(8, "little")), memoryview(header))
        for view in (*first, *(_bytes(values) for _, _, values in stretches)):
            for begin in range(0, len(view), _CHUNK_BYTES):
                chunk = view[begin : begin + _CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) or 0 :]
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


class SavedState:
    """The shards of a checkpoint, opened; a context manager.

    Attributes:
        shapes: of the whole tensors, by key.
        adam_steps: updates of the optimizer.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Open all shards of a checkpoint.

        Raises:
            SwiftError: there are none, one is no safetensors file, or they do not cover a tensor.
        """
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.adam_steps = 0
        self._folder = checkpoint / FOLDER
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        self._files = ExitStack()
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths:
            raise SwiftError(f"{checkpoint}: there is no state of ours in it (see `swiftv2 checkpoint adopt` for DeepSpeed's)")
        try:
            for path in paths:
                self._open(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SwiftError(f"{path}: not a shard of a state: it is damaged or of another version") from error
        self._check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()

    def _open(self, path: Path) -> None:
        file = self._files.enter_context(safe_open(path, "pt"))
        notes = file.metadata()
        starts = json.loads(notes["starts"])
        self.shapes |= {key: tuple(shape) for key, shape in json.loads(notes["shapes"]).items()}
        self.adam_steps = max(self.adam_steps, int(notes["adam_steps"]))
        for key in file.keys():  # noqa: SIM118 (no iterator)
            (count,) = file.get_slice(key).get_shape()
            self._pieces.setdefault(key, []).append((starts[key], starts[key] + count, file))

    def _check(self) -> None:
        for key, shape in self.shapes.items():
            end = 0
            pieces = self._pieces[key] = sorted(self._pieces.get(key, []), key=lambda piece: piece[:2])
            for begin, stop, _ in pieces:
                if begin != end:
                    break
                end = stop
            if end != torch.Size(shape).numel():
                raise SwiftError(f"{self._folder}: {key} is not whole: a rank's shard is missing, or of another save")

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a whole tensor, flat, from whichever shards hold them."""
        parts = []
        for begin, stop, file in self._pieces[key]:
            low, high = max(begin, start), min(stop, start + count)
            if low < high:
                parts.append(file.get_slice(key)[low - begin : high - begin])
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, key: str) -> Tensor:
        """A whole tensor in its shape."""
        shape = self.shapes[key]
        size = torch.Size(shape).numel()
        return self.read(key, 0, size).reshape(shape) if size else self._pieces[key][0][2].get_tensor(key).reshape(shape)

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers by name, whole: fp32 masters, and others in their own format."""
        kinds = ("weight/", "other/")
        return {key.partition("/")[2]: self.whole(key) for key in self.shapes if key.startswith(kinds)}


class Snapshot:
    """Copies of a rank's stretches on the host, so that training may go on while they are written.

    The memory is kept and used again: 12 bytes for each parameter that the rank keeps.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def take(self, stretches: Iterator[Stretch], synchronise: Callable[[], None]) -> list[Stretch]:
        """Copy stretches.

        Args:
            stretches: of this rank, in the same order and of the same sizes each time.
            synchronise: waits until copies from the device have arrived.
        """
        taken = []
        for key, start, values in stretches:
            copy = self._copies.get(key)
            if copy is None or copy.shape != values.shape or copy.dtype != values.dtype:
                copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._copies[key] = copy
            copy.copy_(values.detach(), non_blocking=True)
            taken.append(Stretch(key, start, copy))
        synchronise()
        return taken


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
