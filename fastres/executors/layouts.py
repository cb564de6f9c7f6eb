"""The layout of activations between oneDNN's primitives: channels-last, or in blocks of channels.

In blocks, the channels of a vector register lie next to each other, then the next pixel: oneDNN's ``nChw16c`` with
AVX-512, and ``nChw8c`` with AVX2. In float32, oneDNN's convolutions of blocks are as fast as those of channels-last
activations or faster. ``python -m bench.layouts`` measures by how much; docs/performance.md shows its results.
"""

from __future__ import annotations

import torch

from fastres.network.plan import Conv, Plan, Shape, SqueezeExcite, Stem

# Networks whose last stage has fewer channels, such as the 64 of those for small images, are faster channels-last with
# AVX2, and as fast with AVX-512, where small batches are faster in blocks.
FEWEST_CHANNELS, LARGEST_NARROW = 256, 2
# With AVX-512, a single image of more pixels is faster channels-last.
MOST_PIXELS_ALONE = 160 * 160
_AVX_512 = 16  # lanes


def can_be_blocked(plan: Plan, lanes: int | None) -> bool:
    """Return True if oneDNN has fast convolutions for all steps of ``plan`` with activations in blocks of ``lanes``.

    ``lanes`` are those of the processor's vectors, in float32; ``None`` if they are unknown.
    """
    if lanes is None or plan.quantisation is not None or plan.stem.weight.dtype != torch.float32:
        return False
    convolutions = [step for step in plan if isinstance(step, (Stem, Conv))]
    return (
        all(step.weight.shape[0] % lanes == 0 for step in convolutions)
        and all(step.groups == 1 for step in convolutions if isinstance(step, Conv))
        and not any(isinstance(step, SqueezeExcite) for step in plan)  # torch's operators run it
    )


def is_faster_blocked(shape: Shape, lanes: int, features: int) -> bool:
    """Return True if images of ``shape`` (NHWC) run faster in blocks of ``lanes`` channels.

    ``features`` are the channels of the network's last stage.
    """
    n, h, w, _ = shape
    if features < FEWEST_CHANNELS:
        return n <= LARGEST_NARROW and lanes == _AVX_512
    return n > 1 or lanes != _AVX_512 or h * w <= MOST_PIXELS_ALONE
