"""The correctness check before timing: an engine's logits compared with the same network in float64.

The check uses several different images. The accepted error is a small multiple of eager PyTorch's own error in the same
dtype on the same images, because an engine may round in different places. In float32, eager's error depends on the
kernels that PyTorch chooses for the processor. There an engine's error may always be as large as that of plain sums
(``rounding.py``).

In int8, the reference is the arithmetic of the plan in 8 bit, with exact sums. An engine may round a sum the other way
where two levels are equally near, and every later layer amplifies that. It must be nearer to the reference than the
network in float64 is.
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
from fastres.executors.reference import ReferenceExecutor
from fastres.images.transforms import normalised
from fastres.network.plan import Plan

from .calibration import pixels, smooth_images, spread
from .rounding import float32_sums

# The minimum number of images to compare: the error of fewer images varies too much. Small networks have few logits,
# whose errors vary more: on 8 images in float16, a correct resnet20 may have 1.3 times eager's error by chance.
IMAGES, IMAGES_OF_SMALL_NETWORKS = 8, 64
CHUNK = 32  # images per pass through the float64 network, which bounds its memory
SEED = 20_000  # for the images; calibration uses small seeds

# The accepted error in multiples of eager's. A float32 error is a sum of many small roundings, and an engine may choose
# their order. In half precision the rounding of activations dominates, and every engine rounds those. Other engines get
# a wider limit, because they may use Winograd convolutions, for example. A factor of 4 still reveals a wrong layout or
# weight.
FLOAT32_FACTOR, HALF_FACTOR, PEER_FACTOR = 2.0, 1.25, 4.0
INT8_PEER_FACTOR = 2.0  # an engine that adds residuals in 8 bit rounds once more in each block
WORST_FACTOR = 2.0  # extra factor for the worst image: the largest error varies more than the mean

# If the logits of all images are nearly equal, they hide mistakes; see calibration.py.
LEAST_SPREAD = 0.1


@dataclass(frozen=True)
class Error:
    """Relative L2 errors of the logits over images: ``typical`` is the root mean square and ``worst`` the largest."""

    typical: float
    worst: float

    @staticmethod
    def of(found: Tensor, expected: Tensor) -> Error:
        """Return the error of ``found`` compared with ``expected`` ``[N, classes]``.

        It is infinite if the shapes differ, and NaN if a logit is NaN.
        """
        if found.shape != expected.shape:
            return Error(math.inf, math.inf)
        found, expected = found.double().cpu(), expected.double().cpu()
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        return Error(float(errors.square().mean().sqrt()), float(errors.max()))  # max() propagates NaN

    def within(self, limit: Error) -> bool:
        """Return True if neither error exceeds the limit. NaN is never within it."""
        return self.typical <= limit.typical and self.worst <= limit.worst


@dataclass(frozen=True)
class Checks:
    """Batches ``[N, 3, H, W]`` on the device and in the dtype under test, their float64 logits, and their spread.

    ``sums`` is the error of plain float32 sums, or zero in other dtypes. In int8, batches are float32 and ``in_8_bit``
    has the reference's logits of the first images.
    """

    batches: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    spread: float
    sums: Error
    in_8_bit: Tensor | None = None

    def expected(self, peer: Peer) -> Tensor:
        """Return the logits to compare with: of all images, or of the first ones."""
        if self.in_8_bit is None or peer.name == EAGER.name:
            return torch.cat(self.logits)
        return self.in_8_bit


@torch.inference_mode()
def make_checks(
    module: EagerResNet, batch: int, size: int, device: torch.device, dtype: torch.dtype, in_8_bit: Plan | None = None
) -> Checks:
    """Return at least two batches with at least ``IMAGES`` images (more for small networks), and their float64 logits.

    The reference gets the images rounded to ``dtype``, so that only the computation is compared. With a plan in 8 bit
    they are normalised pixels in float32, which it takes without a loss. If one batch is
    enough, the second holds the same images in another order. Raise ``FastresError`` if the logits hardly depend on the
    image, because wrong engines would pass such a check.
    """
    reference = copy.deepcopy(module).to(device, torch.float64)
    least = IMAGES_OF_SMALL_NETWORKS if module.architecture.stem == "cifar" else IMAGES
    count = max(least, batch) // batch * batch
    if in_8_bit is None:
        images = _images(count, size).to(device, dtype)
    else:
        images = normalised(pixels(_images(count, size)) / 255, in_8_bit.stem.mean, in_8_bit.stem.std)
    logits = torch.cat([reference(part.double()).cpu() for part in images.split(CHUNK)])
    found = spread(logits)
    if not found >= LEAST_SPREAD:
        raise FastresError(
            f"Logits of {module.architecture.name} at {size}×{size} differ between images by {found:.3f} of their "
            f"norm; a correctness check needs at least {LEAST_SPREAD}. Use other weights"
        )
    sums = Error(0.0, 0.0)
    if dtype == torch.float32:
        with float32_sums(reference):
            sums = Error.of(reference(images[:IMAGES].double()), logits[:IMAGES])
    rounded = None
    if in_8_bit is not None:
        (rounded,) = ReferenceExecutor(in_8_bit).run(images[:IMAGES])
    if count == batch:
        images, logits = torch.cat([images, images.roll(1, 0)]), torch.cat([logits, logits.roll(1, 0)])
    return Checks(images.split(batch), logits.split(batch), found, sums, rounded)


@functools.lru_cache(maxsize=1)  # settings that differ only in dtype follow one another
def _images(count: int, size: int) -> Tensor:
    return smooth_images(count, size, size, SEED)


@torch.inference_mode()
def relative_error(engine: Engine, peer: Peer, checks: Checks) -> Error:
    """Return the error of ``engine``'s logits over all batches."""
    # Copy at once: an engine may return the same memory each time, as a replayed graph does.
    found = [peer.as_tensor(engine(peer.example(x))).to("cpu", torch.float64, copy=True) for x in checks.batches]
    if any(part.shape != expected.shape for part, expected in zip(found, checks.logits, strict=True)):
        return Error(math.inf, math.inf)
    expected = checks.expected(peer)
    return Error.of(torch.cat(found)[: len(expected)], expected)


def error_limit(peer: Peer, dtype: torch.dtype, eager: Error, checks: Checks) -> Error:
    """Return the largest accepted errors for ``peer``, given ``eager``'s error.

    Eager's own limit is a quarter of the spread. With a larger error, rounding would hide the differences between
    images.
    """
    if peer.name == EAGER.name:
        return Error(checks.spread / 4, checks.spread / 4)
    if checks.in_8_bit is not None:
        own = Error.of(torch.cat(checks.logits)[: len(checks.in_8_bit)], checks.in_8_bit)
        factor = 1.0 if peer.name == FASTRES.name else INT8_PEER_FACTOR
        return Error(factor * own.typical, factor * own.worst)
    factor = FLOAT32_FACTOR if dtype == torch.float32 else HALF_FACTOR
    factor = factor if peer.name == FASTRES.name else PEER_FACTOR
    return Error(
        max(factor * eager.typical, checks.sums.typical),
        WORST_FACTOR * max(factor * eager.worst, checks.sums.worst),
    )
