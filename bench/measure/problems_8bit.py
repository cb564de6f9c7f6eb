"""Problems for the kernels in 8 bit: random numbers, a launch that writes into a given output, and the right result.

A result in 8 bit is never exact: levels may differ by one where a number lies half-way between two of them, and e4m3
keeps 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import reference
from fastres.kernels.conv_8bit import E4M3, LEVELS, WEIGHT_DTYPES, compensation, conv2d_8bit_into
from fastres.kernels.routing.grouping import merge_groups
from fastres.kernels.routing.rules import ConvShape
from fastres.kernels.stem_8bit import image_lanes, pack_stem_weight_8bit, stem_8bit_into
from fastres.network.normalisation import IMAGENET_MEAN, IMAGENET_STD

from .calibration import pixels, smooth_images
from .kernel_timing import draw

# The largest accepted relative L2 error. One level in a thousand may differ by one: 3e-4 of levels of some 100. If all
# differed, the error would be 1e-2. Rounding to e4m3 gives some 2.5e-2.
LIMITS = {LEVELS: 1e-3, E4M3: 4e-2}


@dataclass(frozen=True)
class Problem:
    """``run()`` writes ``y``. ``expected``, float64, has the right result of the first images, in units of ``y``.

    For uint8 it is rounded to levels, for e4m3 it is not rounded.
    """

    run: Callable[[], None]
    y: Tensor
    expected: Tensor

    @property
    def error(self) -> float:
        """The relative L2 error of the first images of ``y``."""
        found = self.y[: len(self.expected)].double()
        return float((found - self.expected).norm() / self.expected.norm())

    def assert_right(self) -> None:
        limit = LIMITS[self.y.dtype]
        assert self.error <= limit, f"relative error {self.error:.2e}, accepted: {limit:.0e}"


def conv_problem(
    shape: ConvShape, dtype: torch.dtype, device: torch.device, *, residual: bool, relu: bool, checked: int = 4
) -> Problem:
    """Return a convolution of uint8 or e4m3 (``dtype``) of random numbers, of which ``checked`` images are checked."""
    channels, size = shape.K * shape.groups, (shape.N, shape.P, shape.Q, shape.K * shape.groups)
    x = _drawn((shape.N, shape.H, shape.W, shape.C * shape.groups), dtype, device)
    weight = _drawn((channels, shape.R, shape.S, shape.C), WEIGHT_DTYPES[dtype], device)
    added = _drawn(size, dtype, device) if residual else None
    weight_scale, bias = _scales(channels, weight, 110.0 if dtype == LEVELS else 8.0, device)
    packed, groups = merge_groups(weight, shape.groups)
    y = _unwritten(size, dtype, device)
    scales: dict[str, Any] = {"residual_scale": 0.02, "residual_zero_point": 90 if dtype == LEVELS else 0}
    zero_point = 128 if dtype == LEVELS and not relu else 0
    output_scale = 0.03 if dtype == LEVELS else 0.1
    form: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding, "relu": relu}
    sums = compensation(packed)

    def run() -> None:
        conv2d_8bit_into(
            y, x, packed, weight_scale, bias, added, x_scale=1.0, output_scale=output_scale,
            output_zero_point=zero_point, groups=groups, added=sums, **scales, **form,
        )  # fmt: skip

    some = None if added is None else added[:checked]
    exact = reference.quantised_conv2d(
        x[:checked], 1.0, weight, weight_scale, bias, some, groups=shape.groups, **scales, **form
    )
    return Problem(run, y, _expected(exact, dtype, output_scale, zero_point))


def stem_problem(
    batch: int, size: int, dtype: torch.dtype, device: torch.device, *, raw: bool, checked: int = 4
) -> Problem:
    """Return the stem of ImageNet networks with uint8 or e4m3 results, on pixels (``raw``) or normalised images."""
    images = smooth_images(batch, size, size)
    x = pixels(images).to(device) if raw else images.to(device, torch.float16)
    weight = _drawn((64, 7, 7, 3), WEIGHT_DTYPES[dtype], device)
    weight_scale, bias = _scales(64, weight, 60.0 if dtype == LEVELS else 1.0, device)
    packed, lanes = pack_stem_weight_8bit(weight), image_lanes(IMAGENET_MEAN, IMAGENET_STD, weight.dtype, device)
    pooled = (size + 3) // 4
    y, output_scale, sums = _unwritten((batch, pooled, pooled, 64), dtype, device), 0.03, compensation(packed)
    form: dict[str, Any] = {"stride": 2, "padding": 3, "pool": True}

    def run() -> None:
        stem_8bit_into(
            y, x, packed, weight_scale, bias, lanes, filter_size=7, output_scale=output_scale, added=sums, **form
        )

    if dtype == LEVELS:
        exact = reference.quantised_stem(
            x[:checked], weight, weight_scale, bias, IMAGENET_MEAN, IMAGENET_STD, output_scale=output_scale, **form
        ).double()
        return Problem(run, y, exact)
    values = reference.pixels(x[:checked], IMAGENET_MEAN, IMAGENET_STD) if raw else x[:checked].double()
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    values = ((values / 255.0 - mean) / std if raw else values).to(E4M3).double()
    real = weight.double() * weight_scale.double()[:, None, None, None]
    exact = reference.stem(values, real, bias, IMAGENET_MEAN, IMAGENET_STD, **form)
    return Problem(run, y, _expected(exact, dtype, output_scale, 0))


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random numbers: levels and int8 with standard deviations of some 50, e4m3 of 8."""
    if dtype == E4M3:
        return draw(shape, torch.float32, device, 8.0).to(dtype)
    values = draw(shape, torch.float32, device, 50.0).round()
    return (values.abs() if dtype == LEVELS else values.clamp(-127, 127)).clamp(max=255).to(dtype)


def _scales(channels: int, weight: Tensor, spread: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scales of ``weight`` that give results of unit variance from inputs of this ``spread``, and a bias."""
    size = spread * weight.float().std() * weight[0].numel() ** 0.5
    scale = (1 + 0.2 * draw((channels,), torch.float32, device).clamp(-2, 2)) / size
    return scale, draw((channels,), torch.float32, device, 0.5)


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, 255 if dtype == LEVELS else torch.nan, dtype=dtype, device=device)


def _expected(exact: Tensor, dtype: torch.dtype, scale: float, zero_point: int) -> Tensor:
    if dtype == LEVELS:
        return reference.quantised(exact, scale, zero_point).double()
    return (exact / scale).clamp(-448, 448)
