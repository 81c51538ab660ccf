"""The one door between models and files: a folder with `weights.safetensors` and `weights.json`.

The JSON is the card: architecture, what the weights expect as input, how BOLD was normalised, and where they come from.
Reading runs no code, and needs neither DeepSpeed nor what the weights were trained with.
"""

import argparse
import hashlib
import hmac
import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swiftv2.config.base import Config
from swiftv2.config.data import NormalisationConfig
from swiftv2.config.load import build
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig, Size3
from swiftv2.errors import SwiftError, UsageError
from swiftv2.files import sha256, sync
from swiftv2.models.mup import factors
from swiftv2.models.simmim import MaskedModel, SimMIM
from swiftv2.models.swift_v1 import DEFAULTS, REQUIRED
from swiftv2.models.swin4d import Swin4D
from swiftv2.models.visible import make_masked

TENSORS = "weights.safetensors"
CARD = "weights.json"
ENCODER = "encoder."
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    struct.error,
)
"""What torch.load raises on damaged files and on those whose pickle wants code to be run."""
TOLERANCE = 1e-3
"""Voxel sizes (mm) and repetition times (s) that differ by less are the same."""


class InputContract(Config):
    """What a model's input must be; null stands for what nobody recorded."""

    orientation: Literal["RAS", "LAS"]
    """Order of the voxel axes."""
    space: str | None
    """Template space, such as MNI152NLin2009cAsym."""
    grid: Size3
    """Voxels along (H, W, D)."""
    voxel_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Voxel edges in mm."""
    tr_seconds: PositiveFloat | None
    """Repetition time of the runs trained on; null where they differed."""
    frames: PositiveInt
    """Frames of a clip."""
    stride_within: PositiveInt = 1
    """Every how many frames of a run one was taken."""
    normalisation: NormalisationConfig
    """How BOLD was scaled."""
    mask: Literal["template", "box"] | None = None
    """Voxels that were kept: a template's brain, or the whole box."""


class SubjectHashes(Config):
    """Which subjects were trained on, so that a reader can keep them out of a test set, without naming them."""

    salt: str
    """Hexadecimal salt of the hashes."""
    hashes: tuple[str, ...]
    """What `hash_subject` makes of each subject's id."""


class Card(Config):
    """Everything about a set of weights that is not a tensor."""

    format: Literal[1] = 1
    """Version of this layout."""
    kind: Literal["encoder", "simmim", "visible_only"]
    """encoder: a Swin4D alone; else the objective it was trained for, with the mask token and the decoder."""
    model: ModelConfig
    """Architecture."""
    mask: MaskConfig | None = None
    """What was hidden in training (null for an encoder alone)."""
    loss: LossConfig | None = None
    """What was minimised (null for an encoder alone)."""
    input: InputContract
    """What goes in."""
    mup: dict[str, Any] | None = None
    """muP base and multipliers that a reader must apply, as `models.mup.factors` makes them of `model`; null for the standard
    form. Set by `export`."""
    subjects: SubjectHashes | None = None
    """Subjects trained on."""
    provenance: dict[str, Any] | None = None
    """Where the weights come from: run, step, commit, data."""
    sha256: str = ""
    """SHA-256 of the tensor file; set by `export`."""
    bytes: NonNegativeInt = 0
    """Size of the tensor file; set by `export`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "encoder" and (self.mask is None or self.loss is None):
            raise ValueError(f"kind={self.kind} needs mask and loss")
        return self


def hash_subject(subject: str, salt: str) -> str:
    """The salted hash of a subject's id, hexadecimal (HMAC-SHA-256).

    Args:
        subject: the id.
        salt: hexadecimal; keep it with the hashes.
    """
    return hmac.new(bytes.fromhex(salt), subject.encode(), hashlib.sha256).hexdigest()


def hash_subjects(subjects: Iterable[str], salt: str) -> SubjectHashes:
    """The salted hashes of subjects' ids, sorted, for a card."""
    return SubjectHashes(salt=salt, hashes=tuple(sorted({hash_subject(subject, salt) for subject in subjects})))


def export(
    folder: Path,
    weights: nn.Module | Mapping[str, Tensor],
    card: Card | Mapping[str, Any],
    beside: Mapping[str, bytes] | None = None,
) -> Card:
    """Write weights and their card into a new folder; it appears whole or not at all.

    Args:
        folder: must not exist.
        weights: a `Swin4D`, `SimMIM` or `VisibleOnly`, or its state dict.
        card: what `Card` holds; `sha256`, `bytes` and `mup` are filled in.
        beside: contents of further files of the folder, by name.

    Returns:
        The card as written.

    Raises:
        SwiftError: the folder exists or cannot be written, the card is wrong, or the tensors are not the model's.
    """
    card = card if isinstance(card, Card) else _card(card, where="card")
    tensors = dict(weights.state_dict() if isinstance(weights, nn.Module) else weights)
    _check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, card, where=str(folder))
    if folder.exists():
        raise SwiftError(f"{folder}: already exists; choose another folder or delete it")
    scratch = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch / TENSORS)
        measured = {"sha256": sha256(scratch / TENSORS), "bytes": (scratch / TENSORS).stat().st_size}
        written = card.model_copy(update={**measured, "mup": factors(card.model)})
        (scratch / CARD).write_text(written.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for name, content in (beside or {}).items():
            (scratch / name).write_bytes(content)
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        scratch.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise SwiftError(f"{folder}: cannot be written ({error.strerror}); nothing was left there") from error
    except SafetensorError as error:
        raise SwiftError(f"{folder}: cannot be written (disk full or over quota); nothing was left there") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return written


def read_card(folder: Path) -> Card:
    """The card of exported weights.

    Raises:
        SwiftError: it is missing, damaged or of another format.
    """
    path = folder / CARD
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SwiftError(f"{path}: cannot be read ({error.strerror}); give a folder of exported weights") from error
    except ValueError as error:
        raise SwiftError(f"{path}: not valid JSON; export the weights again") from error
    if not isinstance(tree, dict):
        raise SwiftError(f"{path}: expected an object, found {type(tree).__name__}")
    return _card(tree, where=str(path))


def load(folder: Path) -> tuple[dict[str, Tensor], Card]:
    """Tensors (on the CPU, in the number format of the file) and card of exported weights, checked against each other.

    Raises:
        SwiftError: anything is missing, truncated, altered, or does not fit the card's architecture.
    """
    card = read_card(folder)
    _check_mup(str(folder / CARD), card)
    path = folder / TENSORS
    try:
        size = path.stat().st_size
        if size != card.bytes:
            raise SwiftError(f"{path}: {size} bytes where the card says {card.bytes}; it was cut short or replaced")
        if sha256(path) != card.sha256:
            raise SwiftError(f"{path}: its SHA-256 is not the card's; it was altered or damaged, fetch it again")
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iterator)
            _check_tensors(shapes, card, where=str(path))
            return {name: file.get_tensor(name) for name in shapes}, card
    except OSError as error:
        raise SwiftError(f"{path}: cannot be read ({error.strerror}); export the weights again") from error
    except SafetensorError as error:
        raise SwiftError(f"{path}: not a safetensors file; export the weights again") from error


def load_encoder(folder: Path) -> Swin4D:
    """The encoder of exported weights, of either kind, in the number format of the file."""
    tensors, card = load(folder)
    if card.kind != "encoder":
        tensors = {name.removeprefix(ENCODER): t for name, t in tensors.items() if name.startswith(ENCODER)}
    with torch.device("meta"):
        model = Swin4D(card.model)
    model.load_state_dict(tensors, assign=True)
    return model


def load_masked(folder: Path) -> MaskedModel:
    """Encoder, mask token and decoder of exported weights, in the number format of the file; the card's kind says which."""
    tensors, card = load(folder)
    if card.kind == "encoder":
        raise SwiftError(f"{folder}: holds an encoder alone; reconstruction needs weights exported with their decoder")
    with torch.device("meta"):
        model = _masked(card)
    model.load_state_dict(tensors, assign=True)
    return model


def load_simmim(folder: Path) -> SimMIM:
    """SimMIM of exported weights, in the number format of the file.

    Raises:
        SwiftError: they hold an encoder alone or were trained for another objective; or see `load`.
    """
    model = load_masked(folder)
    if not isinstance(model, SimMIM):
        raise SwiftError(f"{folder}: trained for the objective {read_card(folder).kind}, not simmim; use load_masked")
    return model


def check_contract(card: Card, given: InputContract | Mapping[str, Any]) -> None:
    """Refuse input that the weights were not made for.

    What the card records as null is not compared; clips no longer than the card's are fine, and longer ones for decoupled
    models, which know differences of time alone.

    Args:
        card: of the weights.
        given: what is about to be fed to them.

    Raises:
        SwiftError: orientation, space, grid, voxel size, repetition time, clip or normalisation differ; all are named.
    """
    given = given if isinstance(given, InputContract) else build(InputContract, given, where="input contract")
    wanted = card.input
    any_length = card.model.variant == "decoupled"
    differing = [
        f"{name} {_shown(getattr(given, name))} (made for {_shown(getattr(wanted, name))})"
        for name in InputContract.model_fields
        if not _agrees(name, getattr(wanted, name), getattr(given, name)) and not (any_length and name == "frames")
    ]
    if differing:
        raise SwiftError(f"input does not fit the weights of {card.model.name}: {'; '.join(differing)}")


def import_swift_v1(
    checkpoint: Path, contract: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> tuple[Swin4D, Card]:
    """A SwiFT v1 encoder from a Lightning checkpoint, and the card to export it with.

    Args:
        checkpoint: a .ckpt file; nothing in it is run.
        contract: what the file cannot tell of the input: `space`, `voxel_mm`, `tr_seconds`, `normalisation`. Orientation
            is LAS, and grid and frames follow from `img_size`.
        config: keywords of `Swin4D.from_swift_v1`; they go before the checkpoint's `hyper_parameters`.

    Raises:
        SwiftError: the file cannot be read safely, or tells too little; see `Swin4D.from_swift_v1`.
    """
    content = _read_checkpoint(checkpoint)
    hyper = content.get("hyper_parameters") or {}
    hyper = vars(hyper) if isinstance(hyper, argparse.Namespace) else hyper
    known = {key: hyper[key] for key in (*REQUIRED, *DEFAULTS) if hyper.get(key) is not None}
    model = Swin4D.from_swift_v1(content["state_dict"], **(known | dict(config or {})))
    own: dict[str, Any] = {"orientation": "LAS", "grid": model.config.image_size, "frames": model.config.frames}
    if contract.get("orientation", "LAS") != "LAS":
        raise SwiftError(f"{checkpoint}: SwiFT v1 was trained in LAS voxel order, not {contract['orientation']}")
    tree = {
        "kind": "encoder",
        "model": model.config.model_dump(),
        "input": dict(contract) | own,
        "provenance": {"source": "SwiFT v1", "file": checkpoint.name, "sha256": sha256(checkpoint)},
    }
    return model, _card(tree, where="SwiFT v1 input contract")


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SwiftError(f"{path}: cannot be read ({error.strerror})") from error
    except UNREADABLE as error:
        raise SwiftError(
            f"{path}: cannot be read without running code in it, or is damaged; save its state_dict and hyper_parameters "
            "as plain values with torch.save"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise SwiftError(f"{path}: holds no state_dict; give a Lightning checkpoint of SwiFT v1")
    return content


def _card(tree: Mapping[str, Any], where: str) -> Card:
    try:
        return build(Card, tree, where)
    except UsageError as error:
        raise SwiftError(str(error)) from error


def _masked(card: Card) -> MaskedModel:
    if card.kind == "encoder" or card.mask is None or card.loss is None:
        raise AssertionError("an encoder alone has no objective")
    return make_masked(card.kind, card.model, card.mask, card.loss)


def _expected(card: Card) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model: nn.Module = Swin4D(card.model) if card.kind == "encoder" else _masked(card)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_tensors(found: Mapping[str, tuple[int, ...]], card: Card, where: str) -> None:
    expected = _expected(card)
    for problem, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SwiftError(f"{where}: {problem} {min(names)}{more}, going by the card's architecture ({card.kind})")
    for name, shape in found.items():
        if shape != expected[name]:
            raise SwiftError(f"{where}: {name} has shape {shape}, the card's architecture wants {expected[name]}")


def _check_mup(where: str, card: Card) -> None:
    """Make sure that the multipliers that are applied are those that the weights were trained with."""
    if card.mup != factors(card.model):
        raise SwiftError(
            f"{where}: the card's muP multipliers are not those of its model (parametrisation={card.model.parametrisation}, "
            f"width {card.model.embed_dim}, base {card.model.base_embed_dim}): export the weights again"
        )


def _agrees(name: str, wanted: Any, given: Any) -> bool:
    if wanted is None:
        return True
    if given is None:
        return False
    if name == "frames":
        return bool(given <= wanted)
    if name == "tr_seconds":
        return bool(abs(wanted - given) < TOLERANCE)
    if name == "voxel_mm":
        return all(abs(a - b) < TOLERANCE for a, b in zip(wanted, given, strict=True))
    return bool(wanted == given)


def _shown(value: Any) -> str:
    if isinstance(value, NormalisationConfig):
        return f"{value.kind} by {value.scope}"
    return "unknown" if value is None else str(value)
