"""The head: a global average pool, then the classifier, which is a 1×1 convolution over one pixel.

    pooled[n, c] = (1 / H·W) Σ_{h, w} x[n, h, w, c]
    logits[n, k] = bias[k] + Σ_c pooled[n, c] · weight[k, c]

``x`` is NHWC; sums are float32. The pooled features are rounded to the activations' dtype for the tensor cores; the
logits stay float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.routing.cards import gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape, PoolConfig, route_pool

from .conv import conv2d_into
from .dispatch import convolve_into, route
from .launch import (
    ACTIVATION_DTYPES,
    cdiv,
    check_dtype,
    check_shape,
    check_tensors,
    device_guard,
    float32_precision,
    kernel_op,
    launchable,
    start_options,
    wait_for_inputs,
)


@triton.jit(do_not_specialize=["HW"])
def average_pool_kernel(
    x_ptr,
    y_ptr,
    HW,
    C: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if EARLY:
        wait_for_inputs()
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    image = (pid // C_BLOCKS).to(tl.int64)
    offs_c = (pid % C_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_hw = tl.arange(0, BLOCK_HW)
    mask_c = offs_c < C
    x_ptr += image * HW * C
    acc = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    for start in range(0, HW, BLOCK_HW):
        mask = (start + offs_hw < HW)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + (start + offs_hw)[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        acc += x.to(tl.float32)
    mean = tl.sum(acc, 0) / HW
    tl.store(y_ptr + image * C + offs_c, mean.to(y_ptr.dtype.element_ty), mask=mask_c)


def average_pool_into(y: Tensor, x: Tensor, *, config: PoolConfig | None = None, traceable: bool = False) -> None:
    """Write the mean over the pixels of ``x`` [N, H, W, C] into ``y`` [N, C]; ``config`` overrides the routing."""
    n, h, w, c = x.shape
    if config is None:
        config = route_pool(c, h * w)
    with device_guard(x.device):
        launchable(average_pool_kernel, traceable)[(n * cdiv(c, config.block_c),)](
            x,
            y,
            h * w,
            C=c,
            **start_options(),
            BLOCK_HW=config.block_hw,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
        )


def linear_shape(n: int, channels: int, classes: int) -> ConvShape:
    """Return the sizes of the classifier as a convolution."""
    return ConvShape(n, 1, 1, channels, classes, 1, 1, 1, 0)


def linear_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    config: ConvConfig | None = None,
    arrived: Tensor | None = None,
    traceable: bool = False,
) -> None:
    """Write ``x`` [N, C] times ``weight`` [K, C] plus ``bias`` float32 [K] into ``y`` [N, K].

    ``y`` has ``x``'s dtype or float32. ``config`` overrides the routing; for ``arrived`` see :func:`.conv.conv2d_into`.
    """
    n, c = x.shape
    k = weight.shape[0]
    tensors = (y.view(n, 1, 1, k), x.view(n, 1, 1, c), weight.view(k, 1, 1, c), bias)
    if traceable:  # the only kernel that a registered op can launch
        conv2d_into(*tensors, config=config, arrived=arrived, traceable=True)
        return
    if config is None:
        precision = float32_precision()
        config = route(linear_shape(n, c, k), x.dtype, gpu_of(x.device), precision=precision, classifier=True)
    convolve_into(*tensors, config=config, arrived=arrived)


@kernel_op("average_pool", mutates_args=())
def average_pool(x: Tensor) -> Tensor:
    """Average all pixels, as ``torch.ops.fastres.average_pool``: [N, H, W, C] to [N, C] of the same dtype."""
    op = "fastres::average_pool"
    check_tensors(op, x.device, x=x)
    check_dtype(op, "x", x, *ACTIVATION_DTYPES)
    y = x.new_empty(x.shape[0], x.shape[3])
    if y.numel():
        average_pool_into(y, x, traceable=True)
    return y


@kernel_op("linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run the classifier as ``torch.ops.fastres.linear``: [N, C] times [K, C] plus bias, float32 [N, K]."""
    op = "fastres::linear"
    check_tensors(op, x.device, x=x, weight=weight, bias=bias)
    check_dtype(op, "x", x, *ACTIVATION_DTYPES)
    check_dtype(op, "weight", weight, x.dtype)
    check_dtype(op, "bias", bias, torch.float32)
    check_shape(op, "weight", weight, (weight.shape[0], x.shape[1]))
    check_shape(op, "bias", bias, (weight.shape[0],))
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    if y.numel():
        linear_into(y, x, weight, bias, traceable=True)
    return y
