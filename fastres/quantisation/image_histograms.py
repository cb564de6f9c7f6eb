"""Histograms of single images, for errors relative to an image's own values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A bin holds the float32 numbers with the same sign, exponent and first three bits of the mantissa, so there are eight
# in an octave. The bits after these are shifted out.
_SHIFT, _OCTAVE, _SIGN = 20, 8, 1 << 11
# So many bins are kept below an image's largest value, for each sign. All smaller values together change an error by
# less than a millionth.
_KEPT = 16 * _OCTAVE
_MOST_VALUES = 2**16  # of an image


@dataclass(frozen=True)
class ImageBins:
    """Bins with values from ``low`` to ``high`` ``[B]``, and ``shares`` ``[N, B]``.

    An image's shares are its counts, divided by the sum of the squares of its values. The sum of shares times mean
    squared errors is the image's squared relative error.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    shares: NDArray[np.float64]


class ImageHistograms:
    """Counts of the values of each image. If it has very many, some are counted, at equal distances.

    They lie in arrays that grow by doubling. Small pieces, kept from each batch, would lie between its activations, and
    the memory of these could not be used again for larger ones.
    """

    def __init__(self) -> None:
        self._images = 0
        self._counts: NDArray[np.int32] = np.zeros((0, 2, _KEPT), np.int32)
        self._ends: NDArray[np.int64] = np.zeros(0, np.int64)  # the bin after the last that is kept
        self._squares: NDArray[np.float64] = np.zeros(0, np.float64)

    def add(self, values: Tensor) -> None:
        """Count the ``values`` of images, finite float32 numbers ``[N, M]``."""
        # An odd distance visits all channels, of which there is mostly an even number.
        values = values[:, :: -(-values.shape[1] // _MOST_VALUES) | 1].contiguous()
        first, self._images = self._images, self._images + len(values)
        self._grow()
        squares = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()
        self._squares[first : self._images] = squares.cpu().numpy()
        bins = values.view(torch.int32).bitwise_right_shift(_SHIFT).bitwise_and_(2 * _SIGN - 1)
        for index, image in enumerate(bins, first):
            counts = torch.bincount(image, minlength=2 * _SIGN).cpu().numpy().reshape(2, _SIGN)
            counts[:, :_OCTAVE] = 0  # zeros and subnormal numbers
            used = np.flatnonzero(counts.any(0))
            end = max(_KEPT, int(used[-1]) + 1) if len(used) else _KEPT
            self._counts[index], self._ends[index] = counts[:, end - _KEPT : end], end

    def _grow(self) -> None:
        before = len(self._ends)
        if self._images <= before:
            return
        more = max(self._images, 2 * before) - before
        self._counts = np.concatenate([self._counts, np.zeros((more, 2, _KEPT), np.int32)])
        self._ends = np.concatenate([self._ends, np.zeros(more, np.int64)])
        self._squares = np.concatenate([self._squares, np.zeros(more, np.float64)])

    def bins(self) -> ImageBins:
        """Return the bins that are in use, with the images that have values other than 0."""
        some = np.flatnonzero(self._squares[: self._images])
        every = np.zeros((len(some), 2, _SIGN), np.float64)
        for row, index in enumerate(some):
            end = self._ends[index]
            every[row, :, end - _KEPT : end] = self._counts[index] / self._squares[index]
        shares = every.reshape(len(some), 2 * _SIGN)
        used = np.flatnonzero(shares.any(0))
        near, far = (_number(used % _SIGN + place) for place in (0, 1))
        negative = used >= _SIGN
        low, high = np.where(negative, -far, near), np.where(negative, -near, far)
        return ImageBins(low, high, shares[:, used])


def _number(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the smallest numbers of bins of positive numbers."""
    bits = (bins << _SHIFT).astype(np.uint32)
    return np.minimum(bits.view(np.float32).astype(np.float64), np.finfo(np.float32).max)
