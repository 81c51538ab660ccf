"""Exported swiftv2 weights as the model `swiftv2` of brainmarks (https://github.com/MedARC-AI/Brainmarks)."""

from typing import Any

import numpy as np
import templateflow.api
from brainmarks import nisc
from brainmarks.models.base import Embeddings
from brainmarks.models.registry import register_model
from numpy.typing import NDArray
from swiftv2_brainmarks import SPACE, Encoder, Transform, prepare


class Wrapper(Encoder):
    """The encoder, with results as brainmarks names them."""

    def forward(self, batch: dict[str, Any]) -> Embeddings:
        """`Encoder.forward` as `Embeddings`."""
        return Embeddings(*super().forward(batch))


def brain_mask() -> NDArray[np.bool_]:
    """(Z, Y, X) of the voxels that brainmarks' samples hold: the mask of its reader of volumes."""
    path = templateflow.api.get(SPACE, desc="brain", resolution=2, suffix="mask", extension="nii.gz")
    return np.asarray(nisc.read_mni152_2mm_data(path, interpolation="nearest") > 0).squeeze()


@register_model
def swiftv2(weights: str | None = None, *, other_space: bool = False) -> tuple[Transform, Wrapper]:
    """See `swiftv2_brainmarks.prepare`; brainmarks calls this by its name."""
    transform, folder = prepare(weights, other_space=other_space, mask=brain_mask)
    return transform, Wrapper(folder, transform)
