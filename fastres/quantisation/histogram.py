"""A histogram of bounded size whose range grows with the values, and does not depend on their order."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .image_histograms import ImageHistograms

BINS = 4096  # at least half of them are in use: 8 for each level of 8 bit
LEAST_LIMIT = 2.0**-100  # so that the width of a bin and its inverse are float32 numbers


class Histogram:
    """Counts of values, with their least and largest.

    The bins cover ``[0, limit)``, or ``[-limit, limit)`` if ``signed``. ``limit`` is the smallest power of two that no
    value exceeds. If a larger value comes, pairs of bins are joined, so that the counts are the same in any order.
    ``images`` has the histograms of single images.
    """

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.images = ImageHistograms()
        self.limit = 0.0  # no value yet, or only zeros
        self.least, self.largest = math.inf, -math.inf
        self._zeros = 0  # values that came while the limit was 0

    def add(self, values: Tensor) -> None:
        """Count the ``values`` of images, ``[N, C, H, W]`` or ``[N, C]``.

        They are finite float32 numbers, and at least 0 unless the histogram is ``signed``.
        """
        places = values.permute(0, 2, 3, 1) if values.dim() == 4 else values  # as they lie in memory
        rows = tuple(range(places.dim() - 1))
        largest = float(places.amax(rows).max())  # much faster than the maximum of all
        least = float(places.amin(rows).min()) if self.signed else 0.0
        self.least, self.largest = min(self.least, least), max(self.largest, largest)
        size = max(-least, largest)
        if size == 0:
            self._add_zeros(places.numel())
            return
        self._widen(max(2.0 ** math.ceil(math.log2(size)), LEAST_LIMIT))
        self.images.add(places.reshape(len(places), -1))
        places = places.reshape(-1) / self.width
        places = places.floor_().add_(BINS // 2) if self.signed else places
        found = torch.bincount(places.to(torch.int16), minlength=BINS + 1).cpu().numpy()
        self.counts += found[:BINS]
        self.counts[-1] += found[BINS]  # values equal to the limit

    @property
    def centres(self) -> NDArray[np.float64]:
        """The numbers in the middle of the bins."""
        return self._lowest + (np.arange(BINS, dtype=np.float64) + 0.5) * self.width

    @property
    def width(self) -> float:
        """The width of a bin."""
        return (self.limit - self._lowest) / BINS

    @property
    def _lowest(self) -> float:
        return -self.limit if self.signed else 0.0

    def _add_zeros(self, count: int) -> None:
        if self.limit:
            self.counts[BINS // 2 if self.signed else 0] += count
        else:
            self._zeros += count

    def _widen(self, limit: float) -> None:
        if not self.limit:
            self.limit = limit
            self._add_zeros(self._zeros)
        while self.limit < limit:
            around = BINS // 4 if self.signed else 0
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), (around, BINS // 2 - around))
            self.limit *= 2
