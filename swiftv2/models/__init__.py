"""Swin4D encoders, decoders, SimMIM and visible-only encoding; nothing here knows of files."""

from swiftv2.models.initialise import decay_names
from swiftv2.models.mup import learning_rates
from swiftv2.models.simmim import MaskedModel, SimMIM, SimMIMOutput
from swiftv2.models.swin4d import Swin4D
from swiftv2.models.visible import VisibleOnly

__all__ = ["MaskedModel", "SimMIM", "SimMIMOutput", "Swin4D", "VisibleOnly", "decay_names", "learning_rates"]
