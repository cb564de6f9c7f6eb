"""White and brown noise, and what tells a process from either: its autocorrelation and its spectrum.

A process is given by its covariance at the points of a grid, float64 ``[P, P]``; what a finite sample of it shows is
computed in expectation, so that no sampling error is added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import slope


def expected_autocorrelation(covariance: Tensor) -> Tensor:
    """The autocorrelation ``[P]`` by lag of a process with this covariance ``[P, P]``: expected autocovariance of the
    sample, its mean removed, over the expected variance.
    """
    centred = _centred(covariance)
    sums = torch.stack([centred.diagonal(lag).sum() for lag in range(len(centred))])
    return sums / sums[0]


def spectral_exponent(covariance: Tensor) -> float:
    """The slope of log power against log frequency, expected of a process with this covariance: 0 white, −2 brown.

    The frequency k stands as 2 sin(πk/P), in which a random walk's spectrum is a straight line; k up to P/4.
    """
    count = len(covariance)
    frequencies = torch.arange(1, count // 4 + 1)
    phase = 2 * math.pi * frequencies[:, None] * torch.arange(count) / count
    waves = torch.complex(phase.cos(), phase.sin()).to(torch.complex128)  # [frequencies, P]
    power = (waves @ _centred(covariance).to(torch.complex128) * waves.conj()).sum(1).real
    return slope((2 * torch.sin(math.pi * frequencies / count)).log().tolist(), power.log().tolist())


def _centred(covariance: Tensor) -> Tensor:
    """The covariance of the process less its mean over the sample."""
    rows = covariance - covariance.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def white_noise(points: int) -> Tensor:
    return torch.eye(points, dtype=torch.float64)


def brown_noise(points: int) -> Tensor:
    """A random walk's covariance: that of the shorter of two walks."""
    steps = torch.arange(1, points + 1, dtype=torch.float64)
    return torch.minimum(steps[:, None], steps)


def correlation(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal().sqrt()
    return covariance / deviation[:, None] / deviation


def off_diagonal_mean(matrix: Tensor) -> float:
    count = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))
