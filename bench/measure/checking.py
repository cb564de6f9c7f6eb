"""Correctness before time: an engine's logits against the same network in float64, on images that differ.

The yardstick is eager PyTorch's own error in the same dtype on the same images: an engine rounds at other places, so it
may be off by about as much, and not by more. In float32 that error depends on which kernels eager's processor gets, so
there an engine may always be off by as much as plain sums are (``rounding.py``).
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.bench.engines.eager import EagerResNet
from fastres.bench.engines.peers import EAGER, FASTRES, Engine, Peer
from fastres.errors import FastresError

from .calibration import smooth_images, spread
from .rounding import float32_sums

# Images compared at least: the error of a few images varies too much to be a yardstick. Small networks have few logits,
# whose errors vary more: on 8 images one of resnet20 in float16 is up to 1.3 times as far off as eager by luck alone.
IMAGES, IMAGES_OF_SMALL_NETWORKS = 8, 64
CHUNK = 32  # images at a time through the float64 network: bounds its memory
SEED = 20_000  # of the images; calibration uses small seeds

# Error accepted, in multiples of eager's. float32 errors are sums of many small roundings whose order an engine is free
# to choose; in half precision each activation's rounding dominates, and every engine rounds those. Other engines are
# not ours to judge to the same limit (Winograd convolutions, say), but a wrong layout or a wrong weight is seen at 4.
FLOAT32_FACTOR, HALF_FACTOR, PEER_FACTOR = 2.0, 1.25, 4.0
WORST_FACTOR = 2.0  # more for the worst image: the largest of a few errors varies more than their mean

# Images whose logits are all alike hide mistakes; see calibration.py.
LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class Error:
    """Of the relative L2 errors of images' logits the root mean square, ``typical``, and the largest, ``worst``."""

    typical: float
    worst: float

    @staticmethod
    def of(found: Tensor, expected: Tensor) -> Error:
        """Of ``found`` against ``expected`` ``[N, classes]``; infinite for another shape, NaN where one is NaN."""
        if found.shape != expected.shape:
            return Error(math.inf, math.inf)
        found, expected = found.double().cpu(), expected.double().cpu()
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        return Error(float(errors.square().mean().sqrt()), float(errors.max()))  # max() propagates NaN

    def within(self, limit: Error) -> bool:
        """Whether neither exceeds the limit's; never for NaN."""
        return self.typical <= limit.typical and self.worst <= limit.worst


@dataclass(frozen=True)
class Checks:
    """Batches ``[N, 3, H, W]`` in the device and dtype under test, their float64 logits, and the logits' spread.

    ``sums`` is the error that float32 sums make, zero in other dtypes.
    """

    batches: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    spread: float
    sums: Error


@torch.inference_mode()
def make_checks(module: EagerResNet, batch: int, size: int, device: torch.device, dtype: torch.dtype) -> Checks:
    """At least two batches, of at least ``IMAGES`` images (more of small networks), and ``module``'s float64 logits.

    The reference sees the images rounded to ``dtype``, so what is compared is computation alone. Where one batch is
    enough, the second is the first in another order. Raises ``FastresError`` where the logits hardly depend on the
    image: such a check would pass on wrong engines.
    """
    reference = copy.deepcopy(module).to(device, torch.float64)
    least = IMAGES_OF_SMALL_NETWORKS if module.architecture.stem == "cifar" else IMAGES
    count = max(least, batch) // batch * batch
    images = _images(count, size).to(device, dtype)
    logits = torch.cat([reference(part.double()).cpu() for part in images.split(CHUNK)])
    found = spread(logits)
    if not found >= LEAST_SPREAD:
        raise FastresError(
            f"Logits of {module.architecture.name} at {size}×{size} differ between images by {found:.3f} of their "
            f"norm; at least {LEAST_SPREAD} is needed to tell a right engine from a wrong one. Use other weights"
        )
    sums = Error(0.0, 0.0)
    if dtype == torch.float32:
        with float32_sums(reference):
            sums = Error.of(reference(images[:IMAGES].double()), logits[:IMAGES])
    if count == batch:
        images, logits = torch.cat([images, images.roll(1, 0)]), torch.cat([logits, logits.roll(1, 0)])
    return Checks(images.split(batch), logits.split(batch), found, sums)


@functools.lru_cache(maxsize=1)  # the dtypes of a setting follow one another
def _images(count: int, size: int) -> Tensor:
    return smooth_images(count, size, size, SEED)


@torch.inference_mode()
def relative_error(engine: Engine, peer: Peer, checks: Checks) -> Error:
    """How far ``engine``'s logits of all batches are off."""
    # Copied at once: an engine may give the same memory each time, as a replayed graph does.
    found = [peer.as_tensor(engine(peer.example(x))).to("cpu", torch.float64, copy=True) for x in checks.batches]
    if any(part.shape != expected.shape for part, expected in zip(found, checks.logits, strict=True)):
        return Error(math.inf, math.inf)
    return Error.of(torch.cat(found), torch.cat(checks.logits))


def error_limit(peer: Peer, dtype: torch.dtype, eager: Error, checks: Checks) -> Error:
    """The largest errors accepted of ``peer``, given ``eager``'s own.

    Eager's own limit is a quarter of the spread: beyond it rounding blurs the differences between images.
    """
    if peer.name == EAGER.name:
        return Error(checks.spread / 4, checks.spread / 4)
    factor = FLOAT32_FACTOR if dtype == torch.float32 else HALF_FACTOR
    factor = factor if peer.name == FASTRES.name else PEER_FACTOR
    return Error(
        max(factor * eager.typical, checks.sums.typical),
        WORST_FACTOR * max(factor * eager.worst, checks.sums.worst),
    )
