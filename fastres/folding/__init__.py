"""From a state dict to a Plan with batch norm folded, and from a Plan to one with convolutions joined.

Works on tensors and steps; never reads a file or runs a network.
"""

from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD

from .build import BATCH_NORM_EPSILON, build_plan, fold_batch_norm, outline, pad_shortcut_weight

__all__ = [
    "BATCH_NORM_EPSILON",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "build_plan",
    "fold_batch_norm",
    "outline",
    "pad_shortcut_weight",
]
