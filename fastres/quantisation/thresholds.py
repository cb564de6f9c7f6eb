"""From the histogram of a value to its scale: by the largest value, a percentile, the squared error, or the entropy.

A scale that covers the largest value wastes levels if this value is rare. The other methods clip rare values, so that
the others are rounded more finely:

- ``max`` clips nothing;
- ``percentile`` clips a share of 0.01 % of the values (``percentile-99.9``: 0.1 %), half at each end if there are two;
- ``mse`` has the least mean squared error;
- ``nmse`` has the least normalised mean squared error: an image's squared error relative to the squares of its values,
  in the mean over the images. If a few images have values many times larger than all others, their squared errors are
  larger, too, and ``mse`` gives them most of the levels;
- ``nrmse`` has the least normalised root mean squared error, the mean of the roots of the same. It clips such images,
  where ``nmse`` finds a compromise;
- ``entropy`` loses the least information: the Kullback-Leibler divergence of the histogram from its rounded form, as
  in TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastres.network.quantisation import LARGEST, Scale

from .histogram import BINS, Histogram
from .image_histograms import ImageBins

Range = tuple[float, float]  # the least and the largest number that are not clipped; 0 lies between them
# The ranges that are tried at each end: shares of the whole, first far apart, then around the best of these. The
# largest come first, so that of equal ones the one that clips least is taken.
_FAR = 2.0 ** (-np.arange(33) / 4)
_NEAR = 2.0 ** (np.arange(3, -4, -1) / 16)


def scale_of(histogram: Histogram, method: str) -> Scale:
    """Return the scale of a value by ``method``, one of :data:`METHODS`.

    A value that is always 0 has scale 1. A value without negative numbers has zero point 0.
    """
    if histogram.limit == 0:
        return Scale(1.0)
    return scale_for(*METHODS[method](histogram))


def scale_for(least: float, largest: float) -> Scale:
    """Return the scale whose levels cover the numbers from ``least`` to ``largest``, and 0 exactly."""
    least, largest = min(least, 0.0), max(largest, 0.0)
    step = max((largest - least) / LARGEST, float(np.finfo(np.float32).tiny))
    return Scale(step, round(-least / step))


def _max(histogram: Histogram) -> Range:
    return histogram.least, histogram.largest


def _percentile(share: float) -> Callable[[Histogram], Range]:
    """Return the method that clips ``share`` of the values."""

    def found(histogram: Histogram) -> Range:
        below = np.cumsum(histogram.counts)
        each = share * below[-1] / (2 if histogram.signed else 1)
        last = int(np.searchsorted(below, below[-1] - each))
        first = int(np.searchsorted(below, each, side="right")) if histogram.signed else 0
        half = histogram.width / 2
        return _within(histogram, histogram.centres[first] - half, histogram.centres[min(last, BINS - 1)] + half)

    return found


def _within(histogram: Histogram, least: float, largest: float) -> Range:
    """Return a range of whole bins without the parts where there are no values."""
    least = max(float(least), histogram.least) if histogram.signed else 0.0
    return min(least, 0.0), max(min(float(largest), histogram.largest), 0.0)


def _mse(histogram: Histogram) -> Range:
    used = histogram.counts > 0
    centres, counts = histogram.centres[used], histogram.counts[used]
    low, high = centres - histogram.width / 2, centres + histogram.width / 2
    return _best_range(histogram, lambda scale: float(counts @ _squared_errors(low, high, scale)))


def _nmse(histogram: Histogram) -> Range:
    return _best_range(histogram, _image_error(histogram.images.bins(), 1.0))


def _nrmse(histogram: Histogram) -> Range:
    return _best_range(histogram, _image_error(histogram.images.bins(), 0.5))


def _image_error(bins: ImageBins, power: float) -> Callable[[Scale], float]:
    """Return the function that gives the mean of the images' squared relative errors, each to this ``power``."""
    if not len(bins.shares):  # the few numbers other than 0 are not among those that were counted
        return lambda scale: 0.0
    return lambda scale: float(((bins.shares @ _squared_errors(bins.low, bins.high, scale)) ** power).mean())


def _best_range(histogram: Histogram, error: Callable[[Scale], float]) -> Range:
    """Return the range whose scale has the least ``error``."""
    least, largest = min(histogram.least, 0.0), max(histogram.largest, 0.0)

    def best(range_of: Callable[[float], Range]) -> Range:
        def tried(share: float) -> float:
            return error(scale_for(*range_of(share)))

        far = min(_FAR, key=tried)
        return range_of(min((far * _NEAR).clip(max=1), key=tried))

    if not histogram.signed:
        return best(lambda share: (0.0, largest * share))
    both = best(lambda share: (least * share, largest * share))  # first both ends, then each end alone
    both = best(lambda share: (least * share, both[1]))
    return best(lambda share: (both[0], largest * share))


def _squared_errors(low: NDArray[np.float64], high: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    """Return the mean squared error of values that are evenly spread from ``low`` to ``high``.

    A level can be narrower than a bin, if a few values are much larger than the others.
    """
    lowest, highest = -scale.zero_point, LARGEST - scale.zero_point

    def integral(x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of the squared distance to the nearest level, from 0 to ``x``, in steps of the scale."""
        level = np.rint(x).clip(lowest, highest)
        return level / 12 + (x - level) ** 3 / 3

    low, high = low / scale.scale, high / scale.scale
    return (integral(high) - integral(low)).clip(min=0) / (high - low) * scale.scale**2


def _entropy(histogram: Histogram) -> Range:
    counts = histogram.counts.astype(np.float64)
    levels = LARGEST + 1
    if histogram.signed:  # by size, whatever the sign; each sign has half of the levels
        counts, levels = counts[BINS // 2 :] + counts[BINS // 2 - 1 :: -1], levels // 2
    counts[0] = counts[1]  # ReLU makes many zeros, which every scale keeps exactly
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else len(counts)
    ends = range(last, levels - 1, -max(1, (last - levels) // 128)) if last > levels else [last]
    divergence = [_divergence(counts, end, levels) for end in ends]  # of equal ones, the one that clips least
    size = ends[int(np.argmin(divergence))] * histogram.width
    return _within(histogram, -size, size)


def _divergence(counts: NDArray[np.float64], end: int, levels: int) -> float:
    """Return the divergence of the bins below ``end``, those above clipped into the last, from their mean per level."""
    kept = counts[:end].copy()
    level = np.arange(end) * levels // end
    used = kept > 0
    mass = np.bincount(level, kept, levels)
    width = np.bincount(level, used, levels)
    rounded = np.where(used, (mass / np.maximum(width, 1))[level], 0.0)
    kept[-1] += counts[end:].sum()
    # A clipped bin that the rounded form lacks would make the divergence infinite.
    rounded[-1] = rounded[-1] or 1.0
    share, other = kept / max(kept.sum(), 1.0), rounded / max(rounded.sum(), 1.0)
    positive = share > 0
    return float((share[positive] * np.log(share[positive] / other[positive])).sum())


METHODS: dict[str, Callable[[Histogram], Range]] = {
    "max": _max,
    "percentile": _percentile(1e-4),
    "percentile-99.9": _percentile(1e-3),
    "mse": _mse,
    "nmse": _nmse,
    "nrmse": _nrmse,
    "entropy": _entropy,
}
