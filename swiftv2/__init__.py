"""SwiFT v2: pretraining of 4-D fMRI foundation models, from a laptop to many nodes."""

__version__ = "0.1.0"
