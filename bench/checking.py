"""Correctness before time: an engine's logits against the same network in float64, on images that differ.

The yardstick is eager PyTorch's own error in the same dtype on the same images: an engine rounds at other places, so it
may be off by about as much, and not by more.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.errors import FastresError

from .calibration import smooth_images, spread
from .eager import EagerResNet
from .peers import EAGER, FASTRES, Engine, Peer

# Images compared at least: the largest error of a few images varies too much to be a yardstick.
IMAGES = 8
CHUNK = 32  # images at a time through the float64 network: bounds its memory
SEED = 20_000  # of the images; calibration uses small seeds

# Error accepted, in multiples of eager's. float32 errors are sums of many small roundings whose order an engine is free
# to choose; in half precision each activation's rounding dominates, and every engine rounds those. Other engines are
# not ours to judge to the same limit (Winograd convolutions, say), but a wrong layout or a wrong weight is seen at 4.
FLOAT32_FACTOR, HALF_FACTOR, PEER_FACTOR = 2.0, 1.25, 4.0

# Images whose logits are all alike hide mistakes; see calibration.py.
LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class Checks:
    """Batches ``[N, 3, H, W]`` in the device and dtype under test, their float64 logits, and the logits' spread."""

    batches: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    spread: float


@torch.inference_mode()
def make_checks(module: EagerResNet, batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Checks:
    """At least two batches and at least ``IMAGES`` images, with the logits of ``module`` in float64.

    The reference sees the images rounded to ``dtype``, so what is compared is computation alone. Where one batch is
    enough, the second is the first in another order. Raises ``FastresError`` where the logits hardly depend on the
    image: such a check would pass on wrong engines.
    """
    reference = copy.deepcopy(module).to(device, torch.float64)
    count = max(IMAGES, batch) // batch * batch
    images = _images(count, size).to(device, dtype)
    logits = torch.cat([reference(part.double()).cpu() for part in images.split(CHUNK)])
    found = spread(logits)
    if not found >= LEAST_SPREAD:
        raise FastresError(
            f"Logits of {module.architecture.name} at {size}×{size} differ between images by {found:.3f} of their "
            f"norm; at least {LEAST_SPREAD} is needed to tell a right engine from a wrong one. Use other weights"
        )
    if count == batch:
        images, logits = torch.cat([images, images.roll(1, 0)]), torch.cat([logits, logits.roll(1, 0)])
    return Checks(images.split(batch), logits.split(batch), found)


@functools.lru_cache(maxsize=1)  # the dtypes of a setting follow one another
def _images(count: int, size: int) -> Tensor:
    return smooth_images(count, size, size, SEED)


@torch.inference_mode()
def relative_error(engine: Engine, peer: Peer, checks: Checks) -> float:
    """Largest relative L2 error of any image's logits; infinite for logits of another shape, NaN for NaN."""
    errors = []
    for x, expected in zip(checks.batches, checks.logits, strict=True):
        found = peer.as_tensor(engine(peer.example(x)))
        if found.shape != expected.shape:
            return float("inf")
        errors.append((found.double().cpu() - expected).norm(dim=1) / expected.norm(dim=1))
    return float(torch.cat(errors).max())  # max() propagates NaN


def error_limit(peer: Peer, dtype: torch.dtype, eager_error: float, checks: Checks) -> float:
    """The largest error accepted of ``peer``, given eager's own.

    Eager's own limit is a quarter of the spread: beyond it rounding blurs the differences between images.
    """
    if peer.name == EAGER.name:
        return checks.spread / 4
    if peer.name != FASTRES.name:
        return PEER_FACTOR * eager_error
    return (FLOAT32_FACTOR if dtype == torch.float32 else HALF_FACTOR) * eager_error
