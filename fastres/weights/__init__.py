"""Checkpoints: which are published, and any of them → a state dict with torchvision's names.

Finds, downloads, reads, translates and checks. Ends at tensors by name; never folds or runs a network.
"""

from .fitting import FreshHeadWarning
from .published import BUNDLED_MODEL, DEFAULT, WeightsEntry, entries, get_entry
from .state import LoadedWeights, load_state

__all__ = [
    "BUNDLED_MODEL",
    "DEFAULT",
    "FreshHeadWarning",
    "LoadedWeights",
    "WeightsEntry",
    "entries",
    "get_entry",
    "load_state",
]
