"""White and brown noise, and two measures that distinguish them: the autocorrelation and the spectrum.

A process is given by its covariance at the points of a grid, float64 ``[P, P]``. The measures are expected values over
finite samples of the process, so there is no sampling error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import slope


def expected_autocorrelation(covariance: Tensor) -> Tensor:
    """Return the autocorrelation ``[P]`` by lag of a process with this covariance ``[P, P]``.

    It is the expected autocovariance of a sample with its mean removed, divided by the expected variance.
    """
    centred = _centred(covariance)
    sums = torch.stack([centred.diagonal(lag).sum() for lag in range(len(centred))])
    return sums / sums[0]


def spectral_exponent(covariance: Tensor) -> float:
    """Return the slope of expected log power against log frequency: 0 for white noise, −2 for brown noise.

    The frequency k, up to P/4, is measured as 2 sin(πk/P), because the spectrum of a random walk is a straight line in
    it.
    """
    count = len(covariance)
    frequencies = torch.arange(1, count // 4 + 1)
    phase = 2 * math.pi * frequencies[:, None] * torch.arange(count) / count
    waves = torch.complex(phase.cos(), phase.sin()).to(torch.complex128)  # [frequencies, P]
    power = (waves @ _centred(covariance).to(torch.complex128) * waves.conj()).sum(1).real
    return slope((2 * torch.sin(math.pi * frequencies / count)).log().tolist(), power.log().tolist())


def _centred(covariance: Tensor) -> Tensor:
    """Return the covariance of the process after subtracting its mean over the sample."""
    rows = covariance - covariance.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def white_noise(points: int) -> Tensor:
    return torch.eye(points, dtype=torch.float64)


def brown_noise(points: int) -> Tensor:
    """Return a random walk's covariance: for two points, the number of steps to the earlier one."""
    steps = torch.arange(1, points + 1, dtype=torch.float64)
    return torch.minimum(steps[:, None], steps)


def correlation(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal().sqrt()
    return covariance / deviation[:, None] / deviation


def off_diagonal_mean(matrix: Tensor) -> float:
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))
