"""Shared test subjects: whether the GPU is of the TMA kernels' family, and networks with every kind of step."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastres.network.architectures import Architecture, get_architecture

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

# Deep stem, window pools, projections and squeeze-and-excitation, small.
EVERY_STEP = Architecture(
    "small",
    "bottleneck",
    (1, 2),
    (16, 24),
    stem="deep",
    stem_widths=(8, 8, 16),
    shortcut="average_pool",
    squeeze_excitation=True,
    num_classes=10,
)


def shallow(name: str) -> Architecture:
    """Return a network as wide as the published one, with the fewest blocks that include every kind."""
    return replace(get_architecture(name), depths=(1, 2), widths=(64, 128))
