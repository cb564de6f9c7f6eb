"""Where in the network a candidate begins to differ from its reference: the error of every value inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastres.network.plan import LOGITS
from fastres.quantisation.comparison import relative_errors

from .agreement import LayerError
from .candidates import Candidate

IMAGES = 32
AT_ONCE = 8  # images, because all values inside the network are in memory


def reason_without(candidate: Candidate, reference: Candidate) -> str | None:
    """Return why the values inside the two networks cannot be compared, or ``None`` if they can."""
    if candidate.model != reference.model:
        return f"{candidate.name} and {reference.name} are different networks"
    for each in (candidate, reference):
        if each.layers is None:
            return f"{each.name} gives no values from inside the network"
    if candidate.transforms != reference.transforms:
        return "their preprocessing differs"
    return None


def layer_errors(
    candidate: Candidate,
    reference: Candidate,
    pixels: Tensor,
    reference_pixels: Tensor,
    values: Sequence[str],
    advance: Callable[[int], object] = lambda images: None,
) -> tuple[LayerError, ...]:
    """Return the errors of ``values`` in ``candidate``, for uint8 ``pixels`` ``[N, 3, crop, crop]``.

    ``reference_pixels`` are the same on the device of ``reference``. Values that one of the two does not have are left
    out. The error of an image is relative to its values in the reference (L2).
    """
    assert candidate.layers is not None
    assert reference.layers is not None
    found: dict[str, list[Tensor]] = {}
    for part, same in zip(pixels.split(AT_ONCE), reference_pixels.split(AT_ONCE), strict=True):
        own, other = candidate.layers(part, values), reference.layers(same, values)
        for name in values:
            if name in own and name in other:
                pair = (tensor.double().cpu().flatten(1) for tensor in (own[name], other[name]))
                found.setdefault(name, []).append(relative_errors(*pair))
        advance(len(part))
    return tuple(LayerError(name, float(torch.cat(errors).mean())) for name, errors in found.items())


def compared_values(outputs: Sequence[str]) -> tuple[str, ...]:
    """Return the values to compare: the outputs of all steps except for the logits, which every image compares."""
    return tuple(name for name in outputs if name != LOGITS)
