"""A generated cohort with known traits: files as a scanner and fMRIPrep would leave them."""

from swiftv2.data.synth.cohort import SynthReport, generate

__all__ = ["SynthReport", "generate"]
