"""Projectors on the disk: one safetensors file whose header tells how the projector is made and what it goes on."""

from pathlib import Path

import safetensors
import safetensors.torch
from safetensors import SafetensorError

from swiftv2.errors import SwiftError
from swiftv2.files import write_file
from swiftv2.models.projector import Projector

_SIZES = ("width", "hidden", "out")


def save_projector(path: Path, projector: Projector, weights_sha256: str) -> None:
    """Write a projector; the file appears whole or not at all.

    Args:
        path: the file, `*.safetensors`; an older one is replaced.
        projector: what is written.
        weights_sha256: of the weights whose embeddings it goes on, as their card tells it.
    """
    header = {name: str(getattr(projector, name)) for name in _SIZES}
    header |= {"unit": str(projector.unit), "dropout": str(projector.dropout), "weights_sha256": weights_sha256}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, safetensors.torch.save(tensors, header))


def load_projector(path: Path, weights_sha256: str | None = None) -> Projector:
    """The projector of a file, on the CPU, for evaluation.

    Args:
        path: the file.
        weights_sha256: of the weights whose embeddings it is to go on; not looked at when None.

    Raises:
        SwiftError: the file cannot be read, is no projector's, or goes on other weights' embeddings.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        width, hidden, out = (int(header[name]) for name in _SIZES)
        projector = Projector(width, hidden, out, float(header["dropout"]), unit=header["unit"] == "True")
        projector.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "not what save_projector writes"
        raise SwiftError(f"{path}: no projector ({reason}): save it again") from error
    if weights_sha256 is not None and header["weights_sha256"] != weights_sha256:
        raise SwiftError(
            f"{path}: a projector of embeddings of other weights (sha256 {header['weights_sha256'][:12]}, not "
            f"{weights_sha256[:12]}): train one for these"
        )
    return projector.eval()
