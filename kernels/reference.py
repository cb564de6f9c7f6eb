"""Reference definitions of the kernels in plain PyTorch: the same layouts, in the inputs' dtype (use float64).

Nothing here is fast. The kernels are tested against these definitions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Convolve ``x`` [N, H, W, groups·C] with ``weight`` [groups·K, R, S, C].

    ``residual`` and the result are [N, P, Q, groups·K].
    """
    y = functional.conv2d(nchw(x), nchw(weight), bias.to(x.dtype), stride, padding, 1, groups)
    y = y.permute(0, 2, 3, 1)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    stride: int,
    padding: int,
    pool: bool,
) -> Tensor:
    """Run the stem on ``x`` [N, 3, H, W], uint8 pixels or normalised values; return [N, P, Q, K].

    ``weight`` is [K, R, S, 3], not packed.
    """
    if x.dtype == torch.uint8:
        centre = torch.tensor(mean, dtype=weight.dtype, device=x.device).view(1, 3, 1, 1)
        scale = torch.tensor(std, dtype=weight.dtype, device=x.device).view(1, 3, 1, 1)
        x = (x.to(weight.dtype) / 255 - centre) / scale
    y = functional.conv2d(x.to(weight.dtype), nchw(weight), bias.to(weight.dtype), stride, padding).relu()
    if pool:
        y = functional.max_pool2d(y, 3, 2, 1)
    return y.permute(0, 2, 3, 1)


def average_pool(x: Tensor) -> Tensor:
    """Average over the pixels: [N, H, W, C] to [N, C]."""
    return x.mean((1, 2))


def window_pool(x: Tensor, mode: str) -> Tensor:
    """Pool [N, H, W, C] to [N, ⌈H/2⌉, ⌈W/2⌉, C].

    ``mode`` is ``"max"`` for 3×3/2 maxima, else 2×2/2 averages; only pixels inside the image count.
    """
    if mode == "max":
        y = functional.max_pool2d(nchw(x), 3, 2, 1)
    else:
        y = functional.avg_pool2d(nchw(x), 2, 2, ceil_mode=True, count_include_pad=False)
    return y.permute(0, 2, 3, 1)


def squeeze_excite(
    x: Tensor,
    residual: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> Tensor:
    """Gate ``x`` by squeeze-and-excitation, add ``residual`` and apply ReLU.

    ``x``, ``residual`` and the result are [N, H, W, C], the weights [S, C] and [C, S].
    """
    squeezed = linear(x.mean((1, 2)), squeeze_weight, squeeze_bias).relu()
    gate = linear(squeezed, expand_weight, expand_bias).sigmoid()
    return (x * gate[:, None, None, :] + residual).relu()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply ``x`` [N, C] by ``weight`` [K, C] and add ``bias`` [K]."""
    return functional.linear(x, weight, bias.to(x.dtype))


def nchw(tensor: Tensor) -> Tensor:
    """View [A, B, C, D] as [A, D, B, C]: NHWC activations as NCHW, KRSC weights as KCRS."""
    return tensor.permute(0, 3, 1, 2)
