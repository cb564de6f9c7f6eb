"""Checkpoints: list the published ones, and load any checkpoint as a state dict with torchvision's names.

This package finds, downloads, reads, translates and checks weights. It returns tensors by name; it does not fold or run
networks.
"""

from .checkpoints import MisnamedFileWarning
from .fitting import FreshHeadWarning
from .hub import CachedRevisionWarning
from .published import BUNDLED_MODEL, DEFAULT, WeightsEntry, entries, get_entry
from .state import LoadedWeights, load_state

__all__ = [
    "BUNDLED_MODEL",
    "DEFAULT",
    "CachedRevisionWarning",
    "FreshHeadWarning",
    "LoadedWeights",
    "MisnamedFileWarning",
    "WeightsEntry",
    "entries",
    "get_entry",
    "load_state",
]
