"""Reference definitions of the kernels in plain PyTorch: the same layouts, in the inputs' dtype (use float64).

Nothing here is fast. The kernels are tested against these definitions. The definitions in 8 bit take and return
integers; the CPU's kernels, exported files and the GPU's kernels may differ from them by one level, where a sum in
float32 is rounded the other way.
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


def quantised_conv2d(
    x: Tensor,
    scale: float,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
    output_scale: float | None = None,
    output_zero_point: int = 0,
) -> Tensor:
    """Convolve uint8 ``x`` [N, H, W, groups·C], zero point 0, with int8 ``weight`` [groups·K, R, S, C].

    The sums of integer products are exact. ``sum · scale · weight_scale + bias``, then the residual ``residual_scale ·
    (residual - residual_zero_point)`` and ReLU are computed in float64. ``bias`` and ``weight_scale`` are [groups·K],
    ``residual`` and the result uint8 [N, P, Q, groups·K]; without ``output_scale``, the result is float64.
    """
    y = functional.conv2d(nchw(x).double(), nchw(weight).double(), None, stride, padding, 1, groups)
    y = y.permute(0, 2, 3, 1) * (weight_scale.double() * scale) + bias.double()
    if residual is not None:
        y = y + residual_scale * (residual.double() - residual_zero_point)
    y = y.relu() if relu else y
    return y if output_scale is None else quantised(y, output_scale, output_zero_point)


def quantised(x: Tensor, scale: float, zero_point: int = 0) -> Tensor:
    """Round ``x`` to the nearest of the levels 0 … 255, where level q stands for ``scale · (q - zero_point)``.

    Ties go to the even number before the zero point is added. NaN has no level: the result is undefined.
    """
    return ((x.double() / scale).round() + zero_point).clamp(0, 255).to(torch.uint8)


def quantised_stem(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    stride: int,
    padding: int,
    pool: bool,
    output_scale: float,
) -> Tensor:
    """Run the stem on ``x`` [N, 3, H, W], uint8 pixels or normalised values; return uint8 [N, P, Q, K].

    ``weight`` is int8 [K, R, S, 3] and multiplies pixels; ``weight_scale`` and ``bias`` include the normalisation.
    Normalised values are first rounded to the pixels that they come from. The padding is the pixel nearest to ``mean``,
    which stands for 0.
    """
    x = pixels(x, mean, std)
    border = (torch.tensor(mean, dtype=torch.float64, device=x.device) * 255).round()
    padded = border.view(1, 3, 1, 1).repeat(x.shape[0], 1, x.shape[2] + 2 * padding, x.shape[3] + 2 * padding)
    padded[:, :, padding : padding + x.shape[2], padding : padding + x.shape[3]] = x.double()
    y = quantised_conv2d(
        padded.permute(0, 2, 3, 1), 1.0, weight, weight_scale, bias, stride=stride, relu=True, output_scale=output_scale
    )
    return window_pool(y.double(), "max").to(torch.uint8) if pool else y


def pixels(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the uint8 pixels [N, 3, H, W] nearest to normalised ``x``; uint8 ``x`` is returned as it is."""
    if x.dtype == torch.uint8:
        return x
    centre, width = (torch.tensor(list(v), dtype=torch.float64, device=x.device).view(1, 3, 1, 1) for v in (mean, std))
    return ((x.double() * width + centre) * 255).round().clamp(0, 255).to(torch.uint8)


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
