"""Class-activation maps, which show where in a picture the evidence for a class is.

Zhou et al., *Learning deep features for discriminative localization*, CVPR 2016. A ResNet ends in an average over the
cells of its last stage and a linear classifier. So the logit of a class is exactly the average of its map plus its
bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastres.errors import InputError
from fastres.model.predict import require_classifier
from fastres.text import dtype_name

if TYPE_CHECKING:
    from fastres.model.model import Model


def class_activation_maps(model: Model, x: Tensor, classes: int | Sequence[int] | Tensor | None = None) -> Tensor:
    """Return maps of ``classes`` over the last stage, float32 ``[N, K, h, w]``, for images ``x`` ``[N, 3, H, W]``.

    ``maps[n, k] = Σ_c fc.weight[classes[k], c] · layer4[n, c]``, and ``maps.mean((2, 3)) + fc.bias[classes]`` are the
    logits ``[N, K]``. ``classes`` is one index, a sequence of K indices for all images, an integer tensor ``[N, K]``
    with a row for each image, or ``None`` for the class with the highest logit of each image (K = 1). ``x`` is an input
    of :class:`fastres.Model`. :func:`at_pixels` maps the result to the pixels of the image.

    Raises ``ClassifierError`` if the model has no classifier and ``InputError`` for classes that it does not have.
    """
    require_classifier(model, "class_activation_maps")
    stage = f"layer{len(model.architecture.depths)}"
    features = model.features(x, [stage])[stage].float()  # [N, C, h, w]
    weight, bias = model.classifier
    with torch.autocast(features.device.type, enabled=False):
        if classes is None:
            classes = (features.mean((2, 3)) @ weight.T + bias).argmax(1, keepdim=True)
        indices = _indices(classes, len(x), len(weight)).to(weight.device)
        return torch.einsum("nkc,nchw->nkhw", weight[indices], features)


def at_pixels(maps: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Return maps ``[N, K, h, w]`` at every pixel of images of ``size`` (H, W), ``[N, K, H, W]``.

    The values between cells are interpolated bilinearly. Cell ``i`` is centred on pixel ``stride · i``, because every
    strided convolution of a ResNet pads by half its width and starts at the first pixel. Stretching the map over the
    image would shift it by half a cell, 15½ pixels at ``layer4``. Pixels outside the outermost centres have the value
    of the nearest cell.
    """
    rows, columns = (
        (torch.arange(length, dtype=torch.int64, device=maps.device) / stride).clamp(max=cells - 1)
        for length, cells in zip(size, maps.shape[-2:], strict=True)
    )
    return _interpolate(_interpolate(maps, rows, dim=-2), columns, dim=-1)


def _interpolate(values: Tensor, positions: Tensor, dim: int) -> Tensor:
    """Return ``values`` at fractional ``positions`` along ``dim``, with linear interpolation."""
    low = positions.floor().long()
    high = positions.ceil().long()
    share = (positions - low).view(-1, *[1] * (-1 - dim))
    return values.index_select(dim, low) * (1 - share) + values.index_select(dim, high) * share


def _indices(classes: int | Sequence[int] | Tensor, batch: int, count: int) -> Tensor:
    """Return ``classes`` as an int64 tensor ``[N, K]``; raises ``InputError`` if they are not valid classes."""
    try:
        indices = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"classes is {classes!r}; pass indices from 0 to {count - 1}") from error
    if indices.dim() < 2:
        indices = indices.reshape(1, -1).expand(batch, -1)
    if indices.dim() != 2 or len(indices) != batch or not indices.shape[1] or indices.dtype not in _INTEGERS:
        raise InputError(
            f"classes has shape {list(indices.shape)} and dtype {dtype_name(indices.dtype)}; pass an "
            f"index, a sequence of indices, or an integer tensor [{batch}, K]"
        )
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= count):
        raise InputError(f"classes has {indices.unique().tolist()}; pass indices from 0 to {count - 1}")
    return indices.long()


_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
