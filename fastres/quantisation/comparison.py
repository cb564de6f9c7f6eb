"""How far the logits of a plan in 8 bit are from those of the float plan: the error, the agreement, the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A float32 margin is clear of the noise if it is this many standard deviations of the noise in a difference of logits.
CLEAR = 2.0


@dataclass(frozen=True)
class Comparison:
    """The differences from float32 on ``images`` images.

    ``logit_error`` is the relative L2 error of an image's logits (of its pooled features without a classifier), the
    mean over the images; ``snr_db`` is the same as a signal-to-noise ratio. ``agreement`` is the share of images with
    the same best class. ``clear`` counts the images whose float32 margin (the best logit minus the second) exceeds the
    noise, and ``clear_agreement`` is the share of these with the same best class. The shares are ``None`` if there is
    no classifier or no such image.

    The noise is ``CLEAR · √2 · σ``. An image's σ is the standard deviation of the errors of its logits (their mean
    changes no order of classes), and σ the median over the images. So neither the error nor the noise depends on a few
    images with large logits.
    """

    images: int
    logit_error: float
    agreement: float | None
    clear: int
    clear_agreement: float | None

    @property
    def snr_db(self) -> float:
        return math.inf if self.logit_error == 0 else -20 * math.log10(self.logit_error)


def compare(found: Tensor, truth: Tensor, classes: bool = True) -> Comparison:
    """Compare outputs ``[N, …]`` in 8 bit with those in float32; ``classes`` means that they are logits."""
    found, truth = found.double().cpu(), truth.double().cpu()
    error = float(relative_errors(found, truth).mean())
    if not classes:
        return Comparison(len(truth), error, None, 0, None)
    same = found.argmax(1) == truth.argmax(1)
    clear = margins(truth) > noise(deviations(found, truth))
    count = int(clear.sum())
    return Comparison(
        len(truth), error, float(same.double().mean()), count, float(same[clear].double().mean()) if count else None
    )


def relative_errors(found: Tensor, truth: Tensor) -> Tensor:
    """Return the relative L2 errors of the rows, ``[N]``; of a row of zeros in ``truth``, the absolute one."""
    sizes, errors = truth.norm(dim=1), (found - truth).norm(dim=1)
    return torch.where(sizes > 0, errors / sizes, errors)


def margins(logits: Tensor) -> Tensor:
    """Return by how much the best logit of each row exceeds the second; infinity if there is one class."""
    if logits.shape[1] < 2:
        return torch.full((len(logits),), math.inf, dtype=logits.dtype, device=logits.device)
    best = logits.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def deviations(found: Tensor, truth: Tensor) -> Tensor:
    """Return the standard deviation of the errors of each row, ``[N]``."""
    difference = found - truth
    return (difference - difference.mean(1, keepdim=True)).square().mean(1).sqrt()


def noise(sigmas: Tensor) -> float:
    """Return the margin below which the noise may change the best class (see :class:`Comparison`)."""
    return CLEAR * math.sqrt(2) * float(sigmas.median())
