"""Squeeze-and-excitation with the residual add and ReLU that follow it (Hu, Shen & Sun, CVPR 2018).

    s[n] = sigmoid(expand_weight · relu(squeeze_weight · mean(x[n]) + squeeze_bias) + expand_bias)
    y[n, h, w, c] = relu(x[n, h, w, c] · s[n, c] + residual[n, h, w, c])

Four launches: the average pool, two linear layers over one pixel per image (:mod:`.head`), and the gate below, which
causes nearly all memory traffic. ``x``, ``residual`` and ``y`` are NHWC; the gate's argument and its products are
float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.kernels.routing.cards import Gpu
from fastres.kernels.routing.rules import PoolConfig, route_conv, route_window_pool

from .conv import arrivals, conv2d_into
from .dispatch import route
from .head import average_pool_into, linear_into, linear_shape
from .launch import (
    ACTIVATION_DTYPES,
    check_dtype,
    check_shape,
    check_tensors,
    float32_precision,
    kernel_op,
    wait_for_inputs,
)
from .pool import launch_over_pixels, pixels_and_channels


@triton.jit(do_not_specialize=["HW", "pixel_blocks"])
def gate_kernel(
    x_ptr,
    gate_ptr,
    residual_ptr,
    y_ptr,
    HW,
    pixel_blocks,
    C: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if EARLY:
        wait_for_inputs()
    image, offs_hw, offs_c = pixels_and_channels(pixel_blocks, C, BLOCK_HW, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_hw < HW)[:, None] & mask_c[None, :]
    offs = image * HW * C + offs_hw[:, None] * C + offs_c[None, :]  # [BLOCK_HW, BLOCK_C]
    scale = tl.sigmoid(tl.load(gate_ptr + image * C + offs_c, mask=mask_c, other=0.0))
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = tl.maximum(x * scale[None, :] + residual, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def gate_constants(channels: int, config: PoolConfig) -> dict[str, int]:
    """Return the gate kernel's compile-time arguments, the same for a launch and for an ahead-of-time compilation."""
    return {"C": channels, "BLOCK_HW": config.block_hw, "BLOCK_C": config.block_c}


def squeeze_excite_into(
    y: Tensor,
    x: Tensor,
    residual: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    *,
    config: PoolConfig | None = None,
    arrived: Tensor | None = None,
    traceable: bool = False,
) -> None:
    """Write the gated ``x`` plus ``residual``, after ReLU, into ``y``; all three are [N, H, W, C] and contiguous.

    ``squeeze_weight`` [S, C] and ``expand_weight`` [C, S] have ``x``'s dtype; the biases are float32 [S] and [C]. ``y``
    may be the same tensor as ``residual`` or ``x``. ``config`` overrides the gate's routing. ``arrived`` is as in
    :func:`.conv.conv2d_into` and holds :func:`squeeze_arrivals` counters.
    """
    n, h, w, c = x.shape
    squeezed = squeeze_weight.shape[0]
    pooled, hidden = x.new_empty(n, 1, 1, c), x.new_empty(n, 1, 1, squeezed)
    gate = torch.empty(n, c, dtype=torch.float32, device=x.device)
    average_pool_into(pooled.view(n, c), x, traceable=traceable)
    weight = squeeze_weight.view(squeezed, 1, 1, c)
    conv2d_into(hidden, pooled, weight, squeeze_bias, relu=True, arrived=arrived, traceable=traceable)
    linear_into(gate, hidden.view(n, squeezed), expand_weight, expand_bias, arrived=arrived, traceable=traceable)
    if config is None:
        config = route_window_pool(c)
    tensors, constants = (x, gate, residual, y), gate_constants(c, config)
    launch_over_pixels(gate_kernel, x, h * w, config, *tensors, h * w, traceable=traceable, **constants)


def squeeze_arrivals(n: int, channels: int, squeezed: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """Return the number of counters that the two linear layers need."""
    precision = float32_precision()
    squeeze, expand = linear_shape(n, channels, squeezed), linear_shape(n, squeezed, channels)
    return max(
        arrivals(squeeze, route_conv(squeeze, dtype, gpu, precision)),
        arrivals(expand, route(expand, dtype, gpu, precision=precision, classifier=True)),
    )


@kernel_op("squeeze_excite", mutates_args=())
def squeeze_excite(
    x: Tensor,
    residual: Tensor,
    squeeze_weight: Tensor,
    squeeze_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> Tensor:
    """Run the step as ``torch.ops.fastres.squeeze_excite``; tensors as in :func:`squeeze_excite_into`.

    Raises ``KernelError``, ``DtypeError``, ``DeviceError``.
    """
    op = "fastres::squeeze_excite"
    weights = {"squeeze_weight": squeeze_weight, "expand_weight": expand_weight}
    biases = {"squeeze_bias": squeeze_bias, "expand_bias": expand_bias}
    check_tensors(op, x.device, x=x, residual=residual, **weights, **biases)
    check_dtype(op, "x", x, *ACTIVATION_DTYPES)
    for name, tensor in {"residual": residual, **weights}.items():
        check_dtype(op, name, tensor, x.dtype)
    for name, tensor in biases.items():
        check_dtype(op, name, tensor, torch.float32)
    c, s = x.shape[3], squeeze_weight.shape[0]
    check_shape(op, "residual", residual, tuple(x.shape))
    check_shape(op, "squeeze_weight", squeeze_weight, (s, c))
    check_shape(op, "squeeze_bias", squeeze_bias, (s,))
    check_shape(op, "expand_weight", expand_weight, (c, s))
    check_shape(op, "expand_bias", expand_bias, (c,))
    y = torch.empty_like(x)
    if y.numel():
        squeeze_excite_into(y, x, residual, squeeze_weight, squeeze_bias, expand_weight, expand_bias, traceable=True)
    return y
