"""Class-activation maps: where in the picture the evidence for a class lies.

Zhou et al., *Learning deep features for discriminative localization*, CVPR 2016. A ResNet ends in an average over the
cells of its last stage and a linear classifier, so that a class's logit is the average of a map plus its bias: nothing
is approximated.
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
    """Maps of ``classes`` over the last stage, float32 ``[N, K, h, w]``, for images ``x`` ``[N, 3, H, W]``.

    ``maps[n, k] = Σ_c fc.weight[classes[k], c] · layer4[n, c]``, and ``maps.mean((2, 3)) + fc.bias[classes]`` are the
    logits ``[N, K]``. ``classes`` is one index, a sequence of K of them for all images, an integer tensor ``[N, K]``
    with a row for each image, or ``None`` for the class with each image's highest logit (K = 1). ``x`` is as
    :class:`fastres.Model` takes it. :func:`at_pixels` places maps over the image.

    Raises ``ClassifierError`` where the model has none and ``InputError`` for classes that it does not have.
    """
    require_classifier(model, "class_activation_maps")
    stage = f"layer{len(model.architecture.depths)}"
    features = model.features(x, [stage])[stage].float()  # [N, C, h, w]
    state = model.state_dict()
    weight, bias = state["fc.weight"], state["fc.bias"]
    if classes is None:
        classes = (features.mean((2, 3)) @ weight.T + bias).argmax(1, keepdim=True)
    indices = _indices(classes, len(x), len(weight)).to(weight.device)
    return torch.einsum("nkc,nchw->nkhw", weight[indices], features)


def at_pixels(maps: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Maps ``[N, K, h, w]`` at every pixel of images of ``size`` (H, W): bilinear between cells, ``[N, K, H, W]``.

    Cell ``i`` is centred on pixel ``stride · i``, because every strided convolution of a ResNet pads by half its width
    and begins at its first pixel. Stretching the map over the image would shift it by half a cell, 15½ pixels at
    ``layer4``. Pixels outside the outermost centres take the nearest cell's value.
    """
    rows, columns = (
        (torch.arange(length, device=maps.device) / stride).clamp(max=cells - 1)
        for length, cells in zip(size, maps.shape[-2:], strict=True)
    )
    return _interpolate(_interpolate(maps, rows, dim=-2), columns, dim=-1)


def _interpolate(values: Tensor, positions: Tensor, dim: int) -> Tensor:
    """``values`` at fractional ``positions`` along ``dim``, linear in between."""
    low = positions.floor().long()
    high = positions.ceil().long()
    share = (positions - low).view(-1, *[1] * (-1 - dim))
    return values.index_select(dim, low) * (1 - share) + values.index_select(dim, high) * share


def _indices(classes: int | Sequence[int] | Tensor, batch: int, count: int) -> Tensor:
    """``classes`` as an int64 tensor ``[N, K]``; raises ``InputError`` where they are none."""
    try:
        indices = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"classes is {classes!r}; give indices from 0 to {count - 1}") from error
    if indices.dim() < 2:
        indices = indices.reshape(1, -1).expand(batch, -1)
    if indices.dim() != 2 or len(indices) != batch or not indices.shape[1] or indices.dtype not in _INTEGERS:
        raise InputError(
            f"classes has shape {list(indices.shape)} and dtype {dtype_name(indices.dtype)}; give an "
            f"index, a sequence of indices, or an integer tensor [{batch}, K]"
        )
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= count):
        raise InputError(f"classes has {indices.unique().tolist()}; the network has classes 0 to {count - 1}")
    return indices.long()


_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
