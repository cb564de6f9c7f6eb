"""Convolution + bias + residual + ReLU of 8-bit numbers as one implicit GEMM: the 8-bit form of :mod:`.conv`.

    v[n, p, q, k] = x_scale · weight_scale[k] · Σ_{r, s, c} x[n, …, g·C + c] · w[k, r, s, c] + bias[k]
                    + residual_scale · (residual[n, p, q, k] − residual_zero_point)
    y[n, p, q, k] = the nearest 8-bit number to relu(v) / output_scale + output_zero_point

with the pixels, groups, tiles and loop of :mod:`.conv`. There are two kinds of 8-bit numbers:

- Levels (int8 form): x, residual and y are uint8, w is int8. The sums are exact in int32. y is rounded half to even and
  saturated to 0 … 255. x has zero point 0, so a pixel outside the image is level 0.
- Floats (fp8 form): everything is e4m3, sums are float32, and the zero points are 0. y is saturated to ±448. On Hopper,
  the tensor cores keep some 14 bits of such sums, far more than the 4 bits of a result.

Tensor cores multiply numbers of one kind, and Triton offers int8. So the kernel multiplies x − 128, which is x with its
highest bit inverted, and adds 128 · Σ w to the sum (:func:`compensation`). Level 0 outside the image becomes −128 like
any other pixel, so one sum for each output channel is exact at borders too. The bits are inverted in registers, which
are the tensor cores' source for one operand then; the weights are read from shared memory. To keep this out of the
loop, activations would have to be stored as x − 128, and masked loads could not fill in level 0.

v / output_scale is computed in float32, so a level may differ by one from :func:`.reference.quantised_conv2d` where the
exact value lies half-way between two.

The kernel computes whole reductions (no split). On an H100 it is right in int8 and e4m3. No rule chooses it: its speed
has not been measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import KernelError
from fastres.kernels.routing.cards import INTERPRETER, Gpu, gpu_of
from fastres.kernels.routing.rules import ConvConfig, ConvShape

from .conv import conv_grid, conv_shape
from .launch import (
    INT32_ELEMENTS,
    cdiv,
    check_dtype,
    check_shape,
    check_tensors,
    device_guard,
    kernel_op,
    launchable,
    needs_wide_offsets,
    next_power_of_2,
    start_options,
    wait_for_inputs,
)

LEVELS, E4M3 = torch.uint8, torch.float8_e4m3fn
WEIGHT_DTYPES = {LEVELS: torch.int8, E4M3: E4M3}  # by the activations' dtype

# The longest reduction whose sum of products of a level and a weight fits int32.
LONGEST = (2**31 - 1) // (255 * 128)


@triton.jit
def signed(x):
    """Return uint8 ``x`` − 128 as int8."""
    return (x ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def rounded(y, zero_point, kind: tl.constexpr):
    """Return float32 ``y`` + ``zero_point`` as ``kind``: rounded and saturated to uint8 or e4m3, or as it is."""
    if kind == tl.uint8:
        zero = zero_point * 1.0
        y = tl.minimum(tl.maximum(y, -zero), 255.0 - zero)
        # 3 · 2²² leaves no bits for a fraction: the sum is rounded half to even, and ends in the integer's bits. The
        # ordinary conversion truncates, and is slower.
        y = ((y + 12582912.0).to(tl.int32, bitcast=True) + zero_point).to(tl.uint8)
    elif kind == tl.float8e4nv:
        y = tl.minimum(y, 448.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.maximum(y, -448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    return y


@triton.jit(do_not_specialize=["M", "H", "W", "P", "Q", "residual_zero_point", "output_zero_point"])
def conv_8bit_kernel(
    x_ptr,
    w_ptr,
    weight_scale_ptr,
    bias_ptr,
    compensation_ptr,  # int32, 128 · Σ w of each output channel; not for e4m3
    residual_ptr,
    y_ptr,
    x_scale,
    residual_scale,
    residual_zero_point,
    inverse,  # 1 / output_scale
    output_zero_point,
    M,  # N · P · Q
    H,
    W,
    P,
    Q,
    C: tl.constexpr,  # input channels of a group
    K: tl.constexpr,  # output channels of a group
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,  # 64-bit offsets: some tensor has 2³¹ elements or more
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    INTEGER: tl.constexpr = w_ptr.dtype.element_ty == tl.int8
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    N_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    MASK_C: tl.constexpr = C % BLOCK_K != 0
    MASK_N: tl.constexpr = K % BLOCK_N != 0

    pid = tl.program_id(0)
    pid_n = pid % (N_BLOCKS * GROUPS)
    pid_m = pid // (N_BLOCKS * GROUPS)
    group = pid_n // N_BLOCKS
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid_n % N_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    offs_q = offs_m % Q
    offs_p = (offs_m // Q) % P
    offs_image = offs_m // (P * Q)
    if WIDE:
        offs_image = offs_image.to(tl.int64)
        offs_m = offs_m.to(tl.int64)
    top = offs_p * STRIDE - PADDING
    left = offs_q * STRIDE - PADDING
    x_offs = ((offs_image * H + top) * W + left)[:, None] * (C * GROUPS) + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_offs = offs_n[None, :] * (R * S * C) + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    x_ptr += group * C
    w_ptr += group * (K * R * S * C)
    top = tl.where(offs_m < M, top, -(1 << 24))  # rows past the end read nothing

    if EARLY:
        wait_for_inputs()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for block in range(R * S * C_BLOCKS):
        tap = block // C_BLOCKS
        c = (block % C_BLOCKS) * BLOCK_K
        r = tap // S
        s = tap % S
        # One unsigned comparison checks both ends of a range.
        inside = ((top + r).to(tl.uint32) < H) & ((left + s).to(tl.uint32) < W)
        mask_x = inside[:, None]
        if MASK_C:  # channels past C meet zero weights
            mask_x = mask_x & (c + offs_k < C)[None, :]
        x = tl.load(x_ptr + ((r * W + s) * (C * GROUPS) + c) + x_offs, mask=mask_x, other=0.0)
        if MASK_C and MASK_N:
            mask_w = (c + offs_k < C)[:, None] & (offs_n < K)[None, :]
            w = tl.load(w_ptr + (tap * C + c) + w_offs, mask=mask_w, other=0.0)
        elif MASK_C:
            w = tl.load(w_ptr + (tap * C + c) + w_offs, mask=(c + offs_k < C)[:, None], other=0.0)
        elif MASK_N:
            w = tl.load(w_ptr + (tap * C + c) + w_offs, mask=(offs_n < K)[None, :], other=0.0)
        else:
            w = tl.load(w_ptr + (tap * C + c) + w_offs)
        if INTEGER:
            x = signed(x)
        acc = tl.dot(x, w, acc, out_dtype=acc.dtype)

    offs_k_out = group * K + offs_n
    mask_n = offs_n < K
    mask_y = (offs_m < M)[:, None] & mask_n[None, :]
    if INTEGER:
        acc += tl.load(compensation_ptr + offs_k_out, mask=mask_n, other=0)[None, :]
    # From here on, numbers are in units of the output's scale.
    scale = tl.load(weight_scale_ptr + offs_k_out, mask=mask_n, other=0.0) * (x_scale * inverse)
    bias = tl.load(bias_ptr + offs_k_out, mask=mask_n, other=0.0) * inverse
    y = acc.to(tl.float32) * scale[None, :] + bias[None, :]
    y_offs = offs_m[:, None] * (K * GROUPS) + offs_k_out[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + y_offs, mask=mask_y, other=0.0).to(tl.float32)
        y += (residual - residual_zero_point) * (residual_scale * inverse)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + y_offs, rounded(y, output_zero_point, y_ptr.dtype.element_ty), mask=mask_y)


def why_not_8bit(dtype: torch.dtype, gpu: Gpu) -> str:
    """Return the reason why ``gpu`` has no tensor cores for 8-bit numbers of ``dtype``; empty if it has."""
    if gpu is INTERPRETER:
        return ""
    if not gpu.has_tensor_cores:
        return f"Triton does not use tensor cores on {gpu.arch}"
    native = gpu.arch.startswith(("gfx95", "gfx12")) if gpu.is_amd else int(gpu.arch.removeprefix("sm_")) >= 89
    if dtype == E4M3 and not native:
        return f"e4m3 needs sm_89 or later, gfx950 or gfx12, and {gpu.name} is {gpu.arch}"
    return ""


def default_config(shape: ConvShape, dtype: torch.dtype, gpu: Gpu, *, residual: bool = False) -> ConvConfig:
    """Return a tile that compiles without spills: the largest of which every multiprocessor gets one.

    On sm_90, the program waits for each block of int8 products, so several programs must fit a multiprocessor and a
    block must be long: 128 channels. In long reductions 128×128 takes 128 registers, but 187 with a residual, so the
    tile is then 128×64. e4m3 products run ahead of the wait. With 64 channels a block they take 98 to 103 registers in
    long reductions, with 128 up to 169.
    """
    if gpu is INTERPRETER:
        block_m, block_n = (max(16, min(256, next_power_of_2(size))) for size in (shape.M, shape.K))
        return ConvConfig("conv_8bit", block_m, block_n, max(32, min(512, next_power_of_2(shape.C))), 4, 1)
    waits = gpu.arch == "sm_90" and dtype == LEVELS
    block_k = min(128 if waits else 64, max(32, next_power_of_2(shape.C)))
    widest = min(64 if waits and residual else 128, max(16, next_power_of_2(shape.K)))
    sizes = [(128, widest), (128, min(64, widest)), (64, min(64, widest)), (64, min(32, widest))]
    filling = [size for size in sizes if _tiles(shape, *size) >= gpu.multiprocessors]
    block_m, block_n = (filling or sizes[-1:])[0]
    stages = 2 if gpu.is_amd else 4 if gpu.arch == "sm_90" and block_k < 128 else 3
    return ConvConfig("conv_8bit", block_m, block_n, block_k, 8 if block_m * block_n >= 128 * 128 else 4, stages)


def _tiles(shape: ConvShape, block_m: int, block_n: int) -> int:
    return cdiv(shape.M, block_m) * cdiv(shape.K, block_n) * shape.groups


def conv_8bit_constants(
    shape: ConvShape, config: ConvConfig, *, residual: bool, relu: bool, wide: bool = False
) -> dict[str, Any]:
    """Return the compile-time arguments except EARLY, the same for a launch and for an ahead-of-time compilation."""
    return {
        "C": shape.C,
        "K": shape.K,
        "GROUPS": shape.groups,
        "R": shape.R,
        "S": shape.S,
        "STRIDE": shape.stride,
        "PADDING": shape.padding,
        "HAS_RESIDUAL": residual,
        "RELU": relu,
        "WIDE": wide,
        **config.blocks,
    }


def compensation(weight: Tensor) -> Tensor | None:
    """Return 128 · Σ w of each output channel of an int8 ``weight``, int32 [K]; None for e4m3, which needs none."""
    return weight.flatten(1).sum(1, dtype=torch.int32) * 128 if weight.dtype == torch.int8 else None


def conv2d_8bit_into(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    x_scale: float,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    output_scale: float = 1.0,
    output_zero_point: int = 0,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
    config: ConvConfig | None = None,
    added: Tensor | None = None,
    traceable: bool = False,
) -> None:
    """Write the convolution of ``x`` into ``y``; ``config`` overrides :func:`default_config`.

    ``x`` [N, H, W, groups·C], ``weight`` [groups·K, R, S, C], ``weight_scale`` and ``bias`` float32 [groups·K], ``y``
    and ``residual`` [N, P, Q, groups·K]; all contiguous and on one device. ``x`` and ``residual`` are uint8 and
    ``weight`` int8, or all are e4m3. ``y`` has the dtype of ``x``, or is float32: then it holds v, and the scale and
    the zero point of the output must be 1 and 0. ``y`` may be the same tensor as ``residual``, but must not overlap any
    other tensor. ``added`` is :func:`compensation` of ``weight``; without it, it is computed. Arguments are not checked
    here; :func:`check_conv_8bit` checks them.
    """
    shape = conv_shape(x, weight, stride, padding, groups)
    if config is None:
        config = default_config(shape, x.dtype, gpu_of(x.device), residual=residual is not None)
    constants = conv_8bit_constants(
        shape, config, residual=residual is not None, relu=relu, wide=needs_wide_offsets(x, y)
    )
    with device_guard(x.device):
        launchable(conv_8bit_kernel, traceable)[conv_grid(shape, config)](
            x,
            weight,
            weight_scale,
            bias,
            compensation(weight) if added is None else added,
            residual,
            y,
            x_scale,
            residual_scale,
            residual_zero_point,
            1 / output_scale,
            output_zero_point,
            shape.M,
            shape.H,
            shape.W,
            shape.P,
            shape.Q,
            **constants,
            **start_options(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def check_conv_8bit(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    shape: ConvShape,
) -> None:
    """Raise an error if :func:`conv2d_8bit_into` cannot take the tensors, or the GPU cannot multiply them."""
    op, channels = "fastres::conv2d_8bit", shape.K * shape.groups
    tensors = {"weight": weight, "weight_scale": weight_scale, "bias": bias, "residual": residual, "y": y}
    check_tensors(op, x.device, x=x, **tensors)
    check_dtype(op, "x", x, LEVELS, E4M3)
    check_dtype(op, "weight", weight, WEIGHT_DTYPES[x.dtype])
    check_dtype(op, "y", y, x.dtype, torch.float32)
    check_shape(op, "weight", weight, (channels, shape.R, shape.S, shape.C))
    check_shape(op, "x", x, (shape.N, shape.H, shape.W, shape.C * shape.groups))
    for name, tensor in (("weight_scale", weight_scale), ("bias", bias)):
        check_dtype(op, name, tensor, torch.float32)
        check_shape(op, name, tensor, (channels,))
    if shape.P < 1 or shape.Q < 1:
        raise KernelError(f"{op}: a {shape.R}×{shape.S} filter does not fit images of {shape.H}×{shape.W}")
    check_shape(op, "y", y, (shape.N, shape.P, shape.Q, channels))
    if residual is not None:
        check_dtype(op, "residual", residual, x.dtype)
        check_shape(op, "residual", residual, tuple(y.shape))
    if shape.M >= INT32_ELEMENTS - 256:
        raise KernelError(f"{op}: {shape.M} output pixels are more than 2³¹; split the batch")
    if x.dtype == LEVELS and (terms := shape.R * shape.S * shape.C) > LONGEST:
        raise KernelError(f"{op}: a sum of {terms} products may exceed int32; at most {LONGEST} fit")
    if reason := why_not_8bit(x.dtype, gpu_of(x.device)):
        raise KernelError(f"{op}: {reason}")


@kernel_op("conv2d_8bit", mutates_args=())
def conv2d_8bit(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    x_scale: float,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """Run the convolution as the op ``torch.ops.fastres.conv2d_8bit``; shapes as in :func:`conv2d_8bit_into`.

    Returns a new tensor [N, P, Q, groups·K] of ``x``'s dtype, or float32 without ``output_scale``. Raises
    ``KernelError``, ``DtypeError`` or ``DeviceError``.
    """
    shape = conv_shape(x, weight, stride, padding, groups)
    dtype = torch.float32 if output_scale is None else x.dtype
    y = x.new_empty(shape.N, max(shape.P, 0), max(shape.Q, 0), weight.shape[0], dtype=dtype)
    check_conv_8bit(y, x, weight, weight_scale, bias, residual, shape)
    if y.numel():
        conv2d_8bit_into(
            y, x, weight, weight_scale, bias, residual,
            x_scale=x_scale, residual_scale=residual_scale, residual_zero_point=residual_zero_point,
            output_scale=1.0 if output_scale is None else output_scale, output_zero_point=output_zero_point,
            stride=stride, padding=padding, groups=groups, relu=relu, traceable=True,
        )  # fmt: skip
    return y
