"""Steps in 8 bit on oneDNN: weights packed into its layouts, and its integer convolutions and products.

1×1 convolutions of stride 1 are products of matrices. oneDNN's matrix product takes less time to call than its
convolution, and it alone adds the residual without a copy. So it computes these convolutions if they are small or have
a residual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastres.network.plan import Conv, Plan, Shape, Stem
from fastres.network.quantisation import LARGEST, WEIGHT_LIMIT, WEIGHT_LIMIT_WITHOUT_VNNI, Scale

from .cpu import pack_step

# Below so many multiply-accumulates, the matrix product saves more time in the call than its kernel may lose.
SMALL_MACS = 100e6

_NO_SCALARS: list[float] = []
_NO_DILATION = [1, 1]


@dataclass(frozen=True, eq=False)
class Int8Conv:
    """A convolution in 8 bit with its weight in oneDNN's layout. The tuples are arguments of oneDNN's operator."""

    weight: Tensor
    before: tuple[Any, ...]  # between the input and the bias: the input's scale, the weight and its scales
    bias: Tensor
    geometry: tuple[Any, ...]  # stride, padding, dilation, groups
    output: tuple[Any, ...]  # scale, zero point, dtype
    added: tuple[Any, ...]  # scale and zero point of the residual
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise.default(
            x, *self.before, self.bias, *self.geometry, *self.output, self.activation, _NO_SCALARS, ""
        )

    def add_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Overwrite ``residual`` with the result, including the residual, and return it."""
        torch.ops.onednn.qconv2d_pointwise.binary(
            x, *self.before, residual, self.bias, *self.geometry, *self.output, *self.added, "sum", 1.0,
            self.activation, _NO_SCALARS, "",
        )  # fmt: skip
        return residual


@dataclass(frozen=True, eq=False)
class Int8Product:
    """A 1×1 convolution of stride 1 in 8 bit, as a product of matrices, with the fields of :class:`Int8Conv`."""

    weight: Tensor
    before: tuple[Any, ...]
    bias: Tensor
    output: tuple[Any, ...]
    added: tuple[Any, ...]
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.of_rows(x.permute(0, 2, 3, 1).reshape(-1, c))
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)

    def of_rows(self, x: Tensor) -> Tensor:
        """Multiply the rows of ``x`` ``[M, C]``; return ``[M, K]``."""
        return torch.ops.onednn.qlinear_pointwise.default(
            x, *self.before, self.bias, *self.output, self.activation, _NO_SCALARS, ""
        )

    def add_(self, residual: Tensor, x: Tensor) -> Tensor:
        """Overwrite ``residual`` with the result, including the residual, and return it."""
        rows, into = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), residual.permute(0, 2, 3, 1)
        torch.ops.onednn.qlinear_pointwise.binary(
            rows, *self.before, into.view(-1, into.shape[3]), self.bias, *self.output, *self.added, "sum", 1.0,
            self.activation, _NO_SCALARS, "",
        )  # fmt: skip
        return residual


def is_product(step: Conv, macs: float) -> bool:
    """Return True if a product of matrices computes ``step``, of so many multiply-accumulates."""
    plain = step.weight.shape[1:3] == (1, 1) and step.stride == 1 and step.groups == 1 and step.padding == 0
    return plain and (step.residual is not None or macs < SMALL_MACS)


def pack_convolution(
    step: Stem | Conv, scale: Tensor, x: Scale, y: Scale, added: Scale | None, activation: str, shape: Shape
) -> Int8Conv:
    """Pack a convolution for an input of ``shape`` (NHWC). ``x``, ``y`` and ``added`` are scales of values.

    The input of a stem is padded already.
    """
    n, h, w, c = shape
    groups, padding = (step.groups, step.padding) if isinstance(step, Conv) else (1, 0)
    if isinstance(step, Stem):
        h, w = h + 2 * step.padding, w + 2 * step.padding
    strides, pads = [step.stride] * 2, [padding] * 2
    weight = torch.ops.onednn.qconv_prepack(
        step.weight.permute(0, 3, 1, 2).contiguous(), scale, x.scale, 0, strides, pads, _NO_DILATION, groups,
        [n, c, h, w],
    )  # fmt: skip
    before = (x.scale, 0, weight, scale, _zeros(len(scale)))
    geometry = (strides, pads, _NO_DILATION, groups)
    return Int8Conv(weight, before, step.bias, geometry, _output(y), _added(added), activation)


def pack_product(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    x: Scale,
    y: Scale | None,
    added: Scale | None,
    activation: str,
    rows: int,
) -> Int8Product:
    """Pack a product of ``rows`` rows with ``weight`` ``[K, C]``; the result is float32 if ``y`` is ``None``."""
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), [rows, weight.shape[1]])
    before = (x.scale, 0, packed, scale, _zeros(len(scale)))
    return Int8Product(packed, before, bias, _output(y), _added(added), activation)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device="cpu")


def _output(scale: Scale | None) -> tuple[Any, ...]:
    return (1.0, 0, torch.float32) if scale is None else (scale.scale, scale.zero_point, torch.uint8)


def _added(scale: Scale | None) -> tuple[Any, ...]:
    return () if scale is None else (scale.scale, scale.zero_point)


def limited(plan: Plan, limit: int) -> Plan:
    """Return ``plan`` with weights of at most ``limit``, rounded again where they are larger; itself if none is."""
    assert plan.quantisation is not None
    in_8_bit = [step for step in plan if step.name in plan.quantisation.weights]
    if all(int(step.weight.abs().amax()) <= limit for step in in_8_bit):
        return plan
    steps, scales = list(plan.steps), dict(plan.quantisation.weights)
    for index, step in enumerate(steps):
        if step.name not in scales or int(step.weight.abs().amax()) <= limit:
            continue
        ratio = limit / WEIGHT_LIMIT
        weight = (step.weight.double() * ratio).round().to(torch.int8)
        before = step.weight.double() * scales[step.name].double().view(-1, *[1] * (step.weight.dim() - 1))
        scales[step.name] = (scales[step.name].double() / ratio).to(torch.float32)
        bias = step.bias
        if isinstance(step, Stem):  # a picture in the mean colour still gives the same result
            after = weight.double() * scales[step.name].double().view(-1, 1, 1, 1)
            mean = torch.tensor(step.mean, dtype=torch.float64, device="cpu")
            bias = (bias.double() + ((before - after) * 255 * mean).sum((1, 2, 3))).to(torch.float32)
        steps[index] = replace(step, weight=weight, bias=bias)
    return replace(plan, steps=tuple(steps), quantisation=replace(plan.quantisation, weights=scales))


@lru_cache
def saturates() -> bool:
    """Return True if the processor adds pairs of products in 16 bits, so that weights above 64 give wrong results.

    This is so without VNNI instructions. It is tried out, because environment variables can turn them off.
    """
    weight = torch.full((16, 16, 1, 1), 127, dtype=torch.int8, device="cpu")
    x = torch.full((1, 16, 4, 4), LARGEST, dtype=torch.uint8, device="cpu").contiguous(
        memory_format=torch.channels_last
    )
    scale = torch.ones(16, dtype=torch.float32, device="cpu")
    conv = Conv("probe", "x", "y", weight.permute(0, 2, 3, 1), torch.zeros(16, dtype=torch.float32, device="cpu"))
    found = pack_convolution(conv, scale, Scale(1.0), Scale(1.0), None, "none", (1, 4, 4, 16))
    y = replace(found, output=_output(None))(x)
    return not bool((y == 16 * 127 * LARGEST).all())


def weight_limit() -> int:
    """Return the largest weight with which this processor computes exactly."""
    return WEIGHT_LIMIT_WITHOUT_VNNI if saturates() else WEIGHT_LIMIT


@lru_cache
def speedup(threads: int) -> float:
    """Return how many times faster a convolution in 8 bit is than in float32 here, with torch's ``threads``.

    It is measured, in a few hundredths of a second: 128 channels, 3×3, on 28×28 pixels. The two take turns, and the
    shortest times count, because other programs only make calls slower. A result below 1 is measured twice more.
    """
    shape = (1, 28, 28, 128)
    weight = torch.ones(128, 3, 3, 128, dtype=torch.float32, device="cpu")
    step = Conv("probe", "x", "y", weight, torch.zeros(128, dtype=torch.float32, device="cpu"), padding=1)
    x = torch.ones(1, 128, 28, 28, dtype=torch.float32, device="cpu").contiguous(memory_format=torch.channels_last)
    levels = replace(step, weight=weight.to(torch.int8))
    scale = torch.ones(128, dtype=torch.float32, device="cpu")
    in_8_bit = pack_convolution(levels, scale, Scale(1.0), Scale(1.0), None, "relu", shape)
    in_float, pixels = pack_step(step, shape), x.to(torch.uint8)
    best = 0.0
    for _ in range(3):
        times = [(_seconds(in_float, x), _seconds(in_8_bit, pixels)) for _ in range(12)][2:]
        best = max(best, min(time for time, _ in times) / min(time for _, time in times))
        if best > 1:
            break
    return best


def _seconds(conv: Callable[[Tensor], Tensor], x: Tensor) -> float:
    begun = time.perf_counter()
    conv(x)
    return time.perf_counter() - begun
