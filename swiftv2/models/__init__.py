"""Swin4D encoders, decoders and SimMIM; nothing here knows of files."""

from swiftv2.models.initialise import decay_names
from swiftv2.models.simmim import SimMIM, SimMIMOutput
from swiftv2.models.swin4d import Swin4D

__all__ = ["SimMIM", "SimMIMOutput", "Swin4D", "decay_names"]
