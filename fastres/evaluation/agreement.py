"""How far a candidate's answers are from those of its reference, on the same images, with or without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastres.quantisation.comparison import noise


@dataclass(frozen=True)
class LayerError:
    """The relative L2 error of a value inside the network, the mean over the images."""

    name: str
    error: float


@dataclass(frozen=True)
class Agreement:
    """The differences from the candidate ``reference``, on the ``images`` that both could read.

    ``same_class`` is the share of images with the same best class. ``logit_error`` is the relative L2 error of an
    image's logits, the mean over the images. ``clear`` counts the images whose margin in the reference exceeds the
    noise (:class:`fastres.quantisation.comparison.Comparison`), and ``clear_same_class`` is the share of these with the
    same best class. They are ``None`` if a file does not give its logits. ``layers`` has the errors of the values in
    the network, in its order, measured on ``layers_images`` images; if it is ``None``, ``layers_reason`` says why.
    """

    reference: str
    images: int
    same_class: float
    logit_error: float | None
    clear: int | None
    clear_same_class: float | None
    layers: tuple[LayerError, ...] | None = None
    layers_images: int = 0
    layers_reason: str | None = None


def agreement(
    reference: str,
    predicted: np.ndarray,
    expected: np.ndarray,
    errors: np.ndarray,
    deviations: np.ndarray,
    margins: np.ndarray,
) -> Agreement | None:
    """Return the agreement on N images, ``None`` if N is 0.

    ``predicted`` and ``expected`` are the answers of the candidate and of its reference, −1 for none. ``errors`` are
    relative errors of the logits, ``deviations`` their standard deviations and ``margins`` the reference's. All are
    ``[N]``, and NaN where they are unknown.
    """
    if not len(predicted):
        return None
    same = predicted == expected
    known = ~np.isnan(errors)
    if not known.any():
        return Agreement(reference, len(same), float(same.mean()), None, None, None)
    limit = noise(torch.from_numpy(deviations[known].astype(np.float64)))
    clear = known & (margins > limit)
    return Agreement(
        reference,
        len(same),
        float(same.mean()),
        float(errors[known].mean()),
        int(clear.sum()),
        float(same[clear].mean()) if clear.any() else None,
    )
